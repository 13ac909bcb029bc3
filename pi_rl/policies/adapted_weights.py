"""Adapter-only folders: LoRA factors and whole modules on a base policy's weights, merged tensor by tensor.

config.json                   LeRobot configuration with "use_peft": true
adapter_config.json           PEFT's: the base policy, rank, scaling, and `modules_to_save` (trained whole)
adapter_model.safetensors     the factors and the whole modules, by PEFT's names
processors and tokenizer as in any policy folder; no model.safetensors
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from pi_rl.policies.lora import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    STORED_PREFIX,
    VLM_PREFIX,
    MergedState,
    merge,
    read_adapter,
    unusual_fields,
)
from pi_rl.policies.weight_files import StoredTensor, StoredWeights, read_header, read_stored, some_of, stored_weights
from pi_rl.policies.weights import check_stored

_A, _B = ".lora_A.weight", ".lora_B.weight"
_NO_MATTER = ("modules_to_save", "lora_dropout", "bias")  # they leave no trace in the sums, or tensors of their own


@dataclass(frozen=True)
class AdaptedWeights(StoredWeights):
    """Weights of which some are W + s·B A, float32, computed in float64 on the CPU when they are read.

    Attributes:
        factors: A, B and s by the name of the weight; `tensors` has W's place, and float32 as its type.
    """

    factors: Mapping[str, tuple[StoredTensor, StoredTensor, float]] = field(default_factory=dict)

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Reads tensors; see `StoredWeights.read`. Merged ones come last."""
        listed = list(names)
        yield from read_stored({name: self.tensors[name] for name in listed if name not in self.factors}, device)
        for name in listed:
            if name in self.factors:
                a, b, scaling = self.factors[name]
                part = dict(read_stored({"weight": self.tensors[name], "a": a, "b": b}))
                yield name, merge(part["weight"], part["a"], part["b"], scaling).to(device)


def read_lora_config(folder: Path) -> LoraConfig:
    """The adapter configuration of a folder, if its adapters can be merged.

    Raises:
        ValueError: If it is missing, damaged, or anything else than plain LoRA.
    """
    path = folder / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"No adapter configuration in {folder}: {path.name} is missing. Give a folder that holds it.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not PEFT's configuration of an adapter ({error}); copy it again.") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} is of {type(config).__name__}; only plain LoRA can be merged here.")
    given = {name: value for name, (value, _) in unusual_fields(config, _NO_MATTER).items()}
    if given or config.init_lora_weights not in (True, False, "gaussian"):
        given = given or {"init_lora_weights": config.init_lora_weights}
        raise ValueError(
            f"{path} has {', '.join(f'{name}={value!r}' for name, value in given.items())}; only plain LoRA can be "
            "merged here. Merge it with PEFT's merge_and_unload first."
        )
    return config


def adapted_weights(folder: Path, base: StoredWeights) -> AdaptedWeights:
    """The weights of a base policy under a folder's adapters and whole modules; nothing is read but headers.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        base: The weights that the adapters were trained on.

    Raises:
        ValueError: If a file is missing or damaged, or a tensor does not belong to the base.
    """
    config = read_lora_config(folder)
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"No adapter weights in {folder}: {path.name} is missing. Give a folder that holds it.")
    stored = {name.removeprefix(STORED_PREFIX): tensor for name, tensor in read_header(path).items()}
    factors: dict[str, tuple[StoredTensor, StoredTensor, float]] = {}
    tensors = dict(base.tensors)
    other: list[str] = []
    for name, tensor in stored.items():
        if name.endswith((_A, _B)):
            layer = name.removesuffix(_A).removesuffix(_B)
            if layer + _A not in stored or layer + _B not in stored or not _fits(layer, stored, base):
                other.append(name)
            elif name.endswith(_A):
                weight = f"{layer}.weight"
                factors[weight] = (tensor, stored[layer + _B], scaling(config, layer))
                tensors[weight] = base.tensors[weight]._replace(dtype="F32")
        elif name in base.tensors and base.tensors[name].shape == tensor.shape:
            tensors[name] = tensor
        else:
            other.append(name)
    other += [name for name in factors if name in stored]
    if other or not factors:
        raise ValueError(
            f"{path} does not fit the base policy {base.source}: {len(other)} of {len(stored)} tensors are neither "
            f"LoRA factors of its linear layers nor its own ({some_of(sorted(other)) or 'there are no factors'}). "
            "Give the base that the adapter was trained on."
        )
    return AdaptedWeights(path, tensors, base.set_aside, factors)


def scaling(config: LoraConfig, layer: str) -> float:
    """The s of a layer: α / r, or α / √r with rank-stabilised LoRA; patterns of the configuration come first.

    Raises:
        ValueError: If r or α is not positive.
    """
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
    if rank < 1 or alpha <= 0:
        raise ValueError(f"{layer} has r={rank} and lora_alpha={alpha}; both must be positive.")
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _fits(layer: str, stored: Mapping[str, StoredTensor], base: StoredWeights) -> bool:
    """Whether A (r, in) and B (out, r) belong to a weight (out, in) of the base."""
    weight = base.tensors.get(f"{layer}.weight")
    a, b = stored[layer + _A].shape, stored[layer + _B].shape
    return weight is not None and len(a) == len(b) == 2 and weight.shape == (b[0], a[1]) and a[0] == b[1]


def load_adapted_weights(policy: nn.Module, folder: Path, adapter: Path, live: Mapping[str, Tensor]) -> None:
    """Loads a LoRA run's checkpoint into an adapted policy, in place; see `checkpoints.load_policy_weights`.

    Args:
        policy: LeRobot policy with adapters.
        folder: Policy folder with merged weights.
        adapter: Folder of its adapters.
        live: The weights that the policy has.

    Raises:
        ValueError: If the VLM under the adapters is not the one that they were trained on; nothing is loaded then.
    """
    adapters = read_adapter(adapter, policy)
    merged = MergedState(policy, {**live, **adapters})
    stored = stored_weights(folder)
    check_stored(stored, merged.shapes)
    vlm = [name for name in stored.tensors if name.startswith(VLM_PREFIX)]
    other = [
        name
        for name, tensor in stored.read(vlm)  # one at a time: merged layers of the whole model are 10 GB in float32
        if not same_weights(tensor, merged[name].cpu(), rounded=name in merged.computed)
    ]
    if other:
        raise ValueError(
            f"The run of {folder} was started from another base policy: {len(other)} of {len(vlm)} VLM tensors, such "
            f"as {other[0]}, are not this policy's with the folder's adapters merged. Pass the model that run was "
            "given, or start anew from the folder with model=."
        )
    trained = dict(stored.read(name for name in stored.tensors if not name.startswith(VLM_PREFIX)))
    policy.load_state_dict({**trained, **adapters}, strict=False)


def same_weights(stored: Tensor, live: Tensor, *, rounded: bool) -> bool:
    """Whether two tensors are equal; sums (`rounded`) may differ by a unit in the last place between processors."""
    if stored.dtype != live.dtype:
        return False
    return torch.allclose(stored, live, rtol=2**-22, atol=1e-12) if rounded else torch.equal(stored, live)

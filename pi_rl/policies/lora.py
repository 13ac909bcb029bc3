"""LoRA on the VLM of π0 and π0.5, trained beside the whole action expert (paper section 5.5).

An adapted layer computes W x + s·B A x with W frozen, A (r, in) and B (out, r) in float32, s = alpha / r and B = 0 at
the start, so that training begins at the given policy. Deployment gets the merged weight W + s·B A.

What the VLM computes and the action expert never reads gets no gradient, and is not adapted: the query and output
projections and the MLP of the last language layer (of that layer the expert reads keys and values alone) and the
language head. Distributed wrappers wait for the gradient of every trainable parameter.

A sample of the update then costs about 50 times the FLOPs of one with a stored prefix (5.6 against 0.11 TFLOP for π0
at its published size with two cameras) and keeps 4 GB of activations until its backward pass.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from pi_rl.policies.weights import check_tensors, read_tensors, write_tensors

if TYPE_CHECKING:
    from pi_rl.policies.flow_policy import FlowPolicy

VLM_PREFIX = "model.paligemma_with_expert.paligemma."
# Attention and MLP of the language model (…_proj) and of the vision tower (q/k/v/out_proj, fc1, fc2).
VLM_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "fc1",
    "fc2",
)
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
STORED_PREFIX = "base_model.model."  # PEFT's name for the policy that the adapter belongs to

_ADAPTER = "default"
_CONFIG_ATTRIBUTE = "peft_config"  # where PEFT keeps it
_ALL_LINEAR = "all-linear"
_FACTORS = ("lora_A", "lora_B")
_READ_IN_LAST_LAYER = ("k_proj", "v_proj")
_INITIALISATIONS = (True, "gaussian")  # the others start away from the given policy or change its weights
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_INITIALISATION = "init_lora_weights"
_IRRELEVANT = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
)


def vlm_lora_config(rank: int = 32, alpha: int = 32, target_modules: str | Sequence[str] | None = None) -> LoraConfig:
    """The paper's adapters: r = 32, α = 32 on the whole VLM (LoRA-I and LoRA-II differ in the update's settings).

    Args:
        rank: r.
        alpha: α; the adapters' output is multiplied by α / r.
        target_modules: Last parts of layer names inside the VLM, or one regular expression for whole names in the
            LeRobot policy, such as ".*language_model.*" for the language model without the vision tower (also as the
            only entry of a list). None is `VLM_MODULES`: attention and MLP of both.

    Raises:
        ValueError: If rank or alpha is not positive.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank={rank} and alpha={alpha} must be positive; the paper uses 32 and 32.")
    targets = VLM_MODULES if target_modules is None else target_modules
    if len(targets) == 1 and "*" in targets[0]:
        targets = targets[0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        init_lora_weights="gaussian",  # as in the reference implementation
    )


def add_lora(policy: "FlowPolicy", peft_config: LoraConfig, base: str | None = None) -> None:
    """Adapts the VLM in place; adapters, action expert and projections are trainable afterwards, nothing else.

    Args:
        policy: A `PiFlowPolicy`; its prefixes are live from now on: the update has to encode observations anew.
        peft_config: Names in `target_modules` are looked up inside the VLM; None stands for `VLM_MODULES`.
        base: Folder or Hub id of the policy, recorded in saved adapters.

    Raises:
        ValueError: If the policy has no VLM or adapters already, or the configuration asks for something other than
            plain, mergeable LoRA on linear layers of the VLM.
    """
    lerobot_policy = getattr(policy, "policy", None)
    if not isinstance(lerobot_policy, nn.Module) or not _linear_layers(lerobot_policy, VLM_PREFIX):
        raise ValueError(
            f"{type(policy).__name__} has no VLM to adapt; LoRA is for PiFlowPolicy (π0, π0.5). Train without "
            "peft_config, that is lora_rank=0."
        )
    if has_lora(lerobot_policy):
        raise ValueError("The policy has LoRA adapters already; load it anew, or train the ones it has.")
    resolved = _resolved(lerobot_policy, peft_config)
    resolved.base_model_name_or_path = base
    inject_adapter_in_model(copy.deepcopy(resolved), lerobot_policy, adapter_name=_ADAPTER)
    setattr(lerobot_policy, _CONFIG_ATTRIBUTE, {_ADAPTER: resolved})  # PEFT's own copy holds abbreviated names
    for parameter in lora_parameters(lerobot_policy):
        parameter.data = parameter.data.float()
    policy.prefix_is_live = True
    policy.freeze_vlm()


def has_lora(module: nn.Module) -> bool:
    """Whether a module has LoRA adapters."""
    return any(isinstance(layer, LoraLayer) for layer in module.modules())


def lora_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' parameters, A and B of every adapted layer."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            for factor in _FACTORS:
                yield from getattr(layer, factor).parameters()


class MergedState(Mapping[str, Tensor]):
    """The weights of a LeRobot policy with W + s·B A in place of its adapted layers, each computed when asked for.

    Merged weights are float32, also over a bfloat16 VLM, and computed in float64 on the CPU: bfloat16 rounding would
    lose whatever is below 2⁻⁹ of a weight, and the sums come out the same on every device. The policy stays as it is.

    Args:
        lerobot_policy: LeRobot policy, adapted or not.
        state_dict: Its weights, for instance gathered from a sharded model; None takes `lerobot_policy.state_dict()`.

    Attributes:
        shapes: What the values will be, by LeRobot's names; merged ones on the meta device, the others themselves.
    """

    def __init__(self, lerobot_policy: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
        self.shapes = dict(lerobot_policy.state_dict() if state_dict is None else state_dict)
        self._layers: dict[str, tuple[Tensor, Tensor, Tensor, float]] = {}
        for name, layer in _lora_layers(lerobot_policy):
            a, b = (self.shapes.pop(f"{name}.{factor}.{_ADAPTER}.weight") for factor in _FACTORS)
            if (bias := self.shapes.pop(f"{name}.base_layer.bias", None)) is not None:
                self.shapes[f"{name}.bias"] = bias
            weight = self.shapes.pop(f"{name}.base_layer.weight")
            self.shapes[f"{name}.weight"] = torch.empty(weight.shape, dtype=torch.float32, device="meta")
            self._layers[f"{name}.weight"] = (weight, a, b, layer.scaling[_ADAPTER])

    def __getitem__(self, name: str) -> Tensor:
        return merge(*self._layers[name]) if name in self._layers else self.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def computed(self) -> frozenset[str]:
        """Names of the merged weights."""
        return frozenset(self._layers)


def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling·B A.

    Args:
        weight: W, (out, in) of any floating type.
        a: A, (r, in).
        b: B, (out, r).
        scaling: s.

    Returns:
        (out, in) float32 on the CPU.
    """
    weight, a, b = (tensor.detach().cpu().double() for tensor in (weight, a, b))
    return torch.addmm(weight, b, a, alpha=scaling).float()


def adapter_state_dict(lerobot_policy: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters by the names that PEFT gives them in its files.

    Args:
        lerobot_policy: LeRobot policy.
        state_dict: Its weights, for instance gathered from a sharded model; None takes `lerobot_policy.state_dict()`.
    """
    tensors = lerobot_policy.state_dict() if state_dict is None else state_dict
    return {stored: tensors[name] for name, stored in _adapter_names(lerobot_policy).items()}


def save_adapter(
    folder: str | Path, lerobot_policy: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads onto the policy they began from.

    Args:
        folder: Target folder.
        lerobot_policy: LeRobot policy.
        state_dict: As in `adapter_state_dict`.

    Raises:
        ValueError: If the policy has no adapters.
    """
    config = copy.copy(_adapter_config(lerobot_policy))
    config.target_modules = sorted(config.target_modules)  # sets have another order in every process
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    write_tensors(folder / ADAPTER_WEIGHTS_FILE, adapter_state_dict(lerobot_policy, state_dict))


def read_adapter(folder: str | Path, lerobot_policy: nn.Module) -> dict[str, Tensor]:
    """Reads what `save_adapter` wrote and checks that it fits the policy's adapters, which stay as they are.

    Returns:
        Tensors by their names in `lerobot_policy.state_dict()`.

    Raises:
        ValueError: If a file is missing, or rank, scaling or adapted layers differ.
    """
    folder, live = Path(folder), _adapter_config(lerobot_policy)
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"No adapter configuration in {folder}: {ADAPTER_CONFIG_FILE} is missing. Give the adapter folder of a "
            "run with LoRA."
        )
    stored = PeftConfig.from_pretrained(str(folder))
    for field in (*_SCALING, "target_modules"):
        given, expected = getattr(stored, field, None), getattr(live, field)
        if given != expected:
            if field == "target_modules":
                given, expected = (f"{len(names or ())} layers" for names in (given, expected))
            raise ValueError(
                f"The adapters in {folder} have {field}={given}, this policy's have {expected}. Use the LoRA settings "
                "of the run that wrote them."
            )
    tensors = read_tensors(folder / ADAPTER_WEIGHTS_FILE, "adapter weights")
    check_tensors(tensors, adapter_state_dict(lerobot_policy), str(folder / ADAPTER_WEIGHTS_FILE))
    return {name: tensors[stored_name] for name, stored_name in _adapter_names(lerobot_policy).items()}


def load_adapter(folder: str | Path, lerobot_policy: nn.Module) -> None:
    """Loads what `save_adapter` wrote into the policy's adapters, in place.

    Raises:
        ValueError: If a file is missing, or rank, scaling or adapted layers differ; nothing is loaded then.
    """
    lerobot_policy.load_state_dict(read_adapter(folder, lerobot_policy), strict=False)


def _lora_layers(lerobot_policy: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in lerobot_policy.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _adapter_names(lerobot_policy: nn.Module) -> dict[str, str]:
    """Names of the adapters' tensors: here → in PEFT's files."""
    return {
        f"{layer}.{factor}.{_ADAPTER}.weight": f"{STORED_PREFIX}{layer}.{factor}.weight"
        for layer, _ in _lora_layers(lerobot_policy)
        for factor in _FACTORS
    }


def _adapter_config(lerobot_policy: nn.Module) -> LoraConfig:
    if not has_lora(lerobot_policy):
        raise ValueError(
            "The policy has no LoRA adapters; add them with add_lora, or pass peft_config to the trainer."
        )
    return getattr(lerobot_policy, _CONFIG_ATTRIBUTE)[_ADAPTER]


def _resolved(lerobot_policy: nn.Module, config: LoraConfig) -> LoraConfig:
    """The same adapters with every adapted layer by its full name."""
    _check_config(config)
    return LoraConfig(
        target_modules=_targets(lerobot_policy, config),
        lora_dropout=0.0,
        **{name: copy.deepcopy(getattr(config, name)) for name in (*_SCALING, _INITIALISATION)},
    )


def _check_config(config: LoraConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config is a {type(config).__name__}; only peft.LoraConfig is supported.")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout} is not supported: sampling and update would draw different masks, "
            "so that the policy ratio would not start at 1. Use lora_dropout=0."
        )
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} does not start from the given policy, or changes the "
            f"weights beside the adapters; use one of {_INITIALISATIONS}."
        )
    if config.lora_alpha <= 0:
        raise ValueError(f"lora_alpha={config.lora_alpha} must be positive.")
    for name, (given, default) in unusual_fields(config).items():
        raise ValueError(
            f"LoraConfig({name}={given!r}) is not supported: only plain LoRA on linear layers of the VLM can be "
            f"merged into a LeRobot policy, and action expert and projections are trained whole. Leave {name} at "
            f"{default!r}."
        )


def unusual_fields(config: LoraConfig, allowed: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """What makes a configuration more than plain LoRA: given and default value by the field's name.

    Args:
        config: The configuration.
        allowed: Fields that may have any value.
    """
    defaults = LoraConfig()
    names = {field.name for field in dataclasses.fields(config)}
    names -= {*_TARGETING, *_SCALING, _INITIALISATION, *_IRRELEVANT, *allowed}
    pairs = {name: (getattr(config, name), getattr(defaults, name)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and any(pair)}


def _linear_layers(lerobot_policy: nn.Module, prefix: str = "") -> list[str]:
    return [
        name
        for name, module in lerobot_policy.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]


def _read_by_the_expert(vlm_layers: Sequence[str]) -> list[str]:
    """The linear layers of the VLM that the actions depend on."""
    depth = re.compile(re.escape(VLM_PREFIX) + r"model\.language_model\.layers\.(\d+)\.")
    index = {name: int(match[1]) for name in vlm_layers if (match := depth.match(name))}
    last = max(index.values())
    return [
        name
        for name in vlm_layers
        if name != f"{VLM_PREFIX}lm_head"
        and (index.get(name) != last or name.rpartition(".")[2] in _READ_IN_LAST_LAYER)
    ]


def _targets(lerobot_policy: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the layers to adapt."""
    wanted = VLM_MODULES if config.target_modules is None else config.target_modules
    usable = _read_by_the_expert(_linear_layers(lerobot_policy, VLM_PREFIX))
    names = sorted({name.rpartition(".")[2] for name in usable})
    hint = (
        f"Use names among {names}, or None for attention and MLP of the whole VLM; action expert and projections are "
        "trained whole, without LoRA."
    )
    if wanted == _ALL_LINEAR:
        wanted = f"{re.escape(VLM_PREFIX)}.*"
    config = copy.copy(config)
    config.target_modules = wanted
    matched = [name for name in _linear_layers(lerobot_policy) if check_target_module_exists(config, name)]
    targets = [name for name in matched if name in usable]
    if isinstance(wanted, str):
        outside = [name for name in matched if not name.startswith(VLM_PREFIX)]
        if outside:
            raise ValueError(
                f"target_modules={wanted!r} matches {len(outside)} layers outside the VLM, such as {outside[0]}; "
                f"restrict the expression, for instance with .*paligemma\\. in front. {hint}"
            )
    else:
        for entry in sorted(wanted):
            if not any(name == entry or name.endswith(f".{entry}") for name in targets):
                raise ValueError(
                    f"target_modules entry {entry!r} adapts no layer of the VLM that the actions depend on. {hint}"
                )
    if not targets:
        raise ValueError(f"target_modules={wanted!r} adapts no layer of the VLM that the actions depend on. {hint}")
    return targets

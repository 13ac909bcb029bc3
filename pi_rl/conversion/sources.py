"""Opening the weights that are converted: safetensors, or the pickled state dict that RLinf writes."""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pi_rl.policies.checkpoints import policy_weights
from pi_rl.policies.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    StoredWeights,
    by_lerobots_names,
    some_of,
    stored_weights,
)
from pi_rl.policies.weights import type_name

PICKLES = ("model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt")
"""Where RLinf puts a checkpoint's weights, below the checkpoint's folder."""
_SUFFIXES = (".pt", ".pth")
_MARKS = {"pi0": "model.state_proj.weight", "pi05": "model.time_mlp_in.weight"}


@dataclass(frozen=True, eq=False)
class PickledWeights(StoredWeights):
    """Weights of a pickled state dict, mapped from its file.

    Attributes:
        state: Tensors by their names in the file.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Reads tensors; see `StoredWeights.read`."""
        for name in names:
            yield name, self.state[self.tensors[name].name].to(device)


def open_weights(source: Path) -> StoredWeights:
    """The weights of a checkpoint by LeRobot's names; other trainers' heads are set aside.

    Args:
        source: A folder with safetensors of either layout, an adapter-only folder, a checkpoint folder of RLinf, or
            one weight file. Pickles are read by PyTorch's restricted reader, which runs no code of the file.

    Raises:
        ValueError: If there are no weights, or files are damaged or do not belong together.
    """
    if source.is_file():
        if source.suffix in _SUFFIXES:
            return _pickled(source)
        if source.name in (WEIGHTS_FILE, INDEX_FILE):
            return stored_weights(source.parent)
        raise ValueError(f"{source} is no weight file; give {WEIGHTS_FILE}, a state dict in .pt, or their folder.")
    if not any((source / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        pickles = [source / name for name in PICKLES if (source / name).is_file()]
        if pickles:
            return _pickled(pickles[0])
    return policy_weights(source)


def checkpoint_folder(source: Path) -> Path | None:
    """The folder of the checkpoint that a source is, or is the weight file of.

    Args:
        source: A folder or a weight file.

    Returns:
        None for a file whose name and place belong to no layout: what else its folder holds may be of other models.
    """
    if source.is_dir():
        return source
    if source.name in (WEIGHTS_FILE, INDEX_FILE):
        return source.parent
    places = [source.parents[name.count("/")] for name in PICKLES if source.as_posix().endswith(f"/{name}")]
    return places[-1] if places else None  # the last one is the outermost


def kind_of(weights: StoredWeights) -> str:
    """Whether weights are π0's or π0.5's.

    Returns:
        "pi0" or "pi05".

    Raises:
        ValueError: If they are neither's.
    """
    for kind, name in _MARKS.items():
        if name in weights.tensors:
            return kind
    raise ValueError(
        f"{weights.source} holds neither π0 nor π0.5 in openpi's or LeRobot's names (its tensors are "
        f"{some_of(tensor.name for tensor in weights.tensors.values())}). Weights in JAX's or RLinf's own names "
        "(img.…, llm.…) have to be exported to openpi's PyTorch names first, with their tools."
    )


def _pickled(path: Path) -> PickledWeights:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read without running code from it, or is damaged ({str(error).splitlines()[0]}). Only "
            "plain state dicts are read; save one with torch.save(model.state_dict(), …), or safetensors."
        ) from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict: names with tensors.")
    other = [str(name) for name, value in state.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if other:
        raise ValueError(f"{path} holds more than a state dict: {some_of(other)}. Save the state dict by itself.")
    stored = {
        name: StoredTensor(path, name, tuple(tensor.shape), type_name(tensor.dtype)) for name, tensor in state.items()
    }
    named = by_lerobots_names(path, stored)
    return PickledWeights(path, named.tensors, named.set_aside, state)

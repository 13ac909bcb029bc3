"""Optimiser, schedule and random generators of a checkpoint as safetensors and JSON, which cannot run code.

optimizer.safetensors      the optimiser's tensors, `state.{index}.{name}` and `group.{index}.{name}`
optimizer.json             its parameter groups and what else of its state is no tensor
scheduler.json             state of the learning-rate schedule
rng_state_{rank}.json      generators of Python, NumPy and PyTorch of one process

What is read is bit for bit what was written.
"""

import base64
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi_rl.policies.weight_files import read_header
from pi_rl.policies.weights import read_tensors, write_tensors

OPTIMIZER_TENSORS, OPTIMIZER_VALUES, SCHEDULER_FILE = "optimizer.safetensors", "optimizer.json", "scheduler.json"
_TUPLE = "tuple"


def rng_file(rank: int | str) -> str:
    """Name of the file of a process's generators; "*" for a pattern of all."""
    return f"rng_state_{rank}.json"


def write_optimizer(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes an optimiser's state.

    Args:
        folder: Where the two files go.
        state: ``optimizer.state_dict()``, with whole tensors.

    Raises:
        ValueError: If it holds something that is neither a tensor nor a number, text, list, tuple or mapping.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "group": {}}
    parts = {"state": dict(state["state"]), "group": dict(enumerate(state["param_groups"]))}
    for kind, entries in parts.items():
        for index, named in entries.items():
            plain = values[kind][str(index)] = {}
            for name, value in named.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{name}"] = value
                else:
                    plain[name] = _encoded(value, f"the optimiser's {name}")
    write_tensors(folder / OPTIMIZER_TENSORS, tensors)
    write_json(folder / OPTIMIZER_VALUES, values)


def read_optimizer(folder: Path) -> dict[str, Any]:
    """What `write_optimizer` wrote, for ``optimizer.load_state_dict``; its tensors are mapped on the CPU.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    return _optimizer_state(folder, read_tensors(folder / OPTIMIZER_TENSORS, "optimiser state"))


def read_optimizer_layout(folder: Path) -> dict[str, Any]:
    """What `read_optimizer` reads, with a `StoredTensor` for every tensor; reads no tensors.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    return _optimizer_state(folder, read_header(folder / OPTIMIZER_TENSORS))


def check_plain_state(folder: Path) -> None:
    """Refuses an optimiser's, schedule's or generators' state that could not be loaded; reads no tensors.

    Args:
        folder: A checkpoint.

    Raises:
        ValueError: Naming the file.
    """
    state = read_optimizer_layout(folder)
    indices: list[Any] = []
    for group in state["param_groups"]:
        check_entries(folder / OPTIMIZER_VALUES, group, {"params": list})
        indices += group["params"]
    counted = indices == list(range(len(indices)))
    if not indices or not counted or not set(state["state"]) <= set(indices):
        raise ValueError(f"{folder / OPTIMIZER_VALUES} does not list the parameters that it has states of.")
    schedule = read_scheduler(folder)
    check_entries(folder / SCHEDULER_FILE, schedule, {"last_epoch": int, "_last_lr": list})
    for path in folder.glob(rng_file("*")):
        check_entries(path, read_json(path), {"python": list, "numpy": list, "torch": str})


def check_entries(path: Path, value: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuses a file's JSON object that lacks an entry or has one of another type.

    Args:
        path: The file, for messages.
        value: What it holds.
        types: The entries' types; a bool is no int here, and an int may not be negative.

    Raises:
        ValueError: Naming file and entry.
    """
    for name, kind in types.items():
        entry = value.get(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        fits = isinstance(entry, kinds) and (bool in kinds or not isinstance(entry, bool))
        if not fits or (isinstance(entry, int) and entry < 0):
            raise ValueError(f"{path} has {name}={entry!r:.80}, which does not fit; copy or download it again.")


def _optimizer_state(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a checkpoint's optimiser and its tensors, or what stands for them, in one."""
    stored = read_json(folder / OPTIMIZER_VALUES)
    try:
        parts = {
            kind: {int(index): _decoded(plain) for index, plain in stored[kind].items()} for kind in ("state", "group")
        }
        for key, tensor in tensors.items():
            kind, index, name = key.split(".", 2)
            parts[kind][int(index)][name] = tensor
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{OPTIMIZER_TENSORS} and {OPTIMIZER_VALUES} in {folder} do not fit together.") from error
    return {"state": parts["state"], "param_groups": [parts["group"][index] for index in sorted(parts["group"])]}


def write_scheduler(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes ``scheduler.state_dict()``.

    Raises:
        ValueError: If it holds more than numbers, texts, lists, tuples and mappings.
    """
    write_json(folder / SCHEDULER_FILE, _encoded(dict(state), "the schedule's state"))


def read_scheduler(folder: Path) -> dict[str, Any]:
    """What `write_scheduler` wrote.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    return _decoded(read_json(folder / SCHEDULER_FILE))


def generator_states() -> dict[str, Any]:
    """States of this process's global generators as plain values: Python, NumPy, PyTorch and its current GPU's."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _text(torch.random.get_rng_state()),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Sets the generators to what `generator_states` gave; a GPU's only where both have one."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.random.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def write_json(path: Path, value: Any) -> None:
    """Writes plain values, of which floats keep every bit."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file, which may hold NaN as logs of runs do.

    Raises:
        ValueError: If it is missing or damaged, or holds no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing in {path.parent}; give a complete checkpoint-N folder.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of the encoding
        raise ValueError(f"{path} is no readable JSON file ({error}); copy or download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}; copy or download it again.")
    return value


def _encoded(value: Any, what: str) -> Any:
    """The value for JSON, which knows no tuples."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(one, what) for one in value]}
    if isinstance(value, list):
        return [_encoded(one, what) for one in value]
    if isinstance(value, dict) and _TUPLE not in value and all(isinstance(key, str) for key in value):
        return {key: _encoded(one, what) for key, one in value.items()}
    raise ValueError(
        f"A checkpoint cannot hold {what}, a {type(value).__name__}: only tensors, numbers, texts, lists and mappings "
        "are saved. Use another optim or lr_scheduler_type."
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if isinstance(value, dict):
        if set(value) == {_TUPLE}:
            return tuple(_decoded(one) for one in value[_TUPLE])
        return {key: _decoded(one) for key, one in value.items()}
    return value


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

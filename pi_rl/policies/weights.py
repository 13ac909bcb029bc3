"""Reading and writing the tensors of a policy folder, with every mismatch reported and none ignored.

LeRobot's own `from_pretrained` prints a warning and returns random weights when a file is missing or does not fit.
Neither direction holds the weights twice: files are mapped or go to their device tensor by tensor, and are written so.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pi_rl.policies.weight_files import EXPERT_HEAD, UNUSED_HEADS, StoredTensor, StoredWeights, some_of, stored_weights

logger = logging.getLogger(__name__)

_DTYPES = {  # in the order in which safetensors lays tensors out
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}


def empty_like(stored: StoredTensor) -> Tensor:
    """A tensor of a stored one's shape and type on the meta device.

    Raises:
        ValueError: If its type is none that a policy is written in.
    """
    if stored.dtype not in _TYPES:
        raise ValueError(
            f"{stored.file} holds {stored.name} in {stored.dtype}; weights have a type of {list(_TYPES)}."
        )
    return torch.empty(stored.shape, dtype=_TYPES[stored.dtype], device="meta")


def type_name(dtype: torch.dtype) -> str:
    """The format's name of a tensor type."""
    return _DTYPES[dtype]


class Shaped(Protocol):
    """Anything with a shape: a tensor, or one that lies in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a safetensors file on the CPU.

    Args:
        path: The file.
        what: What it holds, for messages.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"No {what} in {path.parent}: {path.name} is missing. Give a folder that holds it.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or download it again.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], contents: Callable[[str], Tensor] | None = None) -> None:
    """Writes a safetensors file tensor by tensor, byte for byte as `safetensors.torch.save_file` would.

    At most one tensor is copied at a time, from its device or where it is not contiguous; tensors that share memory
    are written in full. The file is opened anew: give a temporary name and rename it where one of that name is mapped.

    Args:
        path: The file.
        tensors: By name, of a type that is in the format.
        contents: Gives a tensor by its name when it is written; `tensors` may then be on the meta device.

    Raises:
        ValueError: If a tensor's type has no name in the format.
    """
    other = sorted({str(tensor.dtype) for tensor in tensors.values()} - set(map(str, _DTYPES)))
    if other:
        raise ValueError(f"{path.name} cannot hold tensors of type {', '.join(other)}; convert them to float32.")
    rank = {dtype: position for position, dtype in enumerate(_DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                tensor = tensors[name] if contents is None else contents(name)
                plain = tensor.detach().to("cpu", tensors[name].dtype).contiguous()
                file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


def check_tensors(given: Mapping[str, Shaped], expected: Mapping[str, Shaped], source: str) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: Listing missing, unexpected and wrongly shaped tensors, the first five of each.
    """
    problems = {
        "missing": sorted(set(expected) - set(given)),
        "unexpected": sorted(set(given) - set(expected)),
        "wrong shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(set(expected) & set(given))
            if tuple(given[name].shape) != tuple(expected[name].shape)
        ],
    }
    if not any(problems.values()):
        return
    lines = [f"{source} does not fit the model; nothing was loaded."]
    for problem, names in problems.items():
        if names:
            lines.append(f"  {len(names)} {problem}: {some_of(names)}")
    lines.append("Check that config.json and the weights belong together.")
    raise ValueError("\n".join(lines))


def build_with_weights(
    build: Callable[[], nn.Module], stored: StoredWeights, device: torch.device | str = "cpu"
) -> nn.Module:
    """Builds a policy without allocating or drawing weights, then gives it stored ones.

    On the CPU, weights of the type that the model wants are views of the mapped files; what is written to them is
    private to this process. On another device each tensor goes there directly. The two language heads that π0 and π0.5
    never use stay mapped on the CPU in either case.

    Args:
        build: Constructs the policy; must leave it on the device it is built on.
        stored: The weights.
        device: Where weights and buffers go.

    Returns:
        The policy.

    Raises:
        ValueError: If the weights do not fit; no tensor has been read then.
    """
    with init_empty_weights(include_buffers=False):
        policy = build()
    expected = policy.state_dict()
    check_stored(stored, expected)
    used = [name for name in stored.tensors if name not in UNUSED_HEADS]
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.read(used, device):
        weights[name] = tensor.to(expected[name].dtype)
    for head in UNUSED_HEADS:  # each from a mapping of its own: a head may be the embedding's tensor in the file
        if head in stored.tensors:
            weights |= {name: tensor.to(expected[name].dtype) for name, tensor in stored.read([head])}
    if EXPERT_HEAD in expected and EXPERT_HEAD not in weights:
        weights[EXPERT_HEAD] = torch.zeros(expected[EXPERT_HEAD].shape, dtype=expected[EXPERT_HEAD].dtype)
    policy.load_state_dict(weights, strict=True, assign=True)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return policy


def load_weights(policy: nn.Module, folder: Path) -> None:
    """Copies a folder's weights into an existing policy, strictly, in place.

    Args:
        policy: LeRobot policy.
        folder: The policy folder.

    Raises:
        ValueError: If files are missing, damaged or do not fit; the policy is unchanged then.
    """
    stored = stored_weights(folder)
    check_stored(stored, policy.state_dict())
    for part in stored.groups():
        policy.load_state_dict(dict(stored.read(part)), strict=False)


def check_stored(stored: StoredWeights, expected: Mapping[str, Shaped]) -> None:
    """Compares names and shapes of stored weights with a policy's, and warns of heads that are set aside.

    Raises:
        ValueError: Listing missing, unexpected and wrongly shaped tensors.
    """
    optional = {EXPERT_HEAD} - set(stored.tensors)  # unused, and openpi has none: zeros stand for it
    check_tensors(stored.tensors, {n: t for n, t in expected.items() if n not in optional}, str(stored.source))
    if stored.set_aside:
        logger.warning(
            f"{stored.source} also holds {len(stored.set_aside)} tensors of another trainer's heads, which are not "
            f"used: {some_of(stored.set_aside)}. A critic or noise network starts anew."
        )


def flush_to_disk(path: Path) -> None:
    """Waits until a file or folder entry is on disk; some network and FUSE disks cannot do it for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)

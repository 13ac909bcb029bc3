"""Reading and writing the tensors of a policy folder, with every mismatch reported and none ignored.

LeRobot's own `from_pretrained` prints a warning and returns random weights when a file is missing or does not fit.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_LISTED = 5
_ROOT = "model."
_EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
_VLM_HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
_EXPERT_HEAD = "model.paligemma_with_expert.gemma_expert.lm_head.weight"


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a safetensors file; tensors that share memory are written in full."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    save_file(owned, path, metadata={"format": "pt"})


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
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
            if given[name].shape != expected[name].shape
        ],
    }
    if not any(problems.values()):
        return
    lines = [f"{source} does not fit the model; nothing was loaded."]
    for problem, names in problems.items():
        if names:
            more = f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            lines.append(f"  {len(names)} {problem}: {', '.join(names[:_LISTED])}{more}")
    lines.append("Check that config.json and the weights belong together.")
    raise ValueError("\n".join(lines))


def canonical_policy_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps the conventions of LeRobot and openpi files to LeRobot's full set of names.

    openpi keys lack the "model." prefix. Language embedding and language head are one tensor in PaliGemma, and
    files may hold either. Neither head is used by π0 or π0.5; an expert head that is absent becomes zeros.

    Args:
        tensors: The file's tensors.
        expected: The model's state dict, shapes only.
    """
    known = {name for name in tensors if name in expected or name.startswith(_ROOT)}
    named = {name if name in known else _ROOT + name: tensor for name, tensor in tensors.items()}
    for name, twin in ((_EMBEDDING, _VLM_HEAD), (_VLM_HEAD, _EMBEDDING)):
        if name in expected and name not in named and twin in named:
            named[name] = named[twin]
    if _EXPERT_HEAD in expected and _EXPERT_HEAD not in named:
        like = expected[_EXPERT_HEAD]
        named[_EXPERT_HEAD] = torch.zeros(like.shape, dtype=like.dtype)
    return named


def build_with_weights(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """Builds a policy without allocating or drawing weights, then gives it those of a file.

    Args:
        build: Constructs the policy; must leave it on the device it is built on.
        path: The safetensors file.

    Raises:
        ValueError: If the file is missing, damaged or does not fit.
    """
    tensors = read_tensors(path, "policy weights")
    with init_empty_weights(include_buffers=False):
        policy = build()
    expected = policy.state_dict()
    tensors = canonical_policy_tensors(tensors, expected)
    check_tensors(tensors, expected, str(path))
    owned = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    if _VLM_HEAD in owned and owned[_VLM_HEAD].data_ptr() == owned[_EMBEDDING].data_ptr():
        owned[_VLM_HEAD] = owned[_VLM_HEAD].clone()  # the model keeps two tensors; sharing one would train both
    policy.load_state_dict(owned, strict=True, assign=True)
    return policy


def load_weights(policy: nn.Module, path: Path) -> None:
    """Copies a file's weights into an existing policy, strictly, in place.

    Args:
        policy: LeRobot policy.
        path: The safetensors file.

    Raises:
        ValueError: If the file is missing, damaged or does not fit; the policy is unchanged then.
    """
    expected = policy.state_dict()
    tensors = canonical_policy_tensors(read_tensors(path, "policy weights"), expected)
    check_tensors(tensors, expected, str(path))
    policy.load_state_dict(tensors, strict=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file or folder entry is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Where the tensors of a policy lie on disk: one safetensors file, or shards with an index, in either layout.

LeRobot's layout    keys "model.…", one file
openpi's, RLinf's   keys without "model.", perhaps with a wrapper's "module." or "_fsdp_wrapped_module.", the language
                    embedding as `lm_head` alone, perhaps a value and a noise head; one file or shards

Only headers are read until a tensor is asked for, and then it is a private memory mapping of the file (on the CPU) or
goes straight to its device: nothing is held twice. A mapped file may be replaced by renaming another over it, which is
how this package and safetensors write; writing to the tensors changes memory, never the file.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LISTED = 5
_ROOT = "model."
_BACKBONE = "model.paligemma_with_expert."
EMBEDDING = f"{_BACKBONE}paligemma.model.language_model.embed_tokens.weight"
VLM_HEAD = f"{_BACKBONE}paligemma.lm_head.weight"
EXPERT_HEAD = f"{_BACKBONE}gemma_expert.lm_head.weight"
UNUSED_HEADS = (VLM_HEAD, EXPERT_HEAD)  # neither π0 nor π0.5 computes with them
_WRAPPERS = re.compile(r"(^module\.|(?<=\.)module\.|_fsdp_wrapped_module\.|_orig_mod\.)")
_OTHER_HEADS = ("value_head.", "noise_head.", "rlt_module.")
_GROUP_BYTES = 2**29


class StoredTensor(NamedTuple):
    """A tensor in a file: which file, its name there, its shape and safetensors' name of its type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in the file; the number ending the type's name is its bits."""
        bits = 8 if self.dtype == "BOOL" else int(re.sub(r"\D.*", "", self.dtype.lstrip("BFIUC")))
        return torch.Size(self.shape).numel() * bits // 8


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a policy folder by the model's names; nothing of them has been read.

    Attributes:
        source: The file or index, for messages.
        tensors: By the names of LeRobot's state dict.
        set_aside: Heads that belong to another trainer, by their names without wrappers.
    """

    source: Path
    tensors: Mapping[str, StoredTensor]
    set_aside: Mapping[str, StoredTensor] = field(default_factory=dict)

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Reads tensors, from mappings of their own.

        Args:
            names: Which ones, by the model's names.
            device: Where they go; on the CPU they are views of the mapped file.

        Yields:
            Name and tensor, file by file.
        """
        yield from read_stored({name: self.tensors[name] for name in names}, device)

    def groups(self) -> Iterator[list[str]]:
        """The names in parts of about half a GB, each of one file; the unused heads are on their own.

        A part that has been copied can be unmapped before the next is mapped.
        """
        names = sorted((name for name in self.tensors if name not in UNUSED_HEADS), key=lambda n: self.tensors[n][:2])
        part: list[str] = []
        size = 0
        for name in names:
            tensor = self.tensors[name]
            if part and (size + tensor.nbytes > _GROUP_BYTES or tensor.file != self.tensors[part[0]].file):
                yield part
                part, size = [], 0
            part.append(name)
            size += tensor.nbytes
        if part:
            yield part
        yield from ([name] for name in UNUSED_HEADS if name in self.tensors)


def read_stored(
    tensors: Mapping[str, StoredTensor], device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Reads tensors file by file; see `StoredWeights.read`."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    # safetensors knows "cpu", not the "cpu:0" that processes on CPUs are given
    place = "cpu" if torch.device(device).type == "cpu" else str(device)
    for file, listed in by_file.items():
        with safe_open(file, framework="pt", device=place) as handle:
            for name in listed:
                yield name, handle.get_tensor(tensors[name].name)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by their names, without reading them.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (no mapping)
            return {
                name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or download it again.") from error


def stored_weights(folder: Path) -> StoredWeights:
    """What a policy folder holds, by LeRobot's names.

    A folder with both a single file and an index is read as LeRobot and Transformers do: the single file counts.

    Args:
        folder: With `model.safetensors`, or with `model.safetensors.index.json` and its shards.

    Raises:
        ValueError: If files are missing or damaged, an index names paths or does not fit its shards, or two stored
            names stand for the same tensor.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return by_lerobots_names(single, read_header(single))
    if index.is_file():
        return by_lerobots_names(index, _read_shards(index))
    raise ValueError(
        f"No policy weights in {folder}: {WEIGHTS_FILE} is missing, and so is {INDEX_FILE} of sharded weights. Give a "
        "folder that holds either."
    )


def shards_of(index: Path) -> dict[str, str]:
    """An index's file name of each tensor.

    Raises:
        ValueError: If it is no index, or a file name is not a plain one of a safetensors file.
    """
    try:
        files = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r}); copy it again.") from error
    outside = sorted({file for file in files.values() if Path(file).name != file or not file.endswith(".safetensors")})
    if outside or not files:
        raise ValueError(
            f"{index} names {some_of(outside) or 'no files'}; it may name .safetensors files beside it only."
        )
    return files


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    file_of = shards_of(index)
    paths = {name: index.parent / name for name in sorted(set(file_of.values()))}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise ValueError(f"{index} names {len(missing)} of {len(paths)} files that are missing: {some_of(missing)}.")
    tensors: dict[str, StoredTensor] = {}
    for file, path in paths.items():
        header = read_header(path)
        promised = {name for name, named in file_of.items() if named == file}
        for problem, names in (("lacks", promised - set(header)), ("also holds", set(header) - promised)):
            if names:
                raise ValueError(
                    f"{path} does not fit {index.name}: it {problem} {len(names)} tensors, {some_of(sorted(names))}. "
                    "Copy all files of the checkpoint again."
                )
        tensors |= header
    return tensors


def by_lerobots_names(source: Path, stored: Mapping[str, StoredTensor]) -> StoredWeights:
    """Gives tensors of either layout LeRobot's names and sets the heads of other trainers aside.

    Args:
        source: The file or index, for messages.
        stored: Tensors by their names there.

    Raises:
        ValueError: If two stored names stand for the same tensor.
    """
    plain: dict[str, list[str]] = {}
    for name in stored:
        plain.setdefault(_WRAPPERS.sub("", name), []).append(name)
    lerobot = any(name.startswith(_ROOT) for name in plain)
    tensors: dict[str, StoredTensor] = {}
    aside: dict[str, StoredTensor] = {}
    for name, originals in plain.items():
        if len(originals) > 1:
            raise ValueError(f"{source} holds {some_of(originals)}, which are both {name}; remove one of them.")
        if not lerobot and name.startswith(_OTHER_HEADS):
            aside[name] = stored[originals[0]]
        else:
            tensors[name if lerobot else _ROOT + name] = stored[originals[0]]
    # PaliGemma's embedding and head are one tensor, and files may hold either
    for name, twin in ((EMBEDDING, VLM_HEAD), (VLM_HEAD, EMBEDDING)):
        if name not in tensors and twin in tensors:
            tensors[name] = tensors[twin]
    return StoredWeights(source, tensors, dict(sorted(aside.items())))


def some_of(names: Iterable[str]) -> str:
    """The first five names, and how many more there are, for messages."""
    listed = list(names)
    more = f", … and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more

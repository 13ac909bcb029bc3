"""Keeps policy inputs from rollout to update, where the update encodes the prefix again.

That is needed where the prefix is live, and chosen where prefixes find no room. An observation of two 224 × 224
cameras is 0.3 MB as uint8, a thirtieth of its keys and values in bfloat16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi_rl.policies.row_store import RowStore

_LEVELS = torch.arange(256, dtype=torch.float32) / 255.0  # what a uint8 pixel becomes in the policy's input


class ObservationStore(RowStore[dict[str, Tensor]]):
    """Grows row by row during the rollout, then answers `store[indices]` with a batch for `encode_prefix`.

    Float images whose every value is k / 255 are kept as uint8, so that rows come back bit for bit; others are kept
    as they are.

    Args:
        capacity: Expected number of rows; with too few the store doubles, which for a moment needs both copies.
        storage: "device", "host" or "disk".
        folder: Of the file of "disk".

    Raises:
        ValueError: If `capacity` is negative, `storage` unknown, or "disk" has no folder.
    """

    _noun = "Observation"
    _remedy = "Preprocess every observation in the same way"

    def __init__(self, capacity: int = 0, storage: str = "device", *, folder: str | Path | None = None):
        super().__init__(storage, capacity=capacity, folder=folder)
        self._packed: set[str] = set()  # images kept as uint8
        self._table = _LEVELS

    def close(self) -> None:
        """Gives the memory back and ends the thread; the store may be filled anew."""
        super().close()
        self._packed = set()

    def append(self, batch: Mapping[str, Any]) -> Tensor:
        """Stores the tensors of a preprocessed batch; texts and everything else that is no tensor are left out.

        Args:
            batch: B observations; every tensor has B rows.

        Returns:
            (B,) int64 indices of the stored rows, to be used with `store[indices]`.

        Raises:
            ValueError: If the batch has no tensors, unequal row counts, or names, shapes or types that differ from
                the stored ones.
        """
        tensors = {name: value.detach() for name, value in batch.items() if isinstance(value, Tensor)}
        counts = {name: len(tensor) if tensor.ndim else None for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1 or None in counts.values():
            raise ValueError(
                f"A batch needs tensors with one row per observation, got row counts {counts}; pass the output of the "
                "policy's preprocessor for a batch of observations."
            )
        pieces = {name: self._piece(name, tensor) for name, tensor in tensors.items()}
        unpacked = {name for name in self._packed & pieces.keys() if self._no_longer_packed(name, pieces[name])}
        for name in unpacked:
            self._convert(name, self._unpack)
        self._packed -= unpacked
        indices = self._store(pieces)
        if len(indices) == len(self):
            self._packed = {name for name, piece in pieces.items() if piece.dtype != tensors[name].dtype}
        return indices

    def _no_longer_packed(self, name: str, piece: Tensor) -> bool:
        """Whether an image kept as uint8 has to be kept in full from now on; shapes that do not fit change nothing."""
        return piece.dtype == torch.float32 and piece.shape[1:] == self._rows[name].shape[1:]

    def _piece(self, name: str, tensor: Tensor) -> Tensor:
        if self._rows and name not in self._packed:
            return tensor
        levels = _pack(tensor)
        return tensor if levels is None else levels

    def _answer(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._unpack(tensor) if name in self._packed else tensor for name, tensor in rows.items()}

    def _unpack(self, levels: Tensor) -> Tensor:
        if self._table.device != levels.device:
            self._table = _LEVELS.to(levels.device)
        return _values(levels, self._table)


def _pack(tensor: Tensor) -> Tensor | None:
    """The uint8 levels of a float32 image batch (B, 3, height, width), or None where that would lose something."""
    if tensor.ndim != 4 or tensor.dtype != torch.float32:
        return None
    levels = (tensor * 255.0).round().clamp(0, 255).to(torch.uint8)
    return levels if torch.equal(_values(levels, _LEVELS.to(levels.device)), tensor) else None


def _values(levels: Tensor, table: Tensor) -> Tensor:
    return table[levels.long()]  # a table, for GPUs divide with another rounding

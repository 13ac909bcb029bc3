"""Keeps policy inputs from rollout to update, for policies whose prefix is live.

An observation of two 224 × 224 cameras is 0.3 MB as uint8, a thirtieth of its keys and values in bfloat16.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LEVELS = torch.arange(256, dtype=torch.float32) / 255.0  # what a uint8 pixel becomes in the policy's input


class ObservationStore:
    """Grows row by row during the rollout, then answers `store[indices]` with a batch for `encode_prefix`.

    Float images whose every value is k / 255 are kept as uint8, so that rows come back bit for bit; others are kept
    as they are. Rows stay on the device they were given on. Memory is kept by `clear`.

    Args:
        capacity: Expected number of rows; with too few the store doubles, which for a moment needs both copies.

    Raises:
        ValueError: If `capacity` is negative.
    """

    def __init__(self, capacity: int = 0):
        if capacity < 0:
            raise ValueError(f"capacity={capacity} must not be negative; 0 lets the store grow by itself.")
        self.capacity = capacity
        self._rows: dict[str, Tensor] = {}
        self._packed: set[str] = set()  # images kept as uint8
        self._length = 0

    def __len__(self) -> int:
        """Number of stored observations."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Allocated memory in bytes."""
        return sum(rows.nbytes for rows in self._rows.values())

    def clear(self) -> None:
        """Forgets the rows and keeps the memory."""
        self._length = 0

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
        self._check(tensors)
        start = self._length
        end = start + len(next(iter(tensors.values())))
        packed = {name: _pack(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            levels = packed[name]
            if levels is None and name in self._packed:
                self._unpack(name)
            elif levels is not None and name not in self._rows:
                self._packed.add(name)
            piece = levels if name in self._packed and levels is not None else tensor
            self._reserve(name, piece, end)
            self._rows[name][start:end].copy_(piece)
        self._length = end
        return torch.arange(start, end)

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        """Gathers observations.

        Args:
            indices: (n,) int64 row indices on any device, repeats allowed.

        Returns:
            A batch of n observations (copies, never views), with the values and types that were appended.

        Raises:
            IndexError: If an index is outside the store.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._length:
            raise IndexError(
                f"Observation indices {int(indices.min())} … {int(indices.max())} are outside the {self._length} "
                "stored rows; pass indices that append() returned."
            )
        batch = {}
        for name, rows in self._rows.items():
            gathered = rows.index_select(0, indices.to(rows.device))
            batch[name] = _levels(gathered) if name in self._packed else gathered
        return batch

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        counts = {name: len(tensor) if tensor.ndim else None for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1 or None in counts.values():
            raise ValueError(
                f"A batch needs tensors with one row per observation, got row counts {counts}; pass the output of the "
                "policy's preprocessor for a batch of observations."
            )
        if not self._rows:
            return
        stored = {
            name: (tuple(rows.shape[1:]), torch.float32 if name in self._packed else rows.dtype)
            for name, rows in self._rows.items()
        }
        given = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()}
        if stored != given:
            raise ValueError(
                f"The store holds rows of {stored}, got {given}. Preprocess every observation in the same way, "
                "or use a new store."
            )

    def _reserve(self, name: str, piece: Tensor, needed: int) -> None:
        rows = self._rows.get(name)
        current = 0 if rows is None else len(rows)
        if needed <= current:
            return
        grown = piece.new_empty((max(needed, self.capacity, 2 * current), *piece.shape[1:]))
        if rows is not None:
            grown[: self._length].copy_(rows[: self._length])
        self._rows[name] = grown

    def _unpack(self, name: str) -> None:
        """From now on this image is kept in full."""
        self._packed.remove(name)
        self._rows[name] = _levels(self._rows[name])


def _pack(tensor: Tensor) -> Tensor | None:
    """The uint8 levels of a float32 image batch (B, 3, height, width), or None where that would lose something."""
    if tensor.ndim != 4 or tensor.dtype != torch.float32:
        return None
    levels = (tensor * 255.0).round().clamp(0, 255).to(torch.uint8)
    return levels if torch.equal(_levels(levels), tensor) else None


def _levels(levels: Tensor) -> Tensor:
    return _LEVELS.to(levels.device)[levels.long()]  # a table, for GPUs divide with another rounding

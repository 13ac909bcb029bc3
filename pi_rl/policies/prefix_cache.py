"""Keeps prefixes from rollout to update, so that the frozen VLM runs once per observation.

Recomputing the prefix is 91 to 99.6 % of an update's FLOPs at the published sizes, and one observation's
keys and values are about 18 kB per token in bfloat16.
"""

import torch
from torch import Tensor

from pi_rl.policies.flow_policy import Prefix, batch_axis

STORAGES = ("device", "host")


class PrefixStore:
    """Grows row by row during the rollout, then answers `store[indices]` on the compute device.

    Memory is kept by `clear`, so that later iterations allocate nothing.

    Args:
        storage: "device" keeps rows where they were computed; "host" in (pinned, with CUDA) host memory.
        device: Compute device of the answers; None means the device of the first prefix.
        capacity: Expected number of rows; with too few the store doubles, which for a moment needs both copies.
        kv_dtype: Storage type of keys and values; None keeps the model's. bfloat16 is lossless for a bfloat16 VLM.

    Raises:
        ValueError: If `storage` is unknown or `capacity` negative.
    """

    def __init__(
        self,
        storage: str = "device",
        *,
        device: torch.device | str | None = None,
        capacity: int = 0,
        kv_dtype: torch.dtype | None = None,
    ):
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r} is unknown; use one of {STORAGES}.")
        if capacity < 0:
            raise ValueError(f"capacity={capacity} must not be negative; 0 lets the store grow by itself.")
        self.storage = storage
        self.device = None if device is None else torch.device(device)
        self.capacity = capacity
        self.kv_dtype = kv_dtype
        self._rows: dict[str, Tensor] = {}  # (capacity, ...) each, sample axis first so that a row is contiguous
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

    def append(self, prefix: Prefix, rows: Tensor | None = None) -> Tensor:
        """Stores observations.

        Args:
            prefix: B observations.
            rows: Which of them to keep, (n,) indices or (B,) bool; None keeps all.

        Returns:
            (n,) int64 indices of the stored rows, to be used with `store[indices]`.

        Raises:
            ValueError: If the prefix differs in shape from the stored ones.
        """
        kept = prefix if rows is None else prefix.index(rows)
        if self.device is None:
            self.device = kept.pad_mask.device
        pieces = {name: self._sample_first(name, tensor) for name, tensor in kept.tensors()}
        self._check(pieces)
        start, end = self._length, self._length + len(kept)
        self._reserve(pieces, end)
        for name, piece in pieces.items():
            self._rows[name][start:end].copy_(piece)
        self._length = end
        return torch.arange(start, end)

    def __getitem__(self, indices: Tensor) -> Prefix:
        """Gathers observations on the compute device.

        Args:
            indices: (n,) int64 row indices on any device.

        Raises:
            IndexError: If an index is outside the store.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._length:
            raise IndexError(
                f"Prefix indices {int(indices.min())} … {int(indices.max())} are outside the {self._length} stored "
                "rows; pass indices that append() returned."
            )
        fields = {}
        for name, rows in self._rows.items():
            gathered = rows.index_select(0, indices.to(rows.device))
            if rows.is_pinned():
                gathered = gathered.pin_memory()
            gathered = gathered.to(self.device, non_blocking=True)
            fields[name] = gathered.movedim(0, batch_axis(name))
        return Prefix.of(fields)

    def _sample_first(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().movedim(batch_axis(name), 0)
        return tensor.to(self.kv_dtype) if name == "kv" and self.kv_dtype is not None else tensor

    def _check(self, pieces: dict[str, Tensor]) -> None:
        if not self._rows:
            return
        stored = {name: tuple(rows.shape[1:]) for name, rows in self._rows.items()}
        given = {name: tuple(piece.shape[1:]) for name, piece in pieces.items()}
        if stored != given:
            raise ValueError(
                f"The store holds rows of shapes {stored}, got {given}. Encode every observation with the same "
                "cameras and language length, or use a new store."
            )

    def _reserve(self, pieces: dict[str, Tensor], needed: int) -> None:
        current = len(next(iter(self._rows.values()))) if self._rows else 0
        if needed <= current:
            return
        size = max(needed, self.capacity, 2 * current)
        for name, piece in pieces.items():
            grown = self._allocate(size, piece)
            if self._length:
                grown[: self._length].copy_(self._rows[name][: self._length])
            self._rows[name] = grown

    def _allocate(self, size: int, like: Tensor) -> Tensor:
        shape = (size, *like.shape[1:])
        if self.storage == "device":
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        return torch.empty(shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())

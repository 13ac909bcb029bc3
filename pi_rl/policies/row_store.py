"""Rows that grow during the rollout and are answered by index in the update, the next ones read ahead."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi_rl.policies.row_memory import TIERS, allocate
from pi_rl.policies.transfer import Transfer

_CONVERTED_ROWS = 256  # at a time, where stored rows change their type


class RowStore[AnswerT]:
    """Named tensors with a row per observation; the base of the stores of prefixes and observations.

    Capacity is reserved at the first rows, and `clear` keeps it, so that later iterations allocate nothing. Answers
    are always copies. With rows outside the compute device, `prefetch` gathers the next answer on a thread of its own;
    on a GPU its copies overlap the computation.

    Args:
        storage: "device" keeps rows where they were computed; "host" in (pinned, with CUDA) host memory; "disk" in a
            nameless file mapped into memory.
        device: Compute device of the answers; None means the device of the first rows.
        capacity: Expected number of rows; with too few the store doubles, which for a moment needs both copies.
        folder: Of the file of "disk".

    Raises:
        ValueError: If `storage` is unknown, `capacity` negative, or "disk" has no folder.
    """

    _noun = "Row"
    _remedy = "Store equal rows"

    def __init__(
        self,
        storage: str = "device",
        *,
        device: torch.device | str | None = None,
        capacity: int = 0,
        folder: str | Path | None = None,
    ):
        if storage not in TIERS:
            raise ValueError(f"storage={storage!r} is unknown; use one of {TIERS}.")
        if capacity < 0:
            raise ValueError(f"capacity={capacity} must not be negative; 0 lets the store grow by itself.")
        if storage == "disk" and folder is None:
            raise ValueError("storage='disk' needs a folder for its file; pass folder=.")
        self.storage = storage
        self.device = None if device is None else torch.device(device)
        self.capacity = capacity
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, Tensor] = {}  # (capacity, ...) each, sample axis first so that a row is contiguous
        self._length = 0
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[Tensor, Future[Any]] | None = None
        self._transfer: Transfer | None = None

    def __len__(self) -> int:
        """Number of stored observations."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Allocated memory in bytes, or file space."""
        return sum(rows.nbytes for rows in self._rows.values())

    def clear(self) -> None:
        """Forgets the rows and keeps the memory."""
        self._settle()
        self._length = 0

    def close(self) -> None:
        """Gives the memory back and ends the thread; the store may be filled anew."""
        self._settle()
        if self._thread is not None:
            self._thread.shutdown()
        self._rows, self._length, self._thread, self._transfer = {}, 0, None, None

    def prefetch(self, indices: Tensor) -> None:
        """Begins to gather what ``store[indices]`` will be asked for next; nothing where rows are at hand.

        Args:
            indices: (n,) int64 row indices on any device; a copy is kept.

        Raises:
            IndexError: If an index is outside the store.
        """
        self._settle()
        if self.storage == "device":
            return
        wanted = self._checked(indices).clone()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead = (wanted, self._thread.submit(self._fetch, wanted))

    def __getitem__(self, indices: Tensor) -> AnswerT:
        """Gathers observations on the compute device, or waits for them where they were prefetched.

        Args:
            indices: (n,) int64 row indices on any device, repeats allowed.

        Returns:
            n observations (copies, never views of the store), as they were appended.

        Raises:
            IndexError: If an index is outside the store.
        """
        wanted = self._checked(indices)
        ahead, self._ahead = self._ahead, None
        # a fetch for other rows is waited for too: its errors must not be lost, nor two fetches run at once
        fetched: Any = None if ahead is None else ahead[1].result()
        if ahead is None or not torch.equal(ahead[0], wanted):
            fetched = self._fetch(wanted)
        return self._answer(fetched if self._transfer is None else self._transfer.receive(*fetched))

    def _answer(self, rows: dict[str, Tensor]) -> AnswerT:
        """What a caller gets for gathered rows, (n, …) each."""
        raise NotImplementedError

    def _store(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Appends rows, (n, …) each, and returns their indices."""
        self._settle()
        self._check(pieces)
        if self.device is None:
            self.device = next(iter(pieces.values())).device
        if self.storage != "device" and self.device.type == "cuda" and self._transfer is None:
            self._transfer = Transfer(self.device)
        start, end = self._length, self._length + len(next(iter(pieces.values())))
        self._reserve(pieces, end)
        for name, piece in pieces.items():
            self._rows[name][start:end].copy_(piece)
        self._length = end
        return torch.arange(start, end)

    def _convert(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Stored rows of one name in another form, for instance of another type."""
        self._settle()
        rows = self._rows[name]
        like = change(rows[:1])
        changed = allocate(self.storage, (len(rows), *like.shape[1:]), like, self.folder)
        for start in range(0, self._length, _CONVERTED_ROWS):
            part = slice(start, min(start + _CONVERTED_ROWS, self._length))
            changed[part].copy_(change(rows[part]))
        self._rows[name] = changed

    def _fetch(self, indices: Tensor) -> Any:
        """Rows, (n, …) each; with a transfer they come with the event after which they are there."""
        if self._transfer is not None:
            return self._transfer.send(self._rows, indices)
        # new memory, not a buffer used again: autograd may need what a caller still holds
        return {name: rows.index_select(0, indices.to(rows.device)) for name, rows in self._rows.items()}

    def _settle(self) -> None:
        """Ends what reads the rows, before they change."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()
        if self._transfer is not None:
            self._transfer.finish()

    def _checked(self, indices: Tensor) -> Tensor:
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._length:
            raise IndexError(
                f"{self._noun} indices {int(indices.min())} … {int(indices.max())} are outside the {self._length} "
                "stored rows; pass indices that append() returned."
            )
        return indices

    def _check(self, pieces: Mapping[str, Tensor]) -> None:
        if not self._rows:
            return
        stored = {name: (tuple(rows.shape[1:]), rows.dtype) for name, rows in self._rows.items()}
        given = {name: (tuple(piece.shape[1:]), piece.dtype) for name, piece in pieces.items()}
        if stored != given:
            raise ValueError(f"The store holds rows of {stored}, got {given}. {self._remedy}, or use a new store.")

    def _reserve(self, pieces: Mapping[str, Tensor], needed: int) -> None:
        current = len(next(iter(self._rows.values()))) if self._rows else 0
        if needed <= current:
            return
        size = max(needed, self.capacity, 2 * current)
        for name, piece in pieces.items():
            grown = allocate(self.storage, (size, *piece.shape[1:]), piece, self.folder)
            if self._length:
                grown[: self._length].copy_(self._rows[name][: self._length])
            self._rows[name] = grown

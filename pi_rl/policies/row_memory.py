"""Where rows lie: memory of the compute device, pinned host memory, or a nameless file mapped into memory."""

import errno
import math
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

TIERS = ("device", "host", "disk")


def allocate(tier: str, shape: tuple[int, ...], like: Tensor, folder: Path | None = None) -> Tensor:
    """Uninitialised rows of ``like``'s type.

    Args:
        tier: "device" is where ``like`` is; "host" is pinned where CUDA is; "disk" is a file mapped into memory.
        shape: (rows, …).
        like: Gives type and device.
        folder: Of the file; made if missing. It never holds anything one could see: the file has no name, so that the
            space is free again when the rows are dropped and when the process ends, however it ends.

    Raises:
        ValueError: If the tier is unknown, or "disk" comes without a folder.
        RuntimeError: If the disk has too little space or host memory cannot be pinned.
    """
    if tier not in TIERS:
        raise ValueError(f"storage={tier!r} is unknown; use one of {TIERS}.")
    if tier == "device":
        return like.new_empty(shape)
    if tier == "host":
        rows = torch.empty(shape, dtype=like.dtype)
        if torch.cuda.is_available():
            _pin(rows)
        return rows
    if folder is None:
        raise ValueError("storage='disk' needs a folder for its file; pass folder=.")
    return _map(shape, like.dtype, folder)


def _pin(rows: Tensor) -> None:
    """Registers the memory as it is: PyTorch's own pinned allocator rounds sizes up to the next power of two."""
    if rows.nbytes == 0:
        return
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(rows.data_ptr(), rows.nbytes, 0))
    if status:
        raise RuntimeError(
            f"CUDA cannot pin {rows.nbytes / 1e9:,.1f} GB of host memory (error {status}); set prefix_storage to disk "
            "or recompute, or collect fewer observations per iteration."
        )
    weakref.finalize(rows, runtime.cudaHostUnregister, rows.data_ptr())


def _map(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a page that finds no space later would kill the process
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise RuntimeError(
                f"{folder} has no room for {size / 1e9:,.3f} GB of stored prefixes ({error.strerror}); set "
                "prefix_storage_dir to a larger disk, prefix_storage to recompute, or collect fewer observations per "
                "iteration."
            ) from error
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)

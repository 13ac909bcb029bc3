"""Whether a run can write its checkpoints: before it begins, and what to say when the disk is full."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

logger = logging.getLogger(__name__)
_MOMENTS = 8  # bytes of AdamW's two moments in float32


class NotWritten(OSError):
    """A policy or checkpoint could not be written; what was there before is intact."""


def check_output_folder(folder: str | Path) -> None:
    """Makes the output folder and writes into it.

    Args:
        folder: The run's ``output_dir``.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise ValueError(
            f"output_dir={str(folder)!r} cannot be written to ({error.strerror or error}); give a folder on a disk "
            "that can, or change its permissions."
        ) from error


def checkpoint_bytes(model: nn.Module) -> int:
    """About how many bytes a checkpoint of a model takes: weights, and AdamW's moments of those that are trained.

    Args:
        model: Policy and heads, whole or sharded.
    """
    parameters = list(model.parameters())
    moments = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _MOMENTS
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters) + moments


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written to the disk of a folder, or of the nearest folder above it that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def warn_about_low_disk(folder: Path, size: int, kept: int) -> None:
    """Says at the start when the disk will not hold a run's checkpoints.

    Args:
        folder: The run's ``output_dir``.
        size: Bytes of a checkpoint.
        kept: How many are on the disk at once at most, one that is being written included.
    """
    free = free_bytes(folder)
    if size * kept > free:
        logger.warning(
            f"Little room in {folder}: {kept} checkpoint(s) of about {megabytes(size)} are kept at once, "
            f"{megabytes(size * kept)} in all, and {megabytes(free)} are free. Make room, lower save_total_limit, or "
            "give another output_dir."
        )


def why_not_written(name: str, folder: Path, error: Exception, size: int) -> str:
    """What failed, and how much space is needed and free.

    Args:
        name: Of the checkpoint or policy folder.
        folder: Where it was to be.
        error: What the system said.
        size: Bytes of a checkpoint.
    """
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return (
        f"{name} could not be written to {folder}: {reason}. It takes about {megabytes(size)}; "
        f"{megabytes(free_bytes(folder))} are free there."
    )


def megabytes(size: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"

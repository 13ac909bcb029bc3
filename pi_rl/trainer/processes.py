"""What the processes of one run tell each other: decisions of the first, problems of any, files that one lacks."""

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")
_PIECE = 32 * 2**20  # bytes that travel at once
_PROBE = 2**20  # bytes at a file's two ends that tell whether two files are the same


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


def process_count() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_cpu_processes(backend: str | None, timeout_s: float) -> None:
    """Starts the process group of a run on CPUs with its time limit, which transformers gives to GPUs only.

    Args:
        backend: ``ddp_backend``; None lets accelerate choose.
        timeout_s: ``ddp_timeout``, seconds that a collective call waits for the slowest process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=True, backend=backend, timeout=timedelta(seconds=timeout_s))


@contextmanager
def naming_lost_processes(timeout_s: float) -> Iterator[None]:
    """Says what it means for this process that a collective call has failed.

    Args:
        timeout_s: ``ddp_timeout``.

    Raises:
        ProcessLost: Instead of what the library raised.
    """
    try:
        yield
    except RuntimeError as error:
        if process_count() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ProcessLost(
            f"Process {dist.get_rank()}: another process of this run has ended, or has not answered for "
            f"ddp_timeout={timeout_s:g} s; what it printed says why. This one ends too. The run's checkpoints are "
            "intact: resume_from_checkpoint=True goes on from the newest."
        ) from error


def leave_process_group() -> None:
    """Ends this process's part in a distributed run; its threads would abort an interpreter that ends first."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first_decides[T](decide: Callable[[], T]) -> T:
    """Runs something on the first process alone and gives its result to all; a collective call.

    Args:
        decide: Returns what can be pickled.

    Raises:
        ValueError: On every process when it fails on the first, which raises its own error; a process that went on
            alone would wait for the others until the time limit.
    """
    if process_count() == 1:
        return decide()
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as caught:  # of any kind: the others wait
            error, outcome[1] = caught, str(caught)
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def all_succeed[T](act: Callable[[], T]) -> T:
    """Runs something on every process and fails on all of them when it fails on one; a collective call.

    Raises:
        ValueError: Where others failed, naming the first of them and its computer; a process that failed itself raises
            its own error.
    """
    if process_count() == 1:
        return act()
    result: Any = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:  # of any kind: the others wait
        error = caught
    reports: list[Any] = [None] * process_count()
    dist.all_gather_object(reports, None if error is None else (socket.gethostname(), str(error)))
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise ValueError(f"Process {rank} on {report[0]} failed: {report[1]}")
    return result


@contextmanager
def reachable(folder: str | Path, device: torch.device) -> Iterator[Path]:
    """The first process's folder where this process can read it, until the block ends; collective calls.

    Where the same path holds the same files, on one computer or a shared disk, it is that path. Every computer that
    lacks them gets a temporary copy, sent over the network by the first process.

    Args:
        folder: A folder that the first process has.
        device: Where the process group's tensors have to lie.

    Yields:
        The folder or its copy.

    Raises:
        ValueError: If the first process has no such folder.
    """
    folder = Path(folder)
    if process_count() == 1:
        yield folder
        return
    files = first_decides(lambda: _fingerprints(folder))
    host = socket.gethostname()
    states: list[Any] = [None] * process_count()
    dist.all_gather_object(states, (host, folder.is_dir() and _fingerprints(folder) == files))
    lacking = [rank for rank, (_, has) in enumerate(states) if not has]
    if not lacking:
        yield folder
        return
    receivers = {states[rank][0]: rank for rank in reversed(lacking)}  # the first of each computer
    copy = Path(tempfile.mkdtemp(prefix="pi_rl-")) if receivers.get(host) == dist.get_rank() else None
    try:
        _send(folder, files, copy, device)
        copies: list[Any] = [None] * process_count()
        dist.all_gather_object(copies, copy)
        yield copies[receivers[host]] if dist.get_rank() in lacking else folder
    finally:
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)


def _fingerprints(folder: Path) -> list[tuple[str, int, str]]:
    """Every file's name, size and a digest of its two ends."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist where the first process runs; give a folder that it can read.")
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_PROBE))
            file.seek(max(0, size - _PROBE))
            digest.update(file.read(_PROBE))
        found.append((path.relative_to(folder).as_posix(), size, digest.hexdigest()))
    return found


def _send(folder: Path, files: list[tuple[str, int, str]], copy: Path | None, device: torch.device) -> None:
    """Broadcasts files from the first process; who has a ``copy`` folder writes them there."""
    for name, size, _ in files:
        source = (folder / name).open("rb") if dist.get_rank() == 0 else None
        target = None
        if copy is not None:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            target = (copy / name).open("wb")
        for start in range(0, size, _PIECE):
            length = min(_PIECE, size - start)
            if source is None:
                piece = torch.empty(length, dtype=torch.uint8, device=device)
            else:
                piece = torch.frombuffer(bytearray(source.read(length)), dtype=torch.uint8).to(device)
            dist.broadcast(piece, src=0)
            if target is not None:
                target.write(piece.cpu().numpy().tobytes())
        for file in (source, target):
            if file is not None:
                file.close()

"""Worker processes as their parent sees them: started, asked, listened to, given up when they die or hang."""

import errno
import logging
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.interpreters import worker_command

logger = logging.getLogger(__name__)
CLOSE_TIMEOUT_S = 5.0
DEFAULT_TIMEOUT_S = 300.0
START_TIMEOUT_S = 900.0
STDERR_TAIL_CHARACTERS = 2000
_TAIL_BYTES = 4 * STDERR_TAIL_CHARACTERS
_LISTEN_S = 1.0
_DUMP_S = 0.5
_SAME_ERROR: dict[str, type[Exception]] = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}
"""Errors of a worker whose message says all; of others the traceback is shown too."""


class WorkerLostError(RuntimeError):
    """A worker process died, or hung and was killed.

    Attributes:
        last_words: End of what it printed; of one that hung, where it hung.

    Args:
        problem: What happened to it.
        last_words: As above.
    """

    def __init__(self, problem: str, last_words: str) -> None:
        super().__init__(problem)
        self.last_words = last_words or "(nothing)"


@dataclass(eq=False)
class Answer:
    """What a worker will say to a command that was sent.

    Attributes:
        worker: Its number.
        slots: Environments that the command concerns.
        value: What it said.
        lost: Why it will never answer; empty while it may.
    """

    worker: int
    slots: list[int]
    value: Any = None
    lost: str = ""
    arrived: bool = False


@dataclass(eq=False)
class WorkerProcess:
    """One worker; it answers in the order of the commands.

    Attributes:
        index: Its number, from 0.
        popen: The process.
        connection: Our end of its socket.
        stderr: What it prints.
        pulse: int64 (), shared: it counts up with every simulator call that returns.
        limit_s: Seconds without answer or pulse after which it is given up; see :meth:`limit`.
        expected: Answers to come.
    """

    index: int
    popen: subprocess.Popen[bytes]
    connection: Connection
    stderr: IO[bytes]
    pulse: NDArray[np.int64]
    limit_s: float
    expected: deque[Answer] = field(default_factory=deque)
    _silent_s: float = 0.0
    _last_pulse: int = 0

    def limit(self, seconds: float) -> None:
        """Sets ``limit_s``, also for one that stops in the middle of a message."""
        self.limit_s = seconds
        value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        with socket.fromfd(self.connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as ours:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, value)

    def send(self, message: Any) -> None:
        """Sends a message; that the worker is dead is found when it is listened to."""
        try:
            self.connection.send(message)
        except OSError:
            pass

    def receive(self) -> Any:
        """The next message, which is waited for.

        Raises:
            WorkerLostError: The worker died, or stopped in the middle of the message.
        """
        self._silent_s = 0.0
        try:
            return self.connection.recv()
        except BlockingIOError:
            raise self._given_up(hung=True) from None
        except (EOFError, OSError):
            raise self._given_up() from None

    def note_silence(self, seconds: float) -> None:
        """Notes that nothing came for some seconds.

        Only time that we spent waiting counts, so neither a computer that slept nor a busy parent looks like a hang.

        Raises:
            WorkerLostError: The worker is dead, or it said and did nothing for longer than its limit.
        """
        if self.popen.poll() is not None:  # a process that it forked may hold the socket open
            raise self._given_up()
        pulse = int(self.pulse)
        self._silent_s = 0.0 if pulse != self._last_pulse else self._silent_s + seconds
        self._last_pulse = pulse
        if self._silent_s >= self.limit_s:
            raise self._given_up(hung=True)

    def kill(self) -> None:
        """Ends the process at once; one that the kernel does not let go, as of a dead disk, is left to itself."""
        self.popen.kill()
        try:
            self.popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                f"worker process {self.index} (pid {self.popen.pid}) did not end {CLOSE_TIMEOUT_S:g} s after it was "
                "killed: it waits in the kernel for a device or a disk. It is left to itself."
            )

    def _given_up(self, *, hung: bool = False) -> WorkerLostError:
        """The error that tells of a worker whose process and files are gone."""
        try:
            if hung:
                self.popen.send_signal(signal.SIGUSR1)  # has it print where it is: see pi_rl.envs.worker.main
                self.popen.wait(_DUMP_S)
            else:
                self.popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        code = self.popen.poll()
        self.kill()
        problem = _how_it_ended(code)
        if hung:
            problem = f"did not answer for {self.limit_s:g} s, with not one call of the simulator returning"
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - _TAIL_BYTES))
        tail = self.stderr.read().decode(errors="replace")[-STDERR_TAIL_CHARACTERS:].strip()
        error = WorkerLostError(f"worker process {self.index} (pid {self.popen.pid}) {problem}", tail)
        self.connection.close()
        self.stderr.close()
        return error


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "closed its connection and went on running"
    if code >= 0:
        return f"ended with exit code {code}"
    hint = "; often lack of memory" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.strsignal(-code)}{hint})"


def listen(workers: Sequence[WorkerProcess]) -> list[tuple[WorkerProcess, Any]]:
    """Waits a moment for messages.

    Args:
        workers: Those that owe an answer.

    Returns:
        Workers and their messages, in the order given; `WorkerLostError` in place of the message of one that is lost.
    """
    began = time.monotonic()
    limit = min(_LISTEN_S, *(worker.limit_s for worker in workers)) if workers else 0.0
    ready = wait([worker.connection for worker in workers], limit)
    waited = min(time.monotonic() - began, limit)
    heard: list[tuple[WorkerProcess, Any]] = []
    for worker in workers:
        try:
            if worker.connection in ready:
                heard.append((worker, worker.receive()))
            else:
                worker.note_silence(waited)
        except WorkerLostError as lost:
            heard.append((worker, lost))
    return heard


def said(answers: Iterable[Answer]) -> dict[int, Any]:
    """What the workers that answered said, by environment."""
    return {slot: value for answer in answers if not answer.lost for slot, value in answer.value.items()}


def lost_in(answers: Iterable[Answer]) -> dict[int, str]:
    """What went wrong where a worker was lost, by environment that the command concerned."""
    return {slot: answer.lost for answer in answers if answer.lost for slot in answer.slots}


def result_of(worker: WorkerProcess, message: Any) -> Any:
    """The result in a worker's message.

    Raises:
        ValueError: The worker refused a value.
        FileNotFoundError: The worker misses a file.
        RuntimeError: Another error in the worker, with its traceback.
    """
    status, *rest = message
    if status == "ok":
        return rest[0]
    kind, text, trace = rest
    if kind in _SAME_ERROR:
        raise _SAME_ERROR[kind](text)
    raise RuntimeError(f"worker {worker.index} failed with {kind}: {text}\n{trace}")


@dataclass
class Launcher:
    """Starts workers, the first ones and those that take their place.

    Attributes:
        python: Interpreter.
        environment: Variables of the processes.
        memory: Unlinked file of the shared arrays.
        config: First message to each worker, without its number.
        pulses: int64 (n,), the shared counters of all workers.
    """

    python: str
    environment: Mapping[str, str]
    memory: IO[bytes]
    config: Mapping[str, Any]
    pulses: NDArray[np.int64]

    def start(self, index: int) -> WorkerProcess:
        """Starts a worker and returns at once; its first message says whether it is ready."""
        ours, theirs = socket.socketpair()
        fds = theirs.fileno(), self.memory.fileno()
        with theirs:
            stderr = tempfile.TemporaryFile()
            popen = subprocess.Popen(
                [*worker_command(self.python), *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=self.environment,
            )
        pulse = self.pulses[index : index + 1].reshape(())
        worker = WorkerProcess(index, popen, Connection(ours.detach()), stderr, pulse, START_TIMEOUT_S)
        worker.limit(START_TIMEOUT_S)
        worker.send({**self.config, "index": index})
        return worker


def stop_workers(workers: list[WorkerProcess], memory: IO[bytes], owner: int) -> None:
    """Ends all workers and frees what they and their parent share.

    Args:
        workers: The workers; some may be dead.
        memory: File of the shared arrays.
        owner: Process id of the parent.
    """
    if os.getpid() != owner:
        return  # a fork of the owner ends: the workers are not its own
    alive = [worker for worker in workers if worker.popen.returncode is None]
    for worker in alive:
        worker.send(("close", ()))
        worker.connection.close()
    for worker in alive:
        try:
            worker.popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            worker.kill()
        worker.stderr.close()
    memory.close()


def shared_out(groups: Sequence[Sequence[int]], num_workers: int) -> list[list[int]]:
    """Environments of each worker, which serves one group; several where there are more groups than workers."""
    served: list[list[int]] = [[] for _ in range(num_workers)]
    for number, group in enumerate(groups):
        mine = range(number % num_workers, num_workers, min(len(groups), num_workers))
        for position, slot in enumerate(group):
            served[mine[position % len(mine)]].append(slot)
    return served


def anonymous_file(size: int) -> IO[bytes]:
    """An unlinked temporary file of that size, in memory if there is room for it."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        file = tempfile.TemporaryFile(dir=shared)
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a sparse file on a full /dev/shm would kill us on writing
            return file
        except OSError as error:
            file.close()
            if error.errno != errno.ENOSPC:
                raise
    file = tempfile.TemporaryFile()
    os.posix_fallocate(file.fileno(), 0, size)
    return file

"""A vector environment whose simulators live in worker processes, with observations and actions in shared memory."""

import errno
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.failures import FailureLog
from pi_rl.envs.interpreters import worker_command, worker_environment
from pi_rl.envs.renderer import child_environment, choose_renderer
from pi_rl.envs.vector_env import (
    NO_CHUNK,
    STATE_KEY,
    TASK_KEY,
    ChunkResult,
    EnvSpec,
    ExpertEpisode,
    ExpertRequest,
    Observation,
    ResetIds,
    VectorEnv,
    check_actions,
    check_active,
    check_groups_of_envs,
    check_idle,
    check_indices,
    check_reset,
)
from pi_rl.envs.worker import Layout

CLOSE_TIMEOUT_S = 5.0
STDERR_TAIL_CHARACTERS = 2000
_SAME_ERROR: dict[str, type[Exception]] = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}
"""Errors of a worker whose message says all; of others the traceback is shown too."""


@dataclass(eq=False)
class _Answer:
    """What a worker will say to a command that was sent."""

    value: Any = None
    arrived: bool = False


@dataclass(eq=False)
class _Process:
    """One worker as the parent sees it; it answers in the order of the commands."""

    index: int
    popen: subprocess.Popen[bytes]
    connection: Connection
    stderr: IO[bytes]
    expected: deque[_Answer] = field(default_factory=deque)

    def stderr_tail(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace")[-STDERR_TAIL_CHARACTERS:].strip()


@dataclass
class _Chunk:
    """A chunk that was started: active environments, its length, those that could not start, and what to wait for."""

    mask: NDArray[np.bool_]
    length: int
    stillborn: dict[int, str]
    answers: list[tuple[_Process, _Answer]]


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_num_workers(num_envs: int) -> int:
    """Returns one worker per core this process may use, at most one per environment."""
    return max(1, min(num_envs, available_cores()))


class WorkerVectorEnv(VectorEnv):
    """Environments spread over processes: environment i lives in worker i modulo the number of workers.

    With groups (`arrange`) each of them has workers of its own, where there are enough. Results do not depend on the
    number of workers or on groups. Workers are plain child processes rather than `multiprocessing`
    ones, which would import the user's main module, and with it torch, in each of them. They start in the background:
    the constructor returns at once and the first command waits for them.

    Attributes:
        spec: What a policy must know.
        num_envs: B.
        num_workers: Worker processes.
    """

    def __init__(
        self,
        spec: EnvSpec,
        simulator: str,
        options: Mapping[str, Any],
        num_envs: int,
        num_workers: int | None = None,
        python: str = sys.executable,
    ):
        """Starts the worker processes.

        Args:
            spec: Description of the environment.
            simulator: Key of `pi_rl.envs.worker.BACKENDS`, or "module:Class" of a `pi_rl.envs.simulator.Backend`; the
                module must be importable here, or through `PYTHONPATH` by the `python` given.
            options: Plain values for the simulator's backend.
            num_envs: B, at least 1.
            num_workers: Processes; None means one per core. More than `num_envs` are never started.
            python: Interpreter of the workers, where a simulator needs another one; pi_rl itself needs numpy there.

        Raises:
            ValueError: A count below 1.
            RuntimeError: No off-screen renderer works (with the command that installs one).
        """
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1 (or None for one per core), got {num_workers}")
        self.spec = spec
        self.num_envs = num_envs
        self.num_workers = default_num_workers(num_envs) if num_workers is None else min(num_workers, num_envs)
        layout = Layout(num_envs, spec.max_episode_steps, spec.action_dim, spec.state_dim, dict(spec.cameras))
        environment = worker_environment(python, child_environment(choose_renderer()))
        with _anonymous_file(layout.nbytes()) as file:
            self._arrays = layout.arrays(mmap.mmap(file.fileno(), 0))
            self._workers = [_start_worker(i, python, file.fileno(), environment) for i in range(self.num_workers)]
        self._finalizer = weakref.finalize(self, _stop_workers, self._workers, os.getpid())
        self._slots = _shared_out([list(range(num_envs))], self.num_workers)
        self._chunks: deque[_Chunk] = deque()
        self._busy = np.zeros(num_envs, bool)
        self._ids = np.zeros((num_envs, 2), np.int64)
        self._paid = np.zeros(num_envs)  # rewards of the running episode
        self._failures = FailureLog(spec, num_envs)
        self._stillborn: dict[int, str] = {}  # environments whose episode could not start: what went wrong
        self._ever_reset = np.zeros(num_envs, bool)
        self._running = np.zeros(num_envs, bool)
        self._started = False
        self._rolling_out = False
        config = {
            "simulator": simulator,
            "tasks": list(spec.tasks),
            "options": dict(options),
            "layout": asdict(layout),
            "max_episode_steps": spec.max_episode_steps,
            "path": [str(Path(entry).resolve()) for entry in sys.path] if python == sys.executable else [],
        }
        for worker in self._workers:
            self._send(worker, config)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.popen.pid for worker in self._workers]

    def reset(self, ids: ResetIds, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Observation:
        """Starts episodes; see `VectorEnv.reset`."""
        array, slots = check_reset(ids, indices, self.num_envs, self.spec)
        check_idle(slots, self._busy)
        self._arrays["reset_ids"][slots] = array
        answers = self._wait(self._ask("reset", slots))
        chosen = set(slots.tolist())
        self._stillborn = {slot: problem for slot, problem in self._stillborn.items() if slot not in chosen}
        self._stillborn.update(_merged(answers))
        self._ids[slots], self._paid[slots] = array, 0.0
        self._running[slots] = self._ever_reset[slots] = True
        return self._observation()

    def arrange(self, groups: Sequence[Sequence[int] | NDArray[np.int64]]) -> None:
        """Gives each group workers of its own; see `VectorEnv.arrange`.

        With fewer workers than groups, groups share them, and a command waits for those before it.

        Raises:
            ValueError: The groups are not all environments once.
            RuntimeError: A started chunk waits to be finished.
        """
        wanted = _shared_out(check_groups_of_envs(groups, self.num_envs), self.num_workers)
        if self._chunks:
            raise RuntimeError("environments cannot be arranged while a chunk waits to be finished")
        if wanted == self._slots:
            return
        if self._ever_reset.any():
            self._wait(self._ask("release", np.arange(self.num_envs)))
        self._running[:] = self._ever_reset[:] = False
        self._stillborn = {}
        self._slots = wanted

    @property
    def pending_chunks(self) -> int:
        """Chunks that were started and not finished."""
        return len(self._chunks)

    def start_chunk(
        self, actions: NDArray[np.float32], active: NDArray[np.bool_] | Sequence[bool] | None = None
    ) -> None:
        """Has a chunk simulated in the background; see `VectorEnv.start_chunk`."""
        mask = check_active(active, self._running, self._busy)
        checked = check_actions(actions, mask, self.spec.action_dim, self.spec.max_episode_steps)
        length = checked.shape[1]
        self._arrays["actions"][mask, :length] = checked[mask]
        stillborn = {slot: problem for slot, problem in self._stillborn.items() if mask[slot]}
        alive = mask.copy()
        alive[list(stillborn)] = False
        answers = self._ask("step_chunk", np.flatnonzero(alive), length)
        self._busy |= mask
        self._chunks.append(_Chunk(alive, length, stillborn, answers))

    def finish_chunk(self) -> ChunkResult:
        """Waits for the chunk that was started first; see `VectorEnv.finish_chunk`."""
        if not self._chunks:
            raise RuntimeError(NO_CHUNK)
        chunk = self._chunks.popleft()
        problems = _merged(self._wait(chunk.answers)) | chunk.stillborn
        slots = np.flatnonzero(chunk.mask)
        shared, rewards = self._arrays, np.zeros((self.num_envs, chunk.length), np.float32)
        rewards[slots] = shared["rewards"][slots, : chunk.length]
        self._paid += rewards.sum(1)
        outcome: dict[str, Any] = {}
        for name in ("terminated", "truncated", "success", "steps", "failed"):
            outcome[name] = np.zeros_like(shared[name])
            outcome[name][slots] = shared[name][slots]
        result = ChunkResult(observation=self._observation(), rewards=rewards, **outcome)
        result.failed[list(chunk.stillborn)] = True
        self._busy[slots] = self._busy[list(chunk.stillborn)] = False
        self._running &= ~result.done
        self._ever_reset &= ~result.failed
        self._failures.note(problems, self._ids, result.terminated | result.truncated)
        return result

    def _observation(self) -> Observation:
        subtasks = self._paid.round().astype(int).tolist() if self.spec.subtasks > 1 else [0] * self.num_envs
        told = zip(self._ids.tolist(), subtasks, strict=True)
        return {
            **{camera: self._arrays[camera].copy() for camera in self.spec.cameras},
            STATE_KEY: self._arrays["states"].copy(),
            TASK_KEY: [self.spec.instruction(task, state_id, solved) for (task, state_id), solved in told],
        }

    def render(
        self, indices: Sequence[int] | NDArray[np.int64], height: int, width: int, *, show_arm: bool = True
    ) -> NDArray[np.uint8]:
        """Draws video frames; see `VectorEnv.render`. Environments that were never reset are a ValueError."""
        slots = check_indices(indices, self.num_envs)
        if not (1 <= height <= 2048 and 1 <= width <= 2048):
            raise ValueError(f"frames must be 1 to 2048 pixels high and wide, got {height} x {width}")
        unknown = [slot for slot in slots.tolist() if not self._ever_reset[slot]]
        if unknown:
            raise ValueError(f"environments {unknown} have no episode, running or ended, so there is nothing to draw")
        check_idle(slots, self._busy)
        drawn = _merged(self._wait(self._ask("render", slots, height, width, show_arm)))
        frames = np.empty((len(slots), height, width, 3), np.uint8)
        for i, slot in enumerate(slots.tolist()):
            frames[i] = drawn[slot]
        return frames

    def rollout_experts(
        self, requests: Iterable[ExpertRequest | Mapping[str, Any]]
    ) -> Generator[ExpertEpisode, None, None]:
        """Runs scripted experts in all workers, beside the environments, which stay as they are.

        Args:
            requests: `ExpertRequest`s, or mappings with its fields. Taken as workers become free, so a generator may
                stop once it has seen enough; how many requests are under way by then depends on timing, the result of
                each request does not.

        Yields:
            One episode per request, in the order of the requests. No other method may be called before the iterator
            is exhausted or closed.

        Raises:
            ValueError: Unknown task or numbers out of range.
            RuntimeError: A started chunk waits to be finished.
        """
        self._ready()
        if self._chunks:
            raise RuntimeError("finish the chunks that were started before experts are run")
        waiting = iter(requests)
        busy: dict[Any, tuple[int, _Process]] = {}  # by connection, as `wait` returns them
        done: dict[int, ExpertEpisode] = {}
        sent = yielded = 0
        idle = list(self._workers)
        self._rolling_out = True
        try:
            while True:
                while idle and (request := next(waiting, None)) is not None:
                    worker = idle.pop()
                    self._send(worker, ("rollout_expert", (self._request(request),)))
                    busy[worker.connection] = (sent, worker)
                    sent += 1
                if not busy:
                    return
                for connection in wait(list(busy)):
                    number, worker = busy[connection]
                    done[number] = self._receive(worker)
                    del busy[connection]  # not before: an interruption in between leaves an answer to be read
                    idle.append(worker)
                while yielded in done:
                    yielded += 1
                    yield done.pop(yielded - 1)
        finally:
            self._rolling_out = False
            for _, worker in busy.values():
                if self._finalizer.alive:
                    self._receive(worker)

    def _request(self, request: ExpertRequest | Mapping[str, Any]) -> ExpertRequest:
        checked = request if isinstance(request, ExpertRequest) else ExpertRequest(**request)
        tasks = self.spec.tasks
        if isinstance(checked.task, str):
            if checked.task not in tasks:
                raise ValueError(f"task {checked.task!r} is not in this environment; it has {', '.join(tasks)}")
            return replace(checked, task=tasks.index(checked.task))
        if not 0 <= checked.task < len(tasks):
            raise ValueError(f"task index {checked.task} is out of range 0 to {len(tasks) - 1}")
        return checked

    def worker_reports(self) -> list[dict[str, Any]]:
        """Returns what each worker holds: `pid`, imported `modules`, `simulators` made, `cpu_seconds`, `renderer`."""
        self._ready()
        return self._wait([(worker, self._expect(worker, ("report", ()))) for worker in self._workers])

    def close(self) -> None:
        """Ends the workers and frees the shared memory; calling it again does nothing."""
        self._finalizer()

    def _ask(self, name: str, slots: NDArray[np.int64], *arguments: Any) -> list[tuple[_Process, _Answer]]:
        """Sends a command about some environments to the workers that simulate them."""
        self._ready()
        chosen = set(slots.tolist())
        try:
            return [
                (worker, self._expect(worker, (name, (part, *arguments))))
                for worker, mine in zip(self._workers, self._slots, strict=True)
                if (part := [slot for slot in mine if slot in chosen])
            ]
        except BaseException:
            self.close()  # some workers have the command and some have not
            raise

    def _expect(self, worker: _Process, message: Any) -> _Answer:
        self._send(worker, message)
        worker.expected.append(_Answer())
        return worker.expected[-1]

    def _wait(self, asked: Sequence[tuple[_Process, _Answer]]) -> list[Any]:
        """Answers to commands; those to earlier commands, which come before, are kept for who waits for them."""
        self._ready()
        try:
            for worker, answer in asked:
                while not answer.arrived:
                    value = self._receive(worker)
                    first = worker.expected.popleft()
                    first.value, first.arrived = value, True
            return [answer.value for _, answer in asked]
        except BaseException:
            self.close()  # answers may still be under way (Ctrl-C too): no later command could tell them from its own
            raise

    def _ready(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this environment was closed; make a new one")
        if self._rolling_out:
            raise RuntimeError("an iterator of rollout_experts is unfinished: exhaust or close it first")
        if not self._started:
            try:
                for worker in self._workers:
                    self._receive(worker)
            except BaseException:
                self.close()
                raise
            self._started = True

    def _send(self, worker: _Process, message: Any) -> None:
        try:
            worker.connection.send(message)
        except (BrokenPipeError, ConnectionError):
            raise self._died(worker) from None

    def _receive(self, worker: _Process) -> Any:
        try:
            status, *rest = worker.connection.recv()
        except (EOFError, ConnectionError):
            raise self._died(worker) from None
        if status == "ok":
            return rest[0]
        kind, message, trace = rest
        self.close()
        if kind in _SAME_ERROR:
            raise _SAME_ERROR[kind](message)
        raise RuntimeError(f"worker {worker.index} failed with {kind}: {message}\n{trace}")

    def _died(self, worker: _Process) -> RuntimeError:
        try:
            code: int | str = worker.popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = "unknown (still running)"
        tail = worker.stderr_tail() or "(nothing)"
        self.close()
        return RuntimeError(
            f"environment worker {worker.index} of {self.num_workers} ended unexpectedly with exit code {code} "
            f"(negative: killed by that signal; -9 is often lack of memory). The environment is closed. "
            f"Its last words:\n{tail}"
        )


def _merged[T](answers: Iterable[Mapping[int, T]]) -> dict[int, T]:
    """What all workers said, by environment."""
    return {slot: value for answer in answers for slot, value in answer.items()}


def _shared_out(groups: Sequence[Sequence[int]], num_workers: int) -> list[list[int]]:
    """Environments of each worker, which serves one group; several where there are more groups than workers."""
    served: list[list[int]] = [[] for _ in range(num_workers)]
    for number, group in enumerate(groups):
        mine = range(number % num_workers, num_workers, min(len(groups), num_workers))
        for position, slot in enumerate(group):
            served[mine[position % len(mine)]].append(slot)
    return served


def _anonymous_file(size: int) -> IO[bytes]:
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


def _start_worker(index: int, python: str, memory_fd: int, environment: dict[str, str]) -> _Process:
    ours, theirs = socket.socketpair()
    with theirs:
        stderr = tempfile.TemporaryFile()
        popen = subprocess.Popen(
            [*worker_command(python), str(theirs.fileno()), str(memory_fd)],
            pass_fds=(theirs.fileno(), memory_fd),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=environment,
        )
    return _Process(index, popen, Connection(ours.detach()), stderr)


def _stop_workers(workers: list[_Process], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner ends: the workers are not its own
    for worker in workers:
        try:
            worker.connection.send(("close", ()))
        except OSError:
            pass  # it is dead already
        worker.connection.close()
    for worker in workers:
        try:
            worker.popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            worker.popen.kill()
            worker.popen.wait()
        worker.stderr.close()

"""A vector environment whose simulators live in worker processes, with observations and actions in shared memory."""

import errno
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.failures import FailureLog
from pi_rl.envs.interpreters import worker_command, worker_environment
from pi_rl.envs.renderer import child_environment, choose_renderer
from pi_rl.envs.vector_env import (
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
    check_indices,
    check_reset,
)
from pi_rl.envs.worker import Layout

CLOSE_TIMEOUT_S = 5.0
STDERR_TAIL_CHARACTERS = 2000
_SAME_ERROR: dict[str, type[Exception]] = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}
"""Errors of a worker whose message says all; of others the traceback is shown too."""


@dataclass
class _Process:
    """One worker as the parent sees it."""

    index: int
    popen: subprocess.Popen[bytes]
    connection: Connection
    stderr: IO[bytes]

    def stderr_tail(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace")[-STDERR_TAIL_CHARACTERS:].strip()


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

    Results do not depend on the number of workers. Workers are plain child processes rather than `multiprocessing`
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
        self._slots = [list(range(i, num_envs, self.num_workers)) for i in range(self.num_workers)]
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
        self._arrays["reset_ids"][slots] = array
        chosen = set(slots.tolist())
        answers = self._command("reset", [([slot for slot in mine if slot in chosen],) for mine in self._slots])
        self._stillborn = {slot: problem for slot, problem in self._stillborn.items() if slot not in chosen}
        self._stillborn.update(_merged(answers))
        self._ids[slots], self._paid[slots] = array, 0.0
        self._running[slots] = self._ever_reset[slots] = True
        return self._observation()

    def step_chunk(
        self, actions: NDArray[np.float32], active: NDArray[np.bool_] | Sequence[bool] | None = None
    ) -> ChunkResult:
        """Executes a chunk; see `VectorEnv.step_chunk`."""
        mask = check_active(active, self._running).copy()
        checked = check_actions(actions, mask, self.spec.action_dim, self.spec.max_episode_steps)
        chunk = checked.shape[1]
        shared = self._arrays
        shared["actions"][:, :chunk] = checked
        stillborn = {slot: problem for slot, problem in self._stillborn.items() if mask[slot]}
        mask[list(stillborn)] = False
        shared["active"][:] = mask
        answers = self._command("step_chunk", [(mine, chunk) for mine in self._slots])
        self._paid += shared["rewards"][:, :chunk].sum(1)
        result = ChunkResult(
            observation=self._observation(),
            rewards=shared["rewards"][:, :chunk].copy(),
            **{name: shared[name].copy() for name in ("terminated", "truncated", "success", "steps", "failed")},
        )
        result.failed[list(stillborn)] = True
        self._running &= ~result.done
        self._ever_reset &= ~result.failed
        self._failures.note(_merged(answers) | stillborn, self._ids, result.terminated | result.truncated)
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
        wanted = [[slot for slot in mine if slot in slots] for mine in self._slots]
        answers = self._command("render", [(mine, height, width, show_arm) for mine in wanted])
        frames = np.empty((len(slots), height, width, 3), np.uint8)
        position = {slot: i for i, slot in enumerate(slots.tolist())}
        for mine, drawn in zip(wanted, answers, strict=True):
            for slot, frame in zip(mine, drawn, strict=True):
                frames[position[slot]] = frame
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
        """
        self._ready()
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
        return self._command("report", [()] * self.num_workers)

    def close(self) -> None:
        """Ends the workers and frees the shared memory; calling it again does nothing."""
        self._finalizer()

    def _command(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Sends a command to all workers, then collects all answers."""
        self._ready()
        try:
            for worker, values in zip(self._workers, arguments, strict=True):
                self._send(worker, (name, values))
            return [self._receive(worker) for worker in self._workers]
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


def _merged(answers: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """Problems of all workers, by environment."""
    return {slot: problem for answer in answers for slot, problem in answer.items()}


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

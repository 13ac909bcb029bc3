"""A vector environment whose simulators live in worker processes, with observations and actions in shared memory."""

import logging
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.failures import MAX_FAILURES_IN_A_ROW, FailureLog
from pi_rl.envs.interpreters import worker_environment
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
from pi_rl.envs.worker_process import (
    DEFAULT_TIMEOUT_S,
    Answer,
    Launcher,
    WorkerLostError,
    WorkerProcess,
    anonymous_file,
    listen,
    lost_in,
    result_of,
    said,
    shared_out,
    stop_workers,
)

logger = logging.getLogger(__name__)


@dataclass
class _Chunk:
    """A chunk that was started: active environments, its length, those that could not start, and what to wait for."""

    mask: NDArray[np.bool_]
    length: int
    stillborn: dict[int, str]
    answers: list[Answer]


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

    A worker that dies, or that hangs, is replaced: the running episodes of its environments are lost, as if their
    simulators had broken down, and the others go on. A reset or an expert's episode is run once more.

    Attributes:
        spec: What a policy must know.
        num_envs: B.
        num_workers: Worker processes.
        worker_restarts: Workers that were replaced so far.
    """

    def __init__(
        self,
        spec: EnvSpec,
        simulator: str,
        options: Mapping[str, Any],
        num_envs: int,
        num_workers: int | None = None,
        python: str = sys.executable,
        worker_timeout_s: float = DEFAULT_TIMEOUT_S,
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
            worker_timeout_s: Seconds above 0 that one call of a simulator (making it, a reset, a step, a picture) may
                take; a worker in which none returns for so long hangs. The length of chunks plays no part.

        Raises:
            ValueError: A count below 1, or a timeout that is not above 0.
            RuntimeError: No off-screen renderer works (with the command that installs one).
        """
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1 (or None for one per core), got {num_workers}")
        if not 0 < worker_timeout_s < float("inf"):
            raise ValueError(f"worker_timeout_s must be a number of seconds above 0, got {worker_timeout_s}")
        self.spec = spec
        self.num_envs = num_envs
        self.num_workers = default_num_workers(num_envs) if num_workers is None else min(num_workers, num_envs)
        layout = Layout(num_envs, spec.max_episode_steps, spec.action_dim, spec.state_dim, dict(spec.cameras))
        environment = worker_environment(python, child_environment(choose_renderer()))
        memory = anonymous_file(layout.nbytes())
        self._arrays = layout.arrays(mmap.mmap(memory.fileno(), 0))
        config = {
            "simulator": simulator,
            "tasks": list(spec.tasks),
            "options": dict(options),
            "layout": asdict(layout),
            "max_episode_steps": spec.max_episode_steps,
            "path": [str(Path(entry).resolve()) for entry in sys.path] if python == sys.executable else [],
        }
        self._launcher = Launcher(python, environment, memory, config, self._arrays["pulse"])
        self._timeout_s = worker_timeout_s
        self._workers = [self._launcher.start(i) for i in range(self.num_workers)]
        self._finalizer = weakref.finalize(self, stop_workers, self._workers, memory, os.getpid())
        self._slots = shared_out([list(range(num_envs))], self.num_workers)
        self._chunks: deque[_Chunk] = deque()
        self._busy = np.zeros(num_envs, bool)
        self._ids = np.zeros((num_envs, 2), np.int64)
        self._paid = np.zeros(num_envs)  # rewards of the running episode
        self._failures = FailureLog(spec, num_envs)
        self._stillborn: dict[int, str] = {}  # environments whose episode has no simulator: what went wrong
        self._orphaned: set[int] = set()  # environments whose episode was lost with their worker
        self._ever_reset = np.zeros(num_envs, bool)
        self._simulated = np.zeros(num_envs, bool)  # a simulator holds the episode, running or ended
        self.worker_restarts = 0
        self._lost_in_a_row = [0] * self.num_workers
        self._running = np.zeros(num_envs, bool)
        self._started = False
        self._rolling_out = False

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.popen.pid for worker in self._workers]

    def reset(self, ids: ResetIds, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Observation:
        """Starts episodes; see `VectorEnv.reset`."""
        array, slots = check_reset(ids, indices, self.num_envs, self.spec)
        check_idle(slots, self._busy)
        self._arrays["reset_ids"][slots] = array
        self._running[slots] = False
        problems, lost = self._reset(slots)
        chosen = set(slots.tolist())
        self._stillborn = {slot: problem for slot, problem in self._stillborn.items() if slot not in chosen}
        self._stillborn.update(problems)
        self._orphaned = (self._orphaned - chosen) | lost.keys()
        self._ids[slots], self._paid[slots] = array, 0.0
        self._running[slots] = self._ever_reset[slots] = self._simulated[slots] = True
        self._simulated[list(problems)] = False
        return self._observation()

    def _reset(self, slots: NDArray[np.int64]) -> tuple[dict[int, str], dict[int, str]]:
        """Has episodes started, once more where a worker was lost.

        Returns:
            What went wrong, by environment; the part of it in which a worker was lost again.
        """
        answers = self._ask("reset", slots)
        self._wait(answers)
        lost = lost_in(answers)
        again = self._ask("reset", np.array(sorted(lost), np.int64))
        self._wait(again)
        return said(answers) | said(again) | lost_in(again), lost_in(again)

    def arrange(self, groups: Sequence[Sequence[int] | NDArray[np.int64]]) -> None:
        """Gives each group workers of its own; see `VectorEnv.arrange`.

        With fewer workers than groups, groups share them, and a command waits for those before it.

        Raises:
            ValueError: The groups are not all environments once.
            RuntimeError: A started chunk waits to be finished.
        """
        wanted = shared_out(check_groups_of_envs(groups, self.num_envs), self.num_workers)
        if self._chunks:
            raise RuntimeError("environments cannot be arranged while a chunk waits to be finished")
        if wanted == self._slots:
            return
        if self._ever_reset.any():
            self._wait(self._ask("release", np.arange(self.num_envs)))
        self._running[:] = self._ever_reset[:] = self._simulated[:] = False
        self._stillborn, self._orphaned = {}, set()
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
        self._wait(chunk.answers)
        gone = lost_in(chunk.answers) | chunk.stillborn  # nothing that is in the shared arrays is of this chunk
        problems = said(chunk.answers) | gone
        chunk.mask[list(gone)] = False
        slots = np.flatnonzero(chunk.mask)
        shared, rewards = self._arrays, np.zeros((self.num_envs, chunk.length), np.float32)
        rewards[slots] = shared["rewards"][slots, : chunk.length]
        self._paid += rewards.sum(1)
        outcome: dict[str, Any] = {}
        for name in ("terminated", "truncated", "success", "steps", "failed"):
            outcome[name] = np.zeros_like(shared[name])
            outcome[name][slots] = shared[name][slots]
        result = ChunkResult(observation=self._observation(), rewards=rewards, **outcome)
        result.failed[list(gone)] = True
        self._busy[slots] = self._busy[list(gone)] = False
        self._running &= ~result.done
        self._ever_reset &= ~result.failed
        for worker, mine in enumerate(self._slots):
            if (result.terminated | result.truncated)[mine].any():
                self._lost_in_a_row[worker] = 0
        self._failures.note(problems, self._ids, result.terminated | result.truncated, self._orphaned)
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
        """Draws video frames; see `VectorEnv.render`.

        Environments that were never reset are a ValueError. Where a worker that was lost had the simulator, or the
        episode could not start, the frame is black.
        """
        slots = check_indices(indices, self.num_envs)
        if not (1 <= height <= 2048 and 1 <= width <= 2048):
            raise ValueError(f"frames must be 1 to 2048 pixels high and wide, got {height} x {width}")
        unknown = [slot for slot in slots.tolist() if not self._ever_reset[slot]]
        if unknown:
            raise ValueError(f"environments {unknown} have no episode, running or ended, so there is nothing to draw")
        check_idle(slots, self._busy)
        answers = self._ask("render", slots[self._simulated[slots]], height, width, show_arm)
        self._wait(answers)
        drawn = said(answers)
        frames = np.zeros((len(slots), height, width, 3), np.uint8)
        for i, slot in enumerate(slots.tolist()):
            if slot in drawn:
                frames[i] = drawn[slot]
        return frames

    def rollout_experts(
        self, requests: Iterable[ExpertRequest | Mapping[str, Any]]
    ) -> Generator[ExpertEpisode, None, None]:
        """Runs scripted experts in all workers, beside the environments, which stay as they are.

        Args:
            requests: `ExpertRequest`s, or mappings with its fields. Taken as workers become free, so a generator may
                stop once it has seen enough; how many requests are under way by then depends on timing, the result of
                each request does not. One whose worker is lost is run again, and has failed if that is lost too.

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
        waiting = enumerate(map(self._request, requests))
        again: deque[tuple[int, ExpertRequest]] = deque()
        tried_again: set[int] = set()
        busy: dict[int, tuple[int, ExpertRequest, Answer]] = {}  # by worker
        done: dict[int, ExpertEpisode] = {}
        yielded = 0
        idle = list(range(self.num_workers))
        self._rolling_out = True
        try:
            while True:
                while idle and (job := again.popleft() if again else next(waiting, None)) is not None:
                    worker = idle.pop()
                    busy[worker] = (*job, self._expect(worker, [], "rollout_expert", job[1]))
                if not busy:
                    return
                self._listen(list(busy))
                for worker, (number, request, answer) in list(busy.items()):
                    if not answer.arrived:
                        continue
                    del busy[worker]
                    idle.append(worker)
                    if answer.lost and number not in tried_again:
                        tried_again.add(number)
                        again.append((number, request))
                        continue
                    done[number] = self._expert_episode(request, answer)
                while yielded in done:
                    yielded += 1
                    yield done.pop(yielded - 1)
        finally:
            self._rolling_out = False
            if self._finalizer.alive:
                self._wait([answer for _, _, answer in busy.values()])

    def _expert_episode(self, request: ExpertRequest, answer: Answer) -> ExpertEpisode:
        """What the worker sent; where two workers were lost over it, an attempt that failed."""
        if not answer.lost:
            self._lost_in_a_row[answer.worker] = 0
            return answer.value
        logger.warning(
            f"the expert's episode of {self.spec.tasks[int(request.task)]}, state {request.state_id}, has failed: "
            f"{answer.lost}, for the second time."
        )
        actions, states = (np.zeros((0, size), np.float32) for size in (self.spec.action_dim, self.spec.state_dim))
        return ExpertEpisode(
            task=int(request.task),
            state_id=request.state_id,
            success=False,
            actions=actions,
            states=states,
            images=None,
        )

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
        answers = [self._expect(worker, [], "report") for worker in range(self.num_workers)]
        self._wait(answers)
        for worker in [answer.worker for answer in answers if answer.lost]:
            answers[worker] = self._expect(worker, [], "report")
        self._wait(answers)
        return [answer.value for answer in answers]

    def close(self) -> None:
        """Ends the workers and frees the shared memory; calling it again does nothing."""
        self._finalizer()
        self._busy[:] = False

    def _ask(self, name: str, slots: NDArray[np.int64], *arguments: Any) -> list[Answer]:
        """Sends a command about some environments to the workers that simulate them."""
        self._ready()
        chosen = set(slots.tolist())
        return [
            self._expect(worker, part, name, part, *arguments)
            for worker, mine in enumerate(self._slots)
            if (part := [slot for slot in mine if slot in chosen])
        ]

    def _expect(self, worker: int, slots: list[int], name: str, *arguments: Any) -> Answer:
        """Sends a command to a worker; `slots` are the environments that it concerns."""
        answer = Answer(worker, slots)
        try:
            self._workers[worker].send((name, arguments))
            self._workers[worker].expected.append(answer)
        except BaseException:
            self.close()  # Ctrl-C: the worker may have the command, and others have not
            raise
        return answer

    def _wait(self, answers: Sequence[Answer]) -> None:
        """Waits for answers; those to earlier commands, which come before, are kept for who waits for them."""
        self._ready()
        while waiting := {answer.worker for answer in answers if not answer.arrived}:
            self._listen(sorted(waiting))

    def _listen(self, workers: Sequence[int]) -> None:
        """Takes what some workers say, and replaces those that are lost."""
        try:
            for worker, message in listen([self._workers[index] for index in workers]):
                if isinstance(message, WorkerLostError):
                    self._replace(worker, message)
                else:
                    answer = worker.expected.popleft()
                    answer.value, answer.arrived = result_of(worker, message), True
        except BaseException:
            self.close()  # answers may still be under way (Ctrl-C too): no later command could tell them from its own
            raise

    def _replace(self, worker: WorkerProcess, lost: WorkerLostError) -> None:
        """Starts a new worker in place of a lost one, whose running episodes are over.

        Raises:
            RuntimeError: No episode was finished between this loss and the ones before; or the new one does not start.
        """
        index, problem = worker.index, f"its {lost}"
        for answer in worker.expected:
            answer.lost, answer.arrived = problem, True
        mine = self._slots[index]
        self._simulated[mine] = False
        running = [slot for slot in mine if self._running[slot]]
        self._stillborn.update(dict.fromkeys(running, problem))
        self._orphaned.update(running)
        self.worker_restarts += 1
        self._lost_in_a_row[index] += 1
        if self._lost_in_a_row[index] >= MAX_FAILURES_IN_A_ROW:
            raise RuntimeError(
                f"environment {lost}. That is {MAX_FAILURES_IN_A_ROW} times in a row that worker {index} of "
                f"{self.num_workers} was lost and finished no episode: something is wrong with the simulator, or "
                f"memory is short (then use fewer environments). The environment is closed. Its last words:\n"
                f"{lost.last_words}"
            )
        logger.warning(
            f"environment {lost}. A new one takes its place; {len(running)} running episodes are dropped, the others "
            f"go on. Its last words:\n{lost.last_words}"
        )
        self._workers[index] = self._launcher.start(index)
        self._await_start([index])

    def _await_start(self, workers: Sequence[int]) -> None:
        """Waits until workers that were started can take commands.

        Raises:
            RuntimeError: One ended, or said why it cannot.
        """
        starting = set(workers)
        while starting:
            for worker, message in listen([self._workers[index] for index in sorted(starting)]):
                if isinstance(message, WorkerLostError):
                    raise RuntimeError(
                        f"environment {message} while it started. The environment is closed. Its last words:\n"
                        f"{message.last_words}"
                    )
                result_of(worker, message)
                worker.limit(self._timeout_s)
                starting.discard(worker.index)

    def _ready(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this environment was closed; make a new one")
        if self._rolling_out:
            raise RuntimeError("an iterator of rollout_experts is unfinished: exhaust or close it first")
        if not self._started:
            try:
                self._await_start(range(self.num_workers))
            except BaseException:
                self.close()
                raise
            self._started = True

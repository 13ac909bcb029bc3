"""A vector environment without cameras that is simulated in the calling process, for simulators of microseconds."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.deferred import DeferredVectorEnv
from pi_rl.envs.failures import FailureLog
from pi_rl.envs.vector_env import (
    STATE_KEY,
    TASK_KEY,
    ChunkResult,
    EnvSpec,
    Observation,
    ResetIds,
    check_idle,
    check_reset,
)


class StepResult(NamedTuple):
    """Outcome of one simulator step in n environments.

    Attributes:
        rewards: float (n,).
        terminated: bool (n,), the episode ended by itself.
        truncated: bool (n,), the simulator cut the episode; the time limit is not its business.
        success: bool (n,), the task is solved now.
        problems: What went wrong, by environment; rewards of these may be anything.
    """

    rewards: NDArray[np.floating]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    problems: Mapping[int, str] = MappingProxyType({})


class InProcessVectorEnv(DeferredVectorEnv):
    """Checks, chunks, episode ends and the time limit; a subclass simulates single steps.

    A worker process would take longer to talk to than these simulators take to step, so there is none.

    Attributes:
        spec: What a policy must know; no cameras.
        num_envs: B.
        states: float32 (B, state_dim), present observations; written by the subclass.

    Args:
        spec: Description of the environment.
        num_envs: B, at least 1.

    Raises:
        ValueError: A count below 1.
    """

    def __init__(self, spec: EnvSpec, num_envs: int):
        super().__init__(spec, num_envs)
        self.states = np.zeros((num_envs, spec.state_dim), np.float32)
        self._low = np.asarray(spec.action_low, np.float32)
        self._high = np.asarray(spec.action_high, np.float32)
        self._ids = np.zeros((num_envs, 2), np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._solved = np.zeros(num_envs, bool)
        self._failures = FailureLog(spec, num_envs)
        self._closed = False

    @abstractmethod
    def _start(self, slots: NDArray[np.int64], tasks: NDArray[np.int64], state_ids: NDArray[np.int64]) -> None:
        """Starts episodes in n environments and writes their rows of `states`; depends on nothing but the ids."""

    @abstractmethod
    def _advance(self, slots: NDArray[np.int64], actions: NDArray[np.float32]) -> StepResult:
        """Executes one action (n, A), within bounds, in n environments and writes their rows of `states`."""

    def _free(self) -> None:
        """Frees what the simulator holds."""

    def reset(self, ids: ResetIds, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Observation:
        """Starts episodes; see `VectorEnv.reset`."""
        self._check_open()
        array, slots = check_reset(ids, indices, self.num_envs, self.spec)
        check_idle(slots, self._busy)
        self._ids[slots] = array
        self._steps[slots] = 0
        self._running[slots], self._solved[slots] = True, False
        self._start(slots, array[:, 0], array[:, 1])
        return self._observation()

    def _simulate(self, going: NDArray[np.bool_], checked: NDArray[np.float32]) -> ChunkResult:
        taken = np.zeros(self.num_envs, np.int64)
        rewards = np.zeros(checked.shape[:2], np.float32)
        terminated, truncated, success, failed = (np.zeros(self.num_envs, bool) for _ in range(4))
        problems: dict[int, str] = {}
        for step in range(checked.shape[1]):
            slots = np.flatnonzero(going)
            if len(slots) == 0:
                break
            result = self._advance(slots, np.clip(checked[slots, step], self._low, self._high))
            finite = np.isfinite(self.states[slots]).all(1) & np.isfinite(result.rewards)
            broken = ~finite | np.isin(slots, list(result.problems))
            problems |= dict.fromkeys(slots[~finite].tolist(), "its state or reward is not a finite number")
            problems |= result.problems
            rewards[slots, step] = np.where(broken, 0.0, result.rewards)
            taken[slots] += 1
            self._steps[slots] += 1
            self._solved[slots] |= result.success & ~broken
            success[slots] = self._solved[slots] & ~broken
            cut = result.truncated | (self._steps[slots] >= self.spec.max_episode_steps)
            failed[slots] = broken
            terminated[slots] = result.terminated & ~broken
            truncated[slots] = cut & ~result.terminated & ~broken
            going[slots] = ~(result.terminated | cut | broken)
        self.states[failed], rewards[failed] = 0.0, 0.0
        self._running &= ~(terminated | truncated | failed)
        self._failures.note(problems, self._ids, terminated | truncated)
        return ChunkResult(self._observation(), rewards, terminated, truncated, success, taken, failed)

    def render(
        self, indices: Sequence[int] | NDArray[np.int64], height: int, width: int, *, show_arm: bool = True
    ) -> NoReturn:
        """There is nothing to draw.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{self.spec.name} has no cameras and draws no frames; leave videos out")

    def close(self) -> None:
        """Frees the simulators; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._free()

    def _observation(self) -> Observation:
        return {
            STATE_KEY: self.states.copy(),
            TASK_KEY: [self.spec.instruction(task, state_id) for task, state_id in self._ids.tolist()],
        }

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this environment was closed; make a new one")

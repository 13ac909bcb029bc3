"""The interface between policies and simulators: reset by id, step a chunk of actions, keep the two endings apart."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

EVAL_STATES = 10_000
"""Evaluation resets to state ids in [0, EVAL_STATES)."""
TRAIN_STATE_OFFSET = 1_000_000
"""Training resets to state ids from here up, so it never sees an evaluation state."""
STATE_KEY = "observation.state"
IMAGE_KEY = "observation.image"
TASK_KEY = "task"
NO_CHUNK = "no chunk was started, so there is none to finish: call start_chunk first"

ResetIds = NDArray[np.int64]
"""(n, 2): columns task index, state id. The pair names one initial state, whatever was simulated before."""
Observation = dict[str, Any]
"""Camera keys: uint8 (B, H, W, 3); `observation.state`: float32 (B, state_dim); `task`: list of B instructions."""


@dataclass(frozen=True)
class EnvSpec:
    """What a policy must know about an environment.

    Attributes:
        name: The name it was made from, such as "metaworld:reach-v3".
        tasks: Task names; the task index of a reset id points into this.
        instructions: Language instruction of each task, same order.
        cameras: LeRobot feature key to (height, width) in pixels.
        state_dim: Size of `observation.state`.
        action_dim: Size A of one action.
        max_episode_steps: Simulator steps after which an episode is truncated.
        fps: Control steps per second of simulated time.
        action_low: A lower bounds; actions are clipped to them.
        action_high: A upper bounds.
        eval_states: Evaluation states of each task: state ids in [0, eval_states).
        task_groups: Names of groups of tasks that results are also averaged over, such as "easy".
        subtasks: Subtasks that an episode consists of; where there are several, each solved one pays a reward of 1.
        instruction_of: (task index, state id, subtasks solved) to the instruction, where it is more than the task's.
    """

    name: str
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    cameras: dict[str, tuple[int, int]]
    state_dim: int
    action_dim: int
    max_episode_steps: int
    fps: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    eval_states: int = EVAL_STATES
    task_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    subtasks: int = 1
    instruction_of: Callable[[int, int, int], str] | None = None

    def instruction(self, task: int, state_id: int, solved: int = 0) -> str:
        """Returns what a policy is told.

        Args:
            task: Index into `tasks`.
            state_id: Initial state of the episode.
            solved: Subtasks of the episode that are solved already.
        """
        if self.instruction_of is None:
            return self.instructions[task]
        return self.instruction_of(task, state_id, solved)

    def sentences(self, states: int = 1000) -> tuple[str, ...]:
        """Returns the different instructions of each task's first evaluation states: what a tokenizer must know.

        Args:
            states: How many states are looked at.
        """
        if self.instruction_of is None:
            return self.instructions
        told = (
            self.instruction_of(task, state_id, solved)
            for task in range(len(self.tasks))
            for state_id in range(min(states, self.eval_states))
            for solved in range(self.subtasks)
        )
        return tuple(dict.fromkeys(told))


@dataclass
class ChunkResult:
    """Outcome of one chunk of C actions in B environments.

    Attributes:
        observation: Of all environments after the chunk. The images of terminated environments and all rows of
            inactive and failed ones are stale and must not be used. Truncated rows hold the episode's true final
            observation.
        rewards: float32 (B, C), one per simulator step; 0 after the end of an episode and for inactive environments.
        terminated: bool (B,), the episode ended by itself (no bootstrapping): the task was solved or, in simulators
            that know failure, cannot be solved any more. Which of the two it was is in `success` alone.
        truncated: bool (B,), the episode was cut, as a rule by the time limit (bootstrap from the observation).
        success: bool (B,), the task was solved in this chunk or, where that does not end an episode, earlier in it.
        steps: int64 (B,), simulated steps, at most C; 0 for inactive environments.
        failed: bool (B,), the simulator broke down in this chunk (it raised, returned NaN, or its process was lost).
            The episode is over without an ending; nothing of this chunk may be used. The environment can be reset.
    """

    observation: Observation
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    steps: NDArray[np.int64]
    failed: NDArray[np.bool_]

    @property
    def done(self) -> NDArray[np.bool_]:
        """Whether each episode is over, whichever way: bool (B,)."""
        return self.terminated | self.truncated | self.failed


@dataclass(frozen=True)
class ExpertRequest:
    """One episode of a scripted expert, slowed down and with first-order autoregressive action noise if wanted.

    The expert's action is clipped to +-max_speed. The noise is z_0 = 0, z_t = rho z_{t-1} + sqrt(1 - rho^2) std e_t
    with e_t standard normal, one z per translation axis. It is added to the expert's xyz, the sum is clipped to
    [-1, 1], and the clipped action is what is recorded. With a noise window of w steps, noise acts in each window of w
    steps with probability 1/2: such episodes show how to recover and still succeed.

    Attributes:
        task: Task name, or its index in `EnvSpec.tasks`.
        state_id: Initial state, as in `ResetIds`.
        noise_std: Stationary standard deviation of the noise, in action units; 0 for a clean expert.
        noise_rho: Correlation of successive noise values, in [0, 1).
        noise_window: Steps w of the windows in which noise is on or off; 0 leaves it on.
        noise_seed: Seed of the noise.
        max_speed: Largest component of the expert's own action, in (0, 1].
        max_steps: Steps after which the attempt is given up.
        trailing_steps: Steps recorded after success, in which the expert goes on acting (it should hold still).
        frames: Whether images are rendered, by replaying a successful episode.
    """

    task: str | int
    state_id: int
    noise_std: float = 0.0
    noise_rho: float = 0.8
    noise_window: int = 0
    noise_seed: int = 0
    max_speed: float = 1.0
    max_steps: int = 150
    trailing_steps: int = 0
    frames: bool = True

    def __post_init__(self) -> None:
        """Checks the numbers; raises ValueError naming the field, the value and the allowed range."""
        if self.state_id < 0:
            raise ValueError(f"state_id must be at least 0, got {self.state_id}")
        if not (0 <= self.noise_std < np.inf):
            raise ValueError(f"noise_std must be finite and at least 0, got {self.noise_std}")
        if not (0 <= self.noise_rho < 1):
            raise ValueError(f"noise_rho must be in [0, 1), got {self.noise_rho}")
        if self.noise_window < 0:
            raise ValueError(f"noise_window must be at least 0, got {self.noise_window}")
        if not (0 < self.max_speed <= 1):
            raise ValueError(f"max_speed must be above 0 and at most 1, got {self.max_speed}")
        if self.noise_seed < 0:
            raise ValueError(f"noise_seed must be at least 0, got {self.noise_seed}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.trailing_steps < 0:
            raise ValueError(f"trailing_steps must be at least 0, got {self.trailing_steps}")


class ExpertEpisode(TypedDict):
    """One attempt of a scripted expert: n recorded steps, observation t before action t.

    `images` is None for failed attempts and when frames were not asked for.
    """

    task: int
    state_id: int
    success: bool
    actions: NDArray[np.float32]  # (n, A)
    states: NDArray[np.float32]  # (n, state_dim)
    images: dict[str, NDArray[np.uint8]] | None  # camera key to (n, H, W, 3)


class VectorEnv(ABC):
    """B environments that are reset by id and driven by chunks of C actions.

    An environment whose episode has ended stays as it is until it is reset; stepping it is an error, leave it out
    with `active`. Nothing is reset automatically.
    """

    spec: EnvSpec
    num_envs: int
    worker_restarts: int = 0
    """Processes that died or hung and were replaced so far; stays 0 where there are none."""

    @abstractmethod
    def reset(self, ids: ResetIds, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Observation:
        """Starts episodes.

        Args:
            ids: int64 (n, 2), task index and state id of each.
            indices: The n environments to reset; None means all, in order.

        Returns:
            The observation of all B environments (rows that were never reset are zeros).

        Raises:
            ValueError: Wrong shape, ids out of range, or an environment named twice.
        """

    def step_chunk(
        self, actions: NDArray[np.float32], active: NDArray[np.bool_] | Sequence[bool] | None = None
    ) -> ChunkResult:
        """Executes a chunk in every active environment, stopping at the step where its episode ends.

        Args:
            actions: float32 (B, C, A), C from 1 to `max_episode_steps`; clipped to the action bounds.
            active: bool (B,), the environments to simulate; None means all.

        Returns:
            Rewards, endings and the observation after the chunk.

        Raises:
            ValueError: Wrong shape, NaN or infinite actions, or an active environment without a running episode.
            RuntimeError: A started chunk waits to be finished.
        """
        if self.pending_chunks:
            raise RuntimeError(
                f"{self.pending_chunks} started chunk(s) wait to be finished: call finish_chunk for each before "
                "step_chunk"
            )
        self.start_chunk(actions, active)
        return self.finish_chunk()

    @property
    @abstractmethod
    def pending_chunks(self) -> int:
        """Chunks that were started and not finished."""

    @abstractmethod
    def start_chunk(
        self, actions: NDArray[np.float32], active: NDArray[np.bool_] | Sequence[bool] | None = None
    ) -> None:
        """Begins a chunk in some environments and returns while they are simulated, where that is possible.

        Until the chunk is finished, these environments must not be started, reset or drawn; the others may.

        Args:
            actions: As for `step_chunk`.
            active: As for `step_chunk`.

        Raises:
            ValueError: As `step_chunk`; also for an active environment that is in a chunk already.
        """

    @abstractmethod
    def finish_chunk(self) -> ChunkResult:
        """Waits for the chunk that was started first among those that are not finished.

        Returns:
            As `step_chunk`. Environments that were not active in this chunk have zeros and stale observations.

        Raises:
            RuntimeError: No chunk was started; or an environment, or the process of its worker, keeps breaking down.
        """

    def arrange(self, groups: Sequence[Sequence[int] | NDArray[np.int64]]) -> None:
        """Prepares for chunks of these groups that overlap: no group then waits for the simulation of another.

        Simulations in one process have nothing to prepare. Results do not depend on it, but episodes that run end.

        Args:
            groups: Disjoint lists of environments, which together are all of them.
        """
        check_groups_of_envs(groups, self.num_envs)

    @abstractmethod
    def render(
        self, indices: Sequence[int] | NDArray[np.int64], height: int, width: int, *, show_arm: bool = True
    ) -> NDArray[np.uint8]:
        """Draws full-quality frames for videos; the policy's images are not affected.

        Args:
            indices: The n environments to draw.
            height: Frame height in pixels.
            width: Frame width in pixels.
            show_arm: Draw the robot's arm even when the policy's images hide it.

        Returns:
            uint8 (n, height, width, 3).
        """

    @abstractmethod
    def close(self) -> None:
        """Frees everything; calling it again does nothing."""

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the environment."""
        self.close()


def check_reset(ids: Any, indices: Any, num_envs: int, spec: EnvSpec) -> tuple[ResetIds, NDArray[np.int64]]:
    """Checks the arguments of `VectorEnv.reset`.

    Args:
        ids: What should be (n, 2) integers.
        indices: What should be n distinct environment indices, or None.
        num_envs: B.
        spec: Knows the tasks and how many evaluation states they have.

    Returns:
        ids as int64 (n, 2) and indices as int64 (n,).

    Raises:
        ValueError: With the offending shape or value and what is allowed.
    """
    slots = check_indices(range(num_envs) if indices is None else indices, num_envs)
    array = np.asarray(ids)
    if array.shape != (len(slots), 2) or array.dtype.kind not in "iu":
        raise ValueError(
            f"reset ids must be integers of shape ({len(slots)}, 2) (task index, state id), "
            f"got {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64)
    tasks = spec.tasks
    bad_task = (array[:, 0] < 0) | (array[:, 0] >= len(tasks))
    if bad_task.any():
        row = int(bad_task.argmax())
        raise ValueError(
            f"task index {array[row, 0]} (row {row}) is out of range: this environment has {len(tasks)} "
            f"task(s), 0 to {len(tasks) - 1} ({', '.join(tasks[:5])}{', …' if len(tasks) > 5 else ''})"
        )
    if (array[:, 1] < 0).any():
        row = int((array[:, 1] < 0).argmax())
        raise ValueError(f"state id {array[row, 1]} (row {row}) is negative; state ids start at 0")
    unknown = (array[:, 1] >= spec.eval_states) & (array[:, 1] < TRAIN_STATE_OFFSET)
    if unknown.any():
        row = int(unknown.argmax())
        raise ValueError(
            f"state id {array[row, 1]} (row {row}) does not exist: {spec.name} has the evaluation states 0 to "
            f"{spec.eval_states - 1}, and training states from {TRAIN_STATE_OFFSET} up"
        )
    return array, slots


def check_indices(indices: Any, num_envs: int) -> NDArray[np.int64]:
    """Checks a list of environment indices.

    Args:
        indices: What should be distinct integers in [0, num_envs).
        num_envs: B.

    Returns:
        The indices as int64 (n,).

    Raises:
        ValueError: Not one-dimensional, out of range or repeated.
    """
    slots = np.asarray(list(indices) if isinstance(indices, range) else indices)
    if slots.ndim != 1 or (slots.size and slots.dtype.kind not in "iu"):
        raise ValueError(f"indices must be a list of integers, got {slots.dtype} of shape {slots.shape}")
    slots = slots.astype(np.int64)
    if slots.size and (slots.min() < 0 or slots.max() >= num_envs):
        raise ValueError(f"environment indices must be in 0 to {num_envs - 1}, got {slots.tolist()}")
    if len(np.unique(slots)) != len(slots):
        raise ValueError(f"an environment is named twice in {slots.tolist()}")
    return slots


def check_groups_of_envs(groups: Sequence[Sequence[int] | NDArray[np.int64]], num_envs: int) -> list[list[int]]:
    """Checks the argument of `VectorEnv.arrange`.

    Args:
        groups: What should be disjoint lists of environments, none empty.
        num_envs: B.

    Returns:
        The groups as lists.

    Raises:
        ValueError: An environment is missing, named twice or out of range, or a group is empty.
    """
    lists = [np.asarray(group).tolist() for group in groups]
    if sorted(slot for group in lists for slot in group) != list(range(num_envs)) or not all(lists):
        raise ValueError(
            f"groups must name each of the {num_envs} environments once and none may be empty, got {lists}"
        )
    return lists


def check_actions(actions: Any, active: NDArray[np.bool_], action_dim: int, max_chunk: int) -> NDArray[np.float32]:
    """Checks the actions of `VectorEnv.step_chunk`; rows of inactive environments may hold anything.

    Args:
        actions: What should be numbers of shape (B, C, A).
        active: bool (B,).
        action_dim: A.
        max_chunk: Largest allowed C.

    Returns:
        The actions as float32 (B, C, A).

    Raises:
        ValueError: Wrong shape, or NaN or infinite numbers (with the environment and step of the first).
    """
    array = np.asarray(actions, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] != len(active) or array.shape[2] != action_dim:
        raise ValueError(f"actions must have shape ({len(active)}, C, {action_dim}), got {array.shape}")
    if not 1 <= array.shape[1] <= max_chunk:
        raise ValueError(f"a chunk must have 1 to {max_chunk} actions (the episode's limit), got {array.shape[1]}")
    broken = ~np.isfinite(array).all(axis=2) & active[:, None]
    if broken.any():
        env, step = np.argwhere(broken)[0]
        raise ValueError(
            f"the action of environment {env} at step {step} of the chunk is {array[env, step].tolist()}: "
            "actions must be finite"
        )
    return array


def check_active(active: Any, running: NDArray[np.bool_], busy: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Checks the mask of `VectorEnv.step_chunk`.

    Args:
        active: What should be B booleans, or None for all.
        running: bool (B,), environments with an episode that has not ended.
        busy: bool (B,), environments in a chunk that is not finished; None means none.

    Returns:
        The mask as bool (B,), a copy.

    Raises:
        ValueError: Wrong shape, or it includes an environment whose episode ended or never began, or that is busy.
    """
    mask = np.ones(len(running), bool) if active is None else np.array(active)
    if mask.shape != running.shape or mask.dtype != bool:
        raise ValueError(f"active must be {len(running)} booleans, got {mask.dtype} of shape {mask.shape}")
    ended = np.flatnonzero(mask & ~running)
    if len(ended):
        raise ValueError(
            f"environments {ended.tolist()} have no running episode: reset them or leave them out with `active`"
        )
    if busy is not None:
        check_idle(np.flatnonzero(mask), busy)
    return mask


def check_idle(slots: NDArray[np.int64], busy: NDArray[np.bool_]) -> None:
    """Refuses environments that are in a chunk that was started and not finished.

    Args:
        slots: (n,) environments that are to be started, reset or drawn.
        busy: bool (B,).

    Raises:
        ValueError: Some of them are busy.
    """
    if (held := slots[busy[slots]]).size:
        raise ValueError(
            f"environments {held.tolist()} are in a chunk that was started and not finished: call finish_chunk first"
        )

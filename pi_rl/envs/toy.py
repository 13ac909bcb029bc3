"""Two tasks that show in seconds whether a policy learns; numpy only, all environments at once.

identity    one step: the action should equal the target that the state shows
point-mass  a mass is pushed by forces, and should come near a goal in time
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.in_process import InProcessVectorEnv, StepResult
from pi_rl.envs.vector_env import EnvSpec

INSTRUCTIONS = {"identity": "repeat the target", "point-mass": "move to the goal"}
REWARDS = ("success", "distance")
FPS = 10
FORCE, DRAG = 4.0, 2.0
CLOSEST, FARTHEST = 0.3, 0.8


@dataclass(frozen=True)
class ToyOptions:
    """Size, tolerance and reward of a toy task.

    Attributes:
        dimensions: Numbers in an action, and in target, position, velocity and goal.
        tolerance: Distance to the target or goal, as a root mean square over dimensions, that counts as success.
        reward: "success" pays 1 for it. "distance" pays minus the squared distance for `identity`, and for
            `point-mass` minus the distance per second, plus 1 for success. None: "distance" for `identity`,
            "success" for `point-mass`.
        max_episode_steps: Steps after which `point-mass` is truncated; `identity` always has one.
    """

    dimensions: int = 2
    tolerance: float = 0.2
    reward: str | None = None
    max_episode_steps: int = 20

    def __post_init__(self) -> None:
        """Checks the values; raises ValueError naming the option, what it was given and what is allowed."""
        for name in ("dimensions", "max_episode_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.tolerance < CLOSEST:
            raise ValueError(f"tolerance must be above 0 and below {CLOSEST}, got {self.tolerance}")
        if self.reward is not None and self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)} or left out, got {self.reward!r}")


def task_names() -> tuple[str, ...]:
    """Returns the names of the toy tasks, sorted."""
    return tuple(sorted(INSTRUCTIONS))


def make_spec(name: str, tasks: Sequence[str], options: ToyOptions) -> EnvSpec:
    """Builds the description of a toy environment.

    Args:
        name: Name it was asked for by.
        tasks: One of `task_names`.
        options: The options.

    Raises:
        ValueError: More than one task: their states differ in size.
    """
    if len(tasks) > 1:
        raise ValueError(f"{name!r} names {len(tasks)} toy tasks, whose states differ in size; choose one of them")
    identity = tasks[0] == "identity"
    size = options.dimensions
    return EnvSpec(
        name=name,
        tasks=tuple(tasks),
        instructions=(INSTRUCTIONS[tasks[0]],),
        cameras={},
        state_dim=size if identity else 3 * size,
        action_dim=size,
        max_episode_steps=1 if identity else options.max_episode_steps,
        fps=FPS,
        action_low=(-1.0,) * size,
        action_high=(1.0,) * size,
    )


def make_toy_env(spec: EnvSpec, options: ToyOptions, num_envs: int) -> InProcessVectorEnv:
    """Makes the environment that `make_spec` described."""
    kind = IdentityEnv if spec.tasks[0] == "identity" else PointMassEnv
    return kind(spec, options, num_envs)


def _distance(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square over the last axis, so that a tolerance means the same for any number of dimensions."""
    return np.sqrt(np.square(difference).mean(axis=-1))


class _ToyEnv(InProcessVectorEnv):
    def __init__(self, spec: EnvSpec, options: ToyOptions, num_envs: int):
        super().__init__(spec, num_envs)
        self._options = options


class IdentityEnv(_ToyEnv):
    """One step long: state = target, uniform in [−1, 1]; reward −mean((action − target)²), or 1 for success.

    The episode terminates either way: there is nothing after it whose value could be bootstrapped.
    """

    def _start(self, slots: NDArray[np.int64], tasks: NDArray[np.int64], state_ids: NDArray[np.int64]) -> None:
        for slot, state_id in zip(slots, state_ids, strict=True):
            self.states[slot] = np.random.default_rng(int(state_id)).uniform(-1, 1, self._options.dimensions)

    def _advance(self, slots: NDArray[np.int64], actions: NDArray[np.float32]) -> StepResult:
        distance = _distance(actions.astype(np.float64) - self.states[slots])
        success = distance < self._options.tolerance
        rewards = success.astype(float) if self._options.reward == "success" else -np.square(distance)
        return StepResult(rewards, np.ones(len(slots), bool), np.zeros(len(slots), bool), success)


class PointMassEnv(_ToyEnv):
    """State = (position, velocity, goal), each of the options' dimensions; the action is a force.

    Per step of δ = 1/`FPS`: v ← v + δ (`FORCE` · action − `DRAG` · v), x ← x + δ v. It starts at rest, with the goal
    between `CLOSEST` and `FARTHEST` away, and terminates when the mass is within the tolerance of the goal.
    """

    def __init__(self, spec: EnvSpec, options: ToyOptions, num_envs: int):
        super().__init__(spec, options, num_envs)
        self._x, self._v, self._goal = (np.zeros((num_envs, options.dimensions)) for _ in range(3))

    def _start(self, slots: NDArray[np.int64], tasks: NDArray[np.int64], state_ids: NDArray[np.int64]) -> None:
        for slot, state_id in zip(slots, state_ids, strict=True):
            generator = np.random.default_rng(int(state_id))
            self._x[slot] = generator.uniform(-1, 1, self._options.dimensions)
            towards = generator.standard_normal(self._options.dimensions)
            self._goal[slot] = self._x[slot] + towards / _distance(towards) * generator.uniform(CLOSEST, FARTHEST)
        self._v[slots] = 0.0
        self._observe(slots)

    def _observe(self, slots: NDArray[np.int64]) -> None:
        self.states[slots] = np.concatenate([self._x[slots], self._v[slots], self._goal[slots]], axis=1)

    def _advance(self, slots: NDArray[np.int64], actions: NDArray[np.float32]) -> StepResult:
        self._v[slots] += (FORCE * actions - DRAG * self._v[slots]) / FPS
        self._x[slots] += self._v[slots] / FPS
        self._observe(slots)
        distance = _distance(self._goal[slots] - self._x[slots])
        success = distance < self._options.tolerance
        rewards = success.astype(float)
        if self._options.reward == "distance":
            rewards = rewards - distance / FPS
        return StepResult(rewards, success, np.zeros(len(slots), bool), success)

"""Gymnasium environments by id: what they are like, and those without images, such as Pendulum-v1 and MuJoCo's.

Those with images run in worker processes, see `pi_rl.envs.gymnasium_images`. Gymnasium is imported when the first
environment is described, not with this module.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.in_process import InProcessVectorEnv, StepResult
from pi_rl.envs.vector_env import IMAGE_KEY, EnvSpec

DEFAULT_FPS = 30
_NO_LIMIT = -1  # Gymnasium's: the limit is kept here, so that it can be told from an end of the simulator's own


@dataclass(frozen=True)
class GymnasiumOptions:
    """When an episode is cut, and what the environment is made with.

    Attributes:
        max_episode_steps: Steps after which an episode is truncated; None stands for the registered limit.
        make_kwargs: Further arguments of `gymnasium.make`, such as `{"reset_noise_scale": 0.1}`.
    """

    max_episode_steps: int | None = None
    make_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Checks the values; raises ValueError naming the option, what it was given and what is allowed."""
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")
        reserved = sorted({"id", "max_episode_steps", "disable_env_checker"} & set(self.make_kwargs or {}))
        if reserved:
            raise ValueError(f"make_kwargs must not hold {', '.join(reserved)}: pi_rl sets it")


class Features(NamedTuple):
    """Which parts of an observation are what.

    Attributes:
        state: Key of the state within the observation; None where the observation is the state.
        cameras: LeRobot feature key to the key of that image within the observation.
    """

    state: str | None
    cameras: dict[str, str]


def registered_ids() -> tuple[str, ...]:
    """Returns the ids of all registered environments, sorted."""
    import gymnasium

    return tuple(sorted(gymnasium.registry))


def is_known(task: str) -> bool:
    """Whether an id is registered; "module:id" imports the module first, which may register it."""
    module, _, name = task.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            return False
    return name in registered_ids()


def make_spec(name: str, tasks: Sequence[str], options: GymnasiumOptions) -> EnvSpec:
    """Builds the description of Gymnasium environments; each is made once to read its spaces.

    Args:
        name: Name it was asked for by.
        tasks: Environment ids.
        options: The options.

    Returns:
        The specification.

    Raises:
        ValueError: A space is not supported, actions have no bounds, tasks differ in their spaces or time limits,
            there is no time limit, or Gymnasium cannot make the environment.
    """
    described = {task: _describe(task, options) for task in tasks}
    instructions = tuple(description.pop("instruction") for description in described.values())
    first = described[tasks[0]]
    for task, other in described.items():
        if other != first:
            differing = ", ".join(key for key in first if first[key] != other[key])
            raise ValueError(
                f"{tasks[0]} and {task} cannot be trained together: they differ in {differing}. Use one of them, or "
                "set max_episode_steps where only that differs."
            )
    return EnvSpec(name=name, tasks=tuple(tasks), instructions=instructions, **first)


def _describe(task: str, options: GymnasiumOptions) -> dict[str, Any]:
    """The task's own part of the specification."""
    import gymnasium

    env = make_environment(task, options)  # first: it imports the module that registers a "module:id"
    try:
        limit = options.max_episode_steps or gymnasium.spec(task.rpartition(":")[2]).max_episode_steps
        if limit is None:
            raise ValueError(f"{task} has no time limit of its own; set the option max_episode_steps")
        observed = env.observation_space
        state_key, cameras = features(observed, task)
        if not _is_vector(env.action_space):
            raise ValueError(
                f"the action space of {task} is {env.action_space}; only a Box of one dimension is supported. Choose "
                "another environment, or register a wrapped version of it."
            )
        if not env.action_space.is_bounded():
            raise ValueError(
                f"the action space of {task} is {env.action_space}; bounds are needed, which explored actions are "
                "clipped to. Register a version of it in gymnasium.wrappers.TransformAction with a bounded Box."
            )
        return {
            "instruction": str(getattr(env.unwrapped, "instruction", task)),
            "cameras": {camera: observed[key].shape[:2] for camera, key in cameras.items()},
            "state_dim": (observed if state_key is None else observed[state_key]).shape[0],
            "action_dim": env.action_space.shape[0],
            "max_episode_steps": limit,
            "fps": int(env.metadata.get("render_fps", DEFAULT_FPS)),
            "action_low": tuple(env.action_space.low.astype(float).tolist()),
            "action_high": tuple(env.action_space.high.astype(float).tolist()),
        }
    finally:
        env.close()


def _is_vector(space: Any) -> bool:
    from gymnasium.spaces import Box

    return isinstance(space, Box) and len(space.shape) == 1


def features(space: Any, task: str) -> Features:
    """Finds state and images in an observation space.

    Args:
        space: A Box of one dimension, which is the state, or a Dict of one such Box and of uint8 images (height,
            width, 3). A single image is `observation.image`, several are `observation.images.` and their key.
        task: Name for the message.

    Raises:
        ValueError: The space is none of these; the message says what it is and what may be done.
    """
    import gymnasium

    if _is_vector(space):
        return Features(None, {})
    parts = dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {}
    images = [key for key, part in parts.items() if _is_image(part)]
    states = [key for key in parts if key not in images]
    if not images or len(states) != 1 or not _is_vector(parts[states[0]]):
        raise ValueError(
            f"the observation space of {task} is {space}; supported are a Box of one dimension, and a Dict of one "
            "such Box and uint8 images of shape (height, width, 3). Choose another environment, or register a wrapped "
            "version of it (gymnasium.wrappers.AddRenderObservation adds an image)."
        )
    if len(images) == 1:
        return Features(states[0], {IMAGE_KEY: images[0]})
    return Features(states[0], {f"observation.images.{key}": key for key in images})


def _is_image(space: Any) -> bool:
    from gymnasium.spaces import Box

    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def make_environment(task: str, options: GymnasiumOptions) -> Any:
    """Makes one environment, without Gymnasium's time limit.

    Args:
        task: Its id, or "module:id".
        options: The options.

    Raises:
        ValueError: Gymnasium cannot make it.
    """
    import gymnasium

    try:
        return gymnasium.make(
            task, max_episode_steps=_NO_LIMIT, disable_env_checker=True, **dict(options.make_kwargs or {})
        )
    except gymnasium.error.Error as error:
        raise ValueError(
            f"Gymnasium cannot make {task}: {str(error).rstrip('.')}. Install what is missing, or choose another "
            "environment."
        ) from error


class GymnasiumVectorEnv(InProcessVectorEnv):
    """B Gymnasium environments without images in this process.

    The state id is the seed of Gymnasium's `reset`, which by its contract determines the episode. To the bit this is
    tested for classic control and MuJoCo; other simulators, such as Box2D, may carry something over a reset.
    `terminated` is what the environment says: for most it means failure (a pole fell). Success is what
    `info["is_success"]` or `info["success"]` says, False without them.

    Args:
        spec: From `make_spec`.
        options: The options that it was made with.
        num_envs: B, at least 1.
    """

    def __init__(self, spec: EnvSpec, options: GymnasiumOptions, num_envs: int):
        super().__init__(spec, num_envs)
        self._options = options
        self._envs: dict[tuple[int, int], Any] = {}  # by environment and task index, made at their first reset

    def _start(self, slots: NDArray[np.int64], tasks: NDArray[np.int64], state_ids: NDArray[np.int64]) -> None:
        for slot, task, state_id in zip(slots.tolist(), tasks.tolist(), state_ids.tolist(), strict=True):
            if (slot, task) not in self._envs:
                self._envs[slot, task] = make_environment(self.spec.tasks[task], self._options)
            self.states[slot], _ = self._envs[slot, task].reset(seed=state_id)

    def _advance(self, slots: NDArray[np.int64], actions: NDArray[np.float32]) -> StepResult:
        outcomes, problems = [], {}
        for slot, action in zip(slots.tolist(), actions, strict=True):
            try:
                outcomes.append(self._step(slot, action))
            except Exception as error:  # one environment must not take the others with it
                outcomes.append((0.0, False, False, False))
                problems[slot] = f"{type(error).__name__}: {error}"
                del self._envs[slot, int(self._ids[slot, 0])]  # the next reset makes another
        rewards, terminated, truncated, success = map(np.asarray, zip(*outcomes, strict=True))
        return StepResult(rewards, terminated, truncated, success, problems)

    def _step(self, slot: int, action: NDArray[np.float32]) -> tuple[float, bool, bool, bool]:
        """Steps one environment and writes its state; returns reward, terminated, truncated, success."""
        env = self._envs[slot, int(self._ids[slot, 0])]
        self.states[slot], reward, terminated, truncated, info = env.step(action.astype(env.action_space.dtype))
        success = bool(info.get("is_success", info.get("success", False)))
        return float(reward), bool(terminated), bool(truncated), success

    def _free(self) -> None:
        for env in self._envs.values():
            env.close()
        self._envs.clear()

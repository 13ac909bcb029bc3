"""Gymnasium environments with camera images, in worker processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.gymnasium_env import GymnasiumOptions, features, make_environment
from pi_rl.envs.simulator import Images


class GymnasiumSim:
    """One Gymnasium environment whose observation is a Dict of a state and images.

    The state id is the seed of Gymnasium's `reset`, which by its contract determines the episode. The episode ends
    when the environment says so, and when `info["is_success"]` or `info["success"]` says that the task is solved.
    Every observation holds its images, so Gymnasium draws in each step although a policy needs them once per chunk.

    Attributes:
        env: The environment.
        steps: Steps since the reset.
        reward: Of the last step, the environment's own.
        over: Whether the environment ended the episode.
        cut: Whether it truncated the episode.
    """

    def __init__(self, task: str, options: GymnasiumOptions):
        """Makes the environment; `reset` must come before anything else.

        Args:
            task: Gymnasium's id, or "module:id".
            options: The options.
        """
        self.env = make_environment(task, options)
        space = self.env.action_space
        self._low, self._high, self._dtype = space.low, space.high, space.dtype
        self._state_key, self._cameras = features(self.env.observation_space, task)
        self._observation: Mapping[Any, NDArray[Any]] = {}
        self.steps, self.reward, self.over, self.cut = 0, 0.0, False, False

    def reset(self, state_id: int) -> None:
        """Starts the episode with that seed."""
        self._observation, _ = self.env.reset(seed=state_id)
        self.steps, self.reward, self.over, self.cut = 0, 0.0, False, False

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes one action (A,), clipped to the bounds; returns whether the task is solved."""
        clipped = np.clip(action, self._low, self._high).astype(self._dtype)
        self._observation, reward, self.over, self.cut, info = self.env.step(clipped)
        self.reward = float(reward)
        self.steps += 1
        return bool(info.get("is_success", info.get("success", False)))

    @property
    def state(self) -> NDArray[np.float32]:
        """The observation's vector, float32 (state_dim,)."""
        return np.asarray(self._observation[self._state_key], np.float32)

    def draw(self, images: Images) -> None:
        """Writes the images of the last observation."""
        for camera, out in images.items():
            out[...] = self._observation[self._cameras[camera]]

    def frame(self, height: int, width: int, *, show_arm: bool) -> NDArray[np.uint8]:
        """Scales a picture to a video's size: Gymnasium's own with `render_mode="rgb_array"`, else the first image.

        Args:
            height: Pixels.
            width: Pixels.
            show_arm: Has no meaning here.

        Returns:
            uint8 (height, width, 3); the nearest pixels, nothing between them.
        """
        if self.env.render_mode == "rgb_array":
            picture = self.env.render()
        else:
            picture = self._observation[next(iter(self._cameras.values()))]
        rows = np.arange(height) * picture.shape[0] // height
        columns = np.arange(width) * picture.shape[1] // width
        return picture[rows[:, None], columns]

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


class GymnasiumBackend:
    """Gymnasium environments inside one worker process."""

    max_idle = 4

    def __init__(self, tasks: Sequence[str], options: Mapping[str, Any]):
        """Prepares; environments are made at their first reset.

        Args:
            tasks: Gymnasium's ids, or "module:id".
            options: Fields of `GymnasiumOptions`.
        """
        self._tasks = tasks
        self._options = GymnasiumOptions(**options)

    def make(self, task: int) -> GymnasiumSim:
        """Makes one more environment of the task with that index.

        Raises:
            ValueError: Gymnasium does not know the id in this process, or cannot make it.
        """
        name = self._tasks[task]
        try:
            return GymnasiumSim(name, self._options)
        except ValueError as error:
            if ":" in name:
                raise
            hint = f"Environments with images run in processes of their own: name the module, as in my_module:{name}."
            raise ValueError(f"{error} {hint}") from error

    def expert_action(self, sim: GymnasiumSim) -> NDArray[np.float32]:
        """What the environment's own method `expert_action()` returns, float32 (A,).

        Raises:
            ValueError: It has no such method.
        """
        expert = getattr(sim.env.unwrapped, "expert_action", None)
        if expert is None:
            raise ValueError(
                f"{type(sim.env.unwrapped).__name__} has no scripted expert: give it a method expert_action() that "
                "returns the action for its present state, or use a dataset or a fine-tuned policy."
            )
        return np.array(expert(), np.float32)

    def close(self) -> None:
        """Does nothing: environments end with their process."""

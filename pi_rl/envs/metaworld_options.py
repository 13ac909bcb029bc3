"""Options, instructions and description of MetaWorld environments; imports no simulator."""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi_rl.envs.rewards import check_reward
from pi_rl.envs.vector_env import IMAGE_KEY, EnvSpec

STATE_DIM = 4
ACTION_DIM = 4
FPS = 80
CAMERAS = ("corner2", "corner", "corner3", "topview", "behindGripper", "gripperPOV")
WRIST_CAMERAS = ("behindGripper", "gripperPOV")


DIFFICULTIES = ("easy", "medium", "hard", "very_hard")
ML45_TEST = ("bin-picking-v3", "box-close-v3", "door-lock-v3", "door-unlock-v3", "hand-insert-v3")
"""The tasks that MetaWorld's ML45 holds out; the other 45 are its training tasks."""


@functools.cache
def _lerobot_table() -> dict[str, Any]:
    """LeRobot's file of MetaWorld tasks, read without importing LeRobot.

    Raises:
        RuntimeError: LeRobot is not installed or its file is elsewhere.
    """
    lerobot = importlib.util.find_spec("lerobot")
    if lerobot is None or lerobot.origin is None:
        raise RuntimeError("the instructions of MetaWorld's tasks come with lerobot 0.6, which is not installed")
    path = Path(lerobot.origin).parent / "envs" / "metaworld_config.json"
    if not path.is_file():
        raise RuntimeError(f"lerobot's table of MetaWorld instructions is not at {path}; install lerobot 0.6")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def task_instructions() -> dict[str, str]:
    """Returns the 50 task names with LeRobot's instruction of each.

    Checkpoints and datasets of LeRobot's MetaWorld use exactly these sentences, so they are not reworded here.

    Raises:
        RuntimeError: LeRobot is not installed or its file is elsewhere.
    """
    return dict(_lerobot_table()["TASK_DESCRIPTIONS"])


def difficulty_groups() -> dict[str, tuple[str, ...]]:
    """Returns the tasks of each difficulty, sorted: 28 easy, 11 medium, 6 hard, 5 very hard.

    It is the division by which SmolVLA and the paper (Table 4) report; it comes with LeRobot.

    Raises:
        RuntimeError: LeRobot is not installed or its file is elsewhere.
    """
    tasks = _lerobot_table()["DIFFICULTY_TO_TASKS"]
    return {difficulty: tuple(sorted(tasks[difficulty])) for difficulty in DIFFICULTIES}


def task_groups() -> dict[str, tuple[str, ...]]:
    """Returns all names that stand for several tasks: `mt50`, `ml45_train`, `ml45_test` and the four difficulties.

    Raises:
        RuntimeError: LeRobot is not installed or its file is elsewhere.
    """
    every = tuple(sorted(task_instructions()))
    train = tuple(task for task in every if task not in ML45_TEST)
    return {"mt50": every, "ml45_train": train, "ml45_test": ML45_TEST, **difficulty_groups()}


@dataclasses.dataclass(frozen=True)
class MetaWorldOptions:
    """How MetaWorld looks, how widely its objects are placed, and when an episode is cut.

    The defaults draw LeRobot's picture (its `corner2`) at a small size.

    Attributes:
        image_size: Pixels, one number or (height, width); LeRobot uses 480.
        camera: One of `CAMERAS`. `corner2` is moved and flipped on both axes as LeRobot does.
        camera_pos: Another camera position, metres (for wrist cameras in the frame of their body).
        camera_lookat: Point the camera is turned to, metres, z up; only for cameras fixed to the world. The image is
            then upright and is not flipped.
        camera_fovy: Another vertical field of view, degrees in (0, 180).
        fast_rendering: No shadows, reflections and multisampling: 16 times faster in software (6 ms instead of
            100 ms at 64 pixels), other pixels.
        hide_arm: The arm is not drawn, the hand with its two fingers is: 4 times faster on top of `fast_rendering`
            (1.4 ms), and nothing is hidden behind the arm.
        object_range: Per task, bounds of the random placement in place of MetaWorld's own: `{"low": [...], "high":
            [...]}` with x, y, z of the object, for some tasks followed by x, y, z of the goal; metres.
        object_spread: Factor on the width of the random placement about its centre, in x and y only (z keeps objects
            on the table). Widened bounds stop at the box the hand can reach. Not for tasks in `object_range`.
        max_episode_steps: Steps after which an episode without success is truncated (80 steps are a second).
        reward: "success" pays 1 for solving the task; "structured" also 0.1 for holding an object, as the paper does
            in ManiSkill (see `pi_rl.envs.rewards.TaskReward`). Held is what both finger pads press on and can move.
        blind: The image is a constant mid-grey: the control that shows what sight is worth.
    """

    image_size: int | tuple[int, int] = 64
    camera: str = "corner2"
    camera_pos: tuple[float, float, float] | None = None
    camera_lookat: tuple[float, float, float] | None = None
    camera_fovy: float | None = None
    fast_rendering: bool = False
    hide_arm: bool = False
    object_range: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    object_spread: float = 1.0
    max_episode_steps: int = 150
    reward: str = "success"
    blind: bool = False

    def __post_init__(self) -> None:
        """Checks the values; raises ValueError naming the option, what it was given and what is allowed."""
        size = tuple(self.image_size) if isinstance(self.image_size, list | tuple) else (self.image_size,) * 2
        if len(size) != 2 or not all(isinstance(n, int) and 8 <= n <= 2048 for n in size):
            raise ValueError(f"image_size must be a number or (height, width), 8 to 2048, got {self.image_size!r}")
        if self.camera not in CAMERAS:
            raise ValueError(f"camera must be one of {', '.join(CAMERAS)}, got {self.camera!r}")
        for option in ("camera_pos", "camera_lookat"):
            value = getattr(self, option)
            if value is not None and not (np.shape(value) == (3,) and np.isfinite(value).all()):
                raise ValueError(f"{option} must be three finite numbers (metres), got {value!r}")
        if self.camera_lookat is not None and self.camera in WRIST_CAMERAS:
            raise ValueError(f"camera_lookat needs a camera fixed to the world, and {self.camera} rides on the hand")
        if self.camera_fovy is not None and not 0 < self.camera_fovy < 180:
            raise ValueError(f"camera_fovy must be between 0 and 180 degrees, got {self.camera_fovy}")
        if not 0 <= self.object_spread < np.inf:
            raise ValueError(
                f"object_spread must be finite and at least 0 (1 = as in MetaWorld), got {self.object_spread}"
            )
        if self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")
        check_reward(self.reward)
        for task, bounds in (self.object_range or {}).items():
            _check_range(task, bounds)

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width  # a list, as it comes from YAML, becomes a tuple


def _check_range(task: str, bounds: Mapping[str, Sequence[float]]) -> None:
    if set(bounds) != {"low", "high"}:
        raise ValueError(f"object_range of {task} must have the keys low and high, got {sorted(bounds)}")
    low, high = np.asarray(bounds["low"], float), np.asarray(bounds["high"], float)
    if low.shape != high.shape or low.shape not in ((3,), (6,)):
        raise ValueError(f"object_range of {task}: low and high must both have 3 or 6 numbers, got {bounds!r}")
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise ValueError(f"object_range of {task}: each low must be finite and at most its high, got {bounds!r}")


def make_spec(name: str, tasks: Sequence[str], options: MetaWorldOptions) -> EnvSpec:
    """Builds the description of a MetaWorld environment without starting a simulator.

    Args:
        name: Name it was asked for by.
        tasks: Names from `task_instructions`.
        options: The options.

    Returns:
        The specification.

    Raises:
        ValueError: `object_range` names a task that is not among `tasks`.
    """
    unknown = sorted(set(options.object_range or {}) - set(tasks))
    if unknown:
        raise ValueError(f"object_range names {', '.join(unknown)}, but the tasks are {', '.join(tasks)}")
    present = {group: tuple(t for t in members if t in tasks) for group, members in difficulty_groups().items()}
    groups = {group: members for group, members in present.items() if members}
    return EnvSpec(
        name=name,
        tasks=tuple(tasks),
        instructions=tuple(task_instructions()[task] for task in tasks),
        cameras={IMAGE_KEY: options.size},
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        max_episode_steps=options.max_episode_steps,
        fps=FPS,
        action_low=(-1.0,) * ACTION_DIM,
        action_high=(1.0,) * ACTION_DIM,
        task_groups=groups if len(groups) > 1 else {},  # one group alone would repeat the numbers of all tasks
    )

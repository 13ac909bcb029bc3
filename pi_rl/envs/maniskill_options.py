"""Options, groups and description of ManiSkill environments; imports no simulator."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi_rl.envs.maniskill_tasks.table import TASKS, ManiSkillTask
from pi_rl.envs.rewards import check_reward
from pi_rl.envs.vector_env import IMAGE_KEY, EnvSpec

BACKENDS = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class ManiSkillOptions:
    """How ManiSkill is simulated, what the camera sees, and when an episode is cut.

    The defaults are ManiSkill's own camera and the task's time limit. CPU and GPU physics are not the same: success
    rates of one must not be compared with those of the other.

    Attributes:
        image_size: Pixels, one number or (height, width); None is the task's own (128 x 128 for most tasks, 480 x 640
            for SIMPLER).
        camera_pos: Another camera position, metres, z up.
        camera_lookat: Point the camera is turned to, metres; together with `camera_pos`.
        camera_fovy: Another vertical field of view, degrees in (0, 180).
        hide_arm: The robot's arm is not drawn, its hand is: 7 times faster in software at 64 pixels (4 instead of
            28 ms), other pixels.
        max_episode_steps: Steps after which an episode without success is truncated; None is the task's own limit.
        reward: "success" pays 1 for solving the task; "structured" also 0.1 for an object attached to the gripper (see
            `pi_rl.envs.rewards.TaskReward`).
        use_multiple_plates: The generalisation task puts objects onto 17 receptacles instead of one.
        backend: "cpu": one simulator per environment in worker processes, physics and software Vulkan on the CPU;
            "gpu": one batched simulation of all environments, on the GPU.
        assets: Folder of downloaded assets, the one that ManiSkill calls MS_ASSET_DIR (with a folder `data` in it);
            None is that variable, or ~/.maniskill.
        blind: The image is a constant mid-grey: the control that shows what sight is worth.
    """

    image_size: int | tuple[int, int] | None = None
    camera_pos: tuple[float, float, float] | None = None
    camera_lookat: tuple[float, float, float] | None = None
    camera_fovy: float | None = None
    hide_arm: bool = False
    max_episode_steps: int | None = None
    reward: str = "success"
    use_multiple_plates: bool = True
    backend: str = "cpu"
    assets: str | None = None
    blind: bool = False

    def __post_init__(self) -> None:
        """Checks the values; raises ValueError naming the option, what it was given and what is allowed."""
        if self.image_size is not None:
            size = tuple(self.image_size) if isinstance(self.image_size, list | tuple) else (self.image_size,) * 2
            if len(size) != 2 or not all(isinstance(n, int) and 8 <= n <= 2048 for n in size):
                raise ValueError(
                    f"image_size must be a number or (height, width), 8 to 2048, or None, got {self.image_size!r}"
                )
        for option in ("camera_pos", "camera_lookat"):
            value = getattr(self, option)
            if value is not None and not (np.shape(value) == (3,) and np.isfinite(value).all()):
                raise ValueError(f"{option} must be three finite numbers (metres), got {value!r}")
        if (self.camera_pos is None) != (self.camera_lookat is None):
            raise ValueError("camera_pos and camera_lookat belong together: give both or neither")
        if self.camera_fovy is not None and not 0 < self.camera_fovy < 180:
            raise ValueError(f"camera_fovy must be between 0 and 180 degrees, got {self.camera_fovy}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1 or None, got {self.max_episode_steps}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        check_reward(self.reward)

    @property
    def moves_camera(self) -> bool:
        """Whether the camera differs from the task's own in more than its size."""
        return self.camera_pos is not None or self.camera_fovy is not None

    @property
    def asset_folder(self) -> Path:
        """The folder of assets."""
        return Path(self.assets or os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill").absolute()

    def size(self, task: ManiSkillTask) -> tuple[int, int]:
        """Returns the (height, width) of a task's images in pixels."""
        if self.image_size is None:
            return task.size
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    def kwargs(self, task: ManiSkillTask) -> dict[str, Any]:
        """Returns the task's own arguments of `gym.make`, under these options."""
        chosen = {"use_multiple_plates": self.use_multiple_plates}
        return {key: chosen.get(key, value) for key, value in task.kwargs.items()}


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks, sorted."""
    return tuple(sorted(TASKS))


def groups() -> dict[str, tuple[str, ...]]:
    """Returns the names that stand for several tasks, such as "simpler"."""
    names = dict.fromkeys(group for task in TASKS.values() for group in task.groups)
    return {name: tuple(key for key, task in TASKS.items() if name in task.groups) for name in names}


def make_spec(name: str, tasks: Sequence[str], options: ManiSkillOptions) -> EnvSpec:
    """Builds the description of a ManiSkill environment without starting a simulator.

    Args:
        name: Name it was asked for by.
        tasks: Names from `TASKS`.
        options: The options.

    Returns:
        The specification. Where tasks have different time limits or numbers of evaluation states, the largest limit
        and the smallest number hold for all.

    Raises:
        ValueError: The tasks do not fit into one environment, or an option does not fit a task.
    """
    chosen = [TASKS[task] for task in tasks]
    first = chosen[0]
    for task in chosen:
        _check_task(task, options)
        for what in ("control_mode", "action_low", "action_high", "state", "fps"):
            if getattr(task, what) != getattr(first, what):
                raise ValueError(
                    f"{first.env_id} and {task.env_id} cannot share an environment: their {what} differs "
                    f"({getattr(first, what)} and {getattr(task, what)}); make one for each"
                )
        if options.size(task) != options.size(first):
            raise ValueError(
                f"the images of {first.env_id} and {task.env_id} are {first.size} and {task.size} pixels (height, "
                "width); set image_size, and all have that size"
            )
    if options.backend == "gpu" and len(chosen) > 1:
        raise ValueError(f"a batched simulation (backend: gpu) runs one task, got {', '.join(tasks)}")
    return EnvSpec(
        name=name,
        tasks=tuple(tasks),
        instructions=tuple(task.instruction for task in chosen),
        cameras={IMAGE_KEY: options.size(first)},
        state_dim=first.state_dim,
        action_dim=len(first.action_low),
        max_episode_steps=options.max_episode_steps or max(task.max_episode_steps for task in chosen),
        fps=first.fps,
        action_low=first.action_low,
        action_high=first.action_high,
        eval_states=min(task.eval_states for task in chosen),
        task_groups=_groups_among(tasks),
        instruction_of=_instruction_of(chosen, options),
    )


def _groups_among(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The groups that several of the tasks belong to but not all of them do, such as the paper's "ood_vision"."""
    among = {name: tuple(task for task in members if task in tasks) for name, members in groups().items()}
    return {name: members for name, members in among.items() if 0 < len(members) < len(tasks)}


def _check_task(task: ManiSkillTask, options: ManiSkillOptions) -> None:
    """Raises ValueError for options that make no sense with a task."""
    if options.reward == "structured" and task.attached is None:
        able = ", ".join(key for key, other in TASKS.items() if other.attached is not None)
        raise ValueError(
            f"reward='structured' pays for an object in the gripper, and {task.env_id} takes up none; use 'success', "
            f"or one of {able}"
        )
    if options.hide_arm and not task.hand:
        raise ValueError(f"hide_arm is not possible in {task.env_id}: its picture is composed with the whole robot")
    if task.resampled and options.moves_camera:
        raise ValueError(
            f"the camera of {task.env_id} cannot be moved: a photograph taken from there is its background"
        )


def _instruction_of(tasks: Sequence[ManiSkillTask], options: ManiSkillOptions) -> Any:
    if all(task.instruction_of is None for task in tasks):
        return None
    return functools.partial(_instruction, tuple(task.env_id for task in tasks), [options.kwargs(t) for t in tasks])


def _instruction(names: Sequence[str], kwargs: Sequence[Mapping[str, Any]], task: int, state_id: int, _: int) -> str:
    one = TASKS[names[task]]
    return one.instruction if one.instruction_of is None else one.instruction_of(state_id, kwargs[task])


def check_assets(tasks: Sequence[ManiSkillTask], folder: Path) -> None:
    """Checks that the tasks' files are there.

    Args:
        tasks: The tasks.
        folder: `ManiSkillOptions.asset_folder`.

    Raises:
        FileNotFoundError: Naming the missing files, where they were looked for and where they come from.
    """
    for task in tasks:
        missing = [path for path in task.assets if not (folder / path).exists()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise FileNotFoundError(
                f"{task.env_id} needs {', '.join(missing[:5])}{more} in {folder}, which is not there. "
                f"{task.assets_source} Another folder can be named by the option assets or by MS_ASSET_DIR."
            )

"""Options, instructions, files and description of LIBERO environments; imports no simulator."""

import dataclasses
import functools
import importlib.util
import os
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

from pi_rl.envs.rewards import check_reward
from pi_rl.envs.vector_env import EnvSpec

SUITES = {"spatial": "libero_spatial", "object": "libero_object", "goal": "libero_goal", "long": "libero_10"}
"""First part of our task names to LIBERO's name of the suite."""
HORIZONS = {"spatial": 280, "object": 280, "goal": 300, "long": 520}
"""Steps after which LeRobot's evaluation gives up. Training in the paper's Table 7 uses 240, 320, 320 and 480."""
CAMERA_KEYS = {"agentview": "observation.images.image", "wrist": "observation.images.image2"}
"""Our camera names to LeRobot's feature keys."""
STATE_DIM = 8
ACTION_DIM = 7
FPS = 20
INITIAL_STATES = 50
TASKS_PER_SUITE = 10
SETTLE_STEPS = 10

ASSETS_VARIABLE = "PI_RL_LIBERO_ASSETS"
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")
ASSETS_COMMAND = "pi-rl assets libero"
ASSETS_SOURCE = "the dataset lerobot/libero-assets on the Hugging Face Hub"


@dataclasses.dataclass(frozen=True)
class LiberoTask:
    """One task of a suite.

    Attributes:
        name: Our name, such as "spatial-0": suite and position in LIBERO's own order.
        suite: Key of `SUITES`.
        stem: LIBERO's name, which is also that of its files.
        instruction: What LeRobot's environment and data sets say, taken from the file name as LIBERO does.
    """

    name: str
    suite: str
    stem: str
    instruction: str

    @property
    def bddl_file(self) -> Path:
        """The scene and the goal."""
        return libero_folder() / "bddl_files" / SUITES[self.suite] / f"{self.stem}.bddl"

    @property
    def states_file(self) -> Path:
        """The fixed initial states."""
        return libero_folder() / "init_files" / SUITES[self.suite] / f"{self.stem}.pruned_init"


@functools.cache
def libero_folder() -> Path:
    """The folder of hf-libero's inner package, found without importing it: at its import LIBERO may ask questions.

    Raises:
        RuntimeError: hf-libero is not installed.
    """
    found = importlib.util.find_spec("libero")
    if found is None or found.origin is None:
        raise RuntimeError("LIBERO is not installed; run `pip install 'pi_rl[libero]'` (the package hf-libero)")
    return Path(found.origin).parent / "libero"


@functools.cache
def tasks() -> dict[str, LiberoTask]:
    """All tasks by our names, suites and tasks in LIBERO's order.

    Raises:
        RuntimeError: hf-libero is not installed, or its table is elsewhere.
    """
    table = libero_folder() / "benchmark" / "libero_suite_task_map.py"
    if not table.is_file():
        raise RuntimeError(f"LIBERO's table of tasks is not at {table}; install hf-libero 0.1.4")
    stems = runpy.run_path(str(table))["libero_task_map"]
    return {
        f"{suite}-{number}": LiberoTask(f"{suite}-{number}", suite, stem, _instruction(stem))
        for suite, theirs in SUITES.items()
        for number, stem in enumerate(stems[theirs])
    }


def _instruction(stem: str) -> str:
    """LIBERO's words: the file's name without the scene that names of the long suite begin with."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", stem).replace("_", " ")


def task_names() -> tuple[str, ...]:
    """All task names, known without LIBERO: `spatial-0` to `spatial-9`, then object, goal and long."""
    return tuple(name for suite in SUITES for name in groups()[suite])


def groups() -> dict[str, tuple[str, ...]]:
    """The suites by our names; `10` is LIBERO's own name of the long one."""
    suites = {suite: tuple(f"{suite}-{number}" for number in range(TASKS_PER_SUITE)) for suite in SUITES}
    return {**suites, "10": suites["long"]}


def asset_places() -> dict[str, Path]:
    """Where assets are looked for when no option says it, in that order: what the place is, and its folder."""
    given = os.environ.get(ASSETS_VARIABLE)
    places = {f"the environment variable {ASSETS_VARIABLE}": Path(given)} if given else {}
    return {
        **places,
        "inside hf-libero": libero_folder() / "assets",
        "LIBERO's cache": Path.home() / ".cache" / "libero" / "assets",
    }


def find_assets(path: str | None = None) -> Path:
    """Finds LIBERO's meshes, textures and scenes, which its package lacks.

    Args:
        path: The folder, or None for the first of `asset_places` that has them.

    Returns:
        A folder with all of `ASSET_FOLDERS`.

    Raises:
        FileNotFoundError: There is none; or the one that was named, here or in the environment variable, is
            incomplete. The message names what is missing and the command that gets it.
    """
    named = {"the option assets": Path(path).expanduser()} if path else {}
    places = named or asset_places()
    for place, folder in places.items():
        missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
        if not missing:
            return folder.resolve()
        if folder.is_dir() or named or ASSETS_VARIABLE in place:
            raise FileNotFoundError(
                f"LIBERO's assets are incomplete: {folder} ({place}) lacks {', '.join(missing)}. {_remedy()}"
            )
    looked = "; ".join(f"{folder} ({place})" for place, folder in places.items())
    raise FileNotFoundError(f"LIBERO's assets (meshes, textures, scenes) are in none of {looked}. {_remedy()}")


def _remedy() -> str:
    return (
        f"Run `{ASSETS_COMMAND}`, which gets them from {ASSETS_SOURCE}, or name a folder that holds "
        f"{', '.join(ASSET_FOLDERS)} with the option assets or the environment variable {ASSETS_VARIABLE}."
    )


@dataclasses.dataclass(frozen=True)
class LiberoOptions:
    """How LIBERO looks and when an episode is cut. The defaults are LeRobot's environment.

    Attributes:
        image_size: Pixels, one number or (height, width), of every camera. LeRobot's data sets have 256;
            `lerobot-eval` asks for 360 unless told otherwise.
        cameras: Some of "agentview" (`observation.images.image`) and "wrist" (`observation.images.image2`).
        fast_rendering: No reflections and no multisampling: 3 times faster in software, other pixels.
        hide_arm: The arm and its pedestal are not drawn, hand and fingers are: 2.5 times faster on top of
            `fast_rendering`, and nothing is hidden behind the arm.
        settle_steps: Steps in which the robot holds still after a reset, until objects lie.
        max_episode_steps: Steps after which an episode without success is truncated (20 are a second). None takes
            `HORIZONS`, those of LeRobot's evaluation; with tasks of several suites the longest of theirs.
        reward: "success" pays 1 for solving the task; "structured" also 0.1 for holding a thing that can move (see
            `pi_rl.envs.rewards.TaskReward`). The paper trains LIBERO with "success".
        blind: The images are a constant mid-grey: the control that shows what sight is worth.
        assets: Folder of LIBERO's meshes, textures and scenes; None looks where `find_assets` says.
    """

    image_size: int | tuple[int, int] = 256
    cameras: Sequence[str] = ("agentview", "wrist")
    fast_rendering: bool = False
    hide_arm: bool = False
    settle_steps: int = SETTLE_STEPS
    max_episode_steps: int | None = None
    reward: str = "success"
    blind: bool = False
    assets: str | None = None

    def __post_init__(self) -> None:
        """Checks the values; raises ValueError naming the option, what it was given and what is allowed."""
        size = tuple(self.image_size) if isinstance(self.image_size, list | tuple) else (self.image_size,) * 2
        if len(size) != 2 or not all(isinstance(n, int) and 8 <= n <= 2048 for n in size):
            raise ValueError(f"image_size must be a number or (height, width), 8 to 2048, got {self.image_size!r}")
        cameras = [self.cameras] if isinstance(self.cameras, str) else list(self.cameras)
        if not cameras or len(set(cameras)) < len(cameras) or not set(cameras) <= set(CAMERA_KEYS):
            raise ValueError(f"cameras must be one or both of {', '.join(CAMERA_KEYS)}, got {self.cameras!r}")
        if not 1 <= self.settle_steps <= 1000:
            raise ValueError(f"settle_steps must be in 1 to 1000 (LeRobot: {SETTLE_STEPS}), got {self.settle_steps}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1 (or None), got {self.max_episode_steps}")
        check_reward(self.reward)

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width  # a list, as it comes from YAML, becomes a tuple

    @property
    def drawn(self) -> tuple[str, ...]:
        """The cameras, in the order of `CAMERA_KEYS`."""
        wanted = [self.cameras] if isinstance(self.cameras, str) else self.cameras
        return tuple(camera for camera in CAMERA_KEYS if camera in wanted)


def make_spec(name: str, chosen: Sequence[str], options: LiberoOptions) -> EnvSpec:
    """Builds the description of a LIBERO environment without starting a simulator.

    Args:
        name: Name it was asked for by.
        chosen: Some of `task_names`.
        options: The options.

    Returns:
        The specification. Its task groups are the suites, where there are several.
    """
    described = [tasks()[task] for task in chosen]
    suites = [suite for suite in SUITES if any(task.suite == suite for task in described)]
    by_suite = {suite: tuple(task.name for task in described if task.suite == suite) for suite in suites}
    return EnvSpec(
        name=name,
        tasks=tuple(chosen),
        instructions=tuple(task.instruction for task in described),
        cameras={CAMERA_KEYS[camera]: options.size for camera in options.drawn},
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        max_episode_steps=options.max_episode_steps or max(HORIZONS[suite] for suite in suites),
        fps=FPS,
        action_low=(-1.0,) * ACTION_DIM,
        action_high=(1.0,) * ACTION_DIM,
        eval_states=INITIAL_STATES,
        task_groups=by_suite if len(suites) > 1 else {},
    )

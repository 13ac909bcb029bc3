"""Options and description of CALVIN environments; imports no simulator and needs no checkout."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from pi_rl.envs import calvin_install
from pi_rl.envs.calvin_sequences import EVAL_SEQUENCES, SUBTASKS, CalvinSequences
from pi_rl.envs.vector_env import EnvSpec

STATIC_CAMERA = "observation.images.image"
GRIPPER_CAMERA = "observation.images.image2"
ROBOT_STATE_DIM = 15
TCP_STATE_DIM = 7
ACTION_DIM = 7
FPS = 30
STEPS_PER_SUBTASK = 360
TRAIN_SCENES = {"abc_d": "ABC", "d_d": "D"}
"""Task to the scenes of its training states; the evaluation states of both are CALVIN's 1,000 sequences in scene D."""


@dataclasses.dataclass(frozen=True)
class CalvinOptions:
    """Where CALVIN is, what a policy sees of it, and when an episode is cut.

    Attributes:
        root: Checkout of github.com/mees/calvin; by default `PI_RL_CALVIN_ROOT`.
        python: Interpreter with pybullet; by default `PI_RL_CALVIN_PYTHON`, else `.venv/bin/python` in the checkout.
        static_size: Pixels of the square image of the static camera, 8 to 2048; CALVIN's data have 200.
        gripper_size: Pixels of the square image of the camera on the gripper, 8 to 2048; CALVIN's data have 84.
        joint_state: The state is all 15 numbers of CALVIN's `robot_obs` (hand position and Euler angles, gripper
            opening, seven joint angles, last gripper action) instead of its first 7, which openpi policies take.
        max_episode_steps: Steps after which an episode is truncated (30 steps are a second).
        steps_per_subtask: Steps after which an unsolved subtask ends the episode; CALVIN's evaluation has 360.
        egl: Render by OpenGL through pybullet's EGL plugin, for machines with a GPU; by default on the CPU, with other
            pixels.
        blind: The images are a constant mid-grey: the control that shows what sight is worth.
    """

    root: str | None = None
    python: str | None = None
    static_size: int = 200
    gripper_size: int = 84
    joint_state: bool = False
    max_episode_steps: int = SUBTASKS * STEPS_PER_SUBTASK
    steps_per_subtask: int = STEPS_PER_SUBTASK
    egl: bool = False
    blind: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers; raises ValueError naming the option, what it was given and what is allowed."""
        for option in ("static_size", "gripper_size"):
            value = getattr(self, option)
            if not (isinstance(value, int) and 8 <= value <= 2048):
                raise ValueError(f"{option} must be a whole number of pixels from 8 to 2048, got {value!r}")
        for option in ("max_episode_steps", "steps_per_subtask"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")

    def located(self) -> "CalvinOptions":
        """The same options with the paths of a checkout and an interpreter that exist and suffice.

        Raises:
            FileNotFoundError: One does not; the message gives the commands that install it.
        """
        root = calvin_install.find_root(self.root)
        return dataclasses.replace(self, root=str(root), python=calvin_install.find_python(self.python, root))


def sequences_of(root: str | None) -> CalvinSequences:
    """The sequences of a checkout, drawn once per process.

    Args:
        root: As `CalvinOptions.root`.

    Raises:
        FileNotFoundError: There is no checkout, or a part of it is missing.
        ValueError: A file of it has not the expected content.
    """
    return _open_sequences(calvin_install.find_root(root))


@functools.cache
def _open_sequences(root: Path) -> CalvinSequences:
    return CalvinSequences(root)


def task_names() -> tuple[str, ...]:
    """Returns the tasks, sorted."""
    return tuple(sorted(TRAIN_SCENES))


def make_spec(name: str, tasks: Sequence[str], options: CalvinOptions) -> EnvSpec:
    """Builds the description of a CALVIN environment; the checkout is opened by the first instruction, not here.

    Args:
        name: Name it was asked for by.
        tasks: Of `TRAIN_SCENES`.
        options: The options.
    """
    return EnvSpec(
        name=name,
        tasks=tuple(tasks),
        instructions=("five subtasks one after another",) * len(tasks),
        cameras={
            STATIC_CAMERA: (options.static_size, options.static_size),
            GRIPPER_CAMERA: (options.gripper_size, options.gripper_size),
        },
        state_dim=ROBOT_STATE_DIM if options.joint_state else TCP_STATE_DIM,
        action_dim=ACTION_DIM,
        max_episode_steps=options.max_episode_steps,
        fps=FPS,
        action_low=(-1.0,) * ACTION_DIM,
        action_high=(1.0,) * ACTION_DIM,
        eval_states=EVAL_SEQUENCES,
        subtasks=SUBTASKS,
        instruction_of=functools.partial(instruction, tuple(tasks), options.root),
    )


def instruction(tasks: Sequence[str], root: str | None, task: int, state_id: int, solved: int) -> str:
    """What a policy is told: the sentence of the subtask that is to be solved now.

    Args:
        tasks: Of the environment.
        root: As `CalvinOptions.root`.
        task: Index into `tasks`.
        state_id: Of the episode.
        solved: Subtasks solved so far; once all are, the last one's sentence stays.
    """
    sequences = sequences_of(root)
    episode = sequences.episode(state_id, TRAIN_SCENES[tasks[task]])
    return sequences.sentence(episode.subtasks[min(solved, SUBTASKS - 1)])

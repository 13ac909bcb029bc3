"""CALVIN for reinforcement learning: runs under the interpreter that has pybullet, in a worker process.

Python 3.11, numpy 1 and the modules of `pi_rl.envs` are all there is; calvin_env is imported from the user's checkout.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.calvin_install import CONFIGURATION, DATA, INSTALL, ORACLE
from pi_rl.envs.calvin_options import (
    GRIPPER_CAMERA,
    ROBOT_STATE_DIM,
    STATIC_CAMERA,
    TCP_STATE_DIM,
    TRAIN_SCENES,
    CalvinOptions,
    sequences_of,
)
from pi_rl.envs.simulator import Images

MID_GREY = 127
PHYSICS_HZ = 240.0
CONTROL_HZ = 30
OPEN, CLOSED = 1.0, -1.0
EGL_LOADS = 20
"""Episodes after which the simulator is made anew: the EGL plugin keeps what it drew, 5 MB an episode and more."""
BLOCKS = ("block_red", "block_blue", "block_pink")
"""Order of the blocks in a scene's state; the scenes' files list them in other orders."""


class PlayTable:
    """calvin_env's simulator: one per process, loaded anew for every episode.

    calvin_env leaves the client out of some calls to pybullet, so a second simulator in the process would write into
    the first. Everything is loaded anew because bullet's contacts, the robot's last command and the lights' switches
    outlast calvin_env's own reset: after it, the same episode takes another course.

    Attributes:
        environment: calvin_env's `PlayTableSimEnv`; None until `load`, and after `close`.
        owner: The simulator whose episode is loaded.

    Args:
        root: The checkout.
        options: The options.

    Raises:
        FileNotFoundError: A module is missing (with the commands that install it).
    """

    def __init__(self, root: Path, options: CalvinOptions):
        sys.path.insert(0, str(root / "calvin_env"))
        self._root, self._options = root, options
        self._module = _imported("calvin_env.envs.play_table_env")
        self._hydra, self._omegaconf = _imported("hydra.utils"), _imported("omegaconf")
        self._module.get_git_commit_hash = lambda path: ""  # a checkout without its .git folder will do
        self.environment: Any = None
        self.owner: object = None
        self._loads = 0
        self._configurations: dict[str, Any] = {}  # by scene
        self._cameras: dict[str, Any] = {}

    def oracle(self) -> Any:
        """CALVIN's judge of what was solved, with `get_task_info_for_set(start info, info, {subtask})`."""
        return self._hydra.instantiate(self._omegaconf.OmegaConf.load(self._root / ORACLE))

    def load(self, scene: str, owner: object) -> None:
        """Empties the world and builds a scene.

        Args:
            scene: "A", "B", "C" or "D".
            owner: Whose episode begins.

        Raises:
            FileNotFoundError: A configuration file is missing.
        """
        if scene not in self._configurations:
            self._configurations[scene] = self._configuration(scene)
        configuration = self._configurations[scene]
        if self._options.egl and self._loads == EGL_LOADS:
            self.close()
        if self.environment is None:
            self.environment = self._module.PlayTableSimEnv(
                robot_cfg=configuration.robot,
                scene_cfg=configuration.scene,
                cameras=configuration.cameras,
                seed=0,
                use_vr=False,
                show_gui=False,
                use_scene_info=True,
                use_egl=self._options.egl,
                bullet_time_step=PHYSICS_HZ,
                control_freq=CONTROL_HZ,
            )
        self._rebuild(configuration)
        self._loads += 1
        self.owner = owner

    def _rebuild(self, configuration: Any) -> None:
        env, make = self.environment, self._hydra.instantiate
        env.seed(0)
        env.robot = make(configuration.robot, cid=env.cid)
        env.scene = make(configuration.scene, p=env.p, cid=env.cid, np_random=env.np_random)
        env.load()
        cameras = {
            name: make(camera, cid=env.cid, robot_id=env.robot.robot_uid, objects=env.scene.get_objects())
            for name, camera in configuration.cameras.items()
        }
        env.cameras = []  # else every step draws every camera
        self._cameras = cameras

    def _configuration(self, scene: str) -> Any:
        """The checkout's files for a scene, the robot with the longer fingers and the two cameras, put together."""
        load, create = self._omegaconf.OmegaConf.load, self._omegaconf.OmegaConf.create
        folder = self._root / CONFIGURATION
        options = self._options
        table = load(_existing(folder / "scene" / f"calvin_scene_{scene}.yaml"))
        blocks = table.objects.movable_objects
        table.objects.movable_objects = {name: blocks[name] for name in BLOCKS}
        robot = load(_existing(folder / "robot" / "panda.yaml"))
        longer = load(_existing(folder / "robot" / "panda_longer_finger.yaml"))
        robot.update({key: value for key, value in longer.items() if key != "defaults"})
        cameras = {}
        for name, size in (("static", options.static_size), ("gripper", options.gripper_size)):
            cameras[name] = load(_existing(folder / "cameras" / "cameras" / f"{name}.yaml"))
            cameras[name].update({"width": size, "height": size})
        whole = create(
            {"data_path": str(self._root / DATA), "scene": table, "robot": robot, "cameras": cameras, "seed": 0}
        )
        self._omegaconf.OmegaConf.resolve(whole)
        return whole

    def reset(self, robot_state: NDArray[np.float64], scene_state: NDArray[np.float64]) -> None:
        """Puts robot and objects where they belong.

        The scene is put twice: switches take on the state of their lights, which calvin_env sets after them.
        """
        self.environment.scene.reset(scene_state)
        self.environment.reset(robot_obs=robot_state, scene_obs=scene_state)

    def draw(self, camera: str, height: int | None = None, width: int | None = None) -> NDArray[np.uint8]:
        """Draws what "static" or "gripper" sees, uint8 (height, width, 3), by default in the policy's size."""
        eye = self._cameras[camera]
        size = eye.height, eye.width
        eye.height, eye.width = height or eye.height, width or eye.width
        try:
            return np.asarray(eye.render()[0], np.uint8)[..., :3]
        finally:
            eye.height, eye.width = size

    def close(self) -> None:
        """Frees the simulator; the next `load` makes another."""
        if self.environment is not None:
            self.environment.close()
            self.environment.ownsPhysicsClient = False  # it closes itself again when it is collected
        self.environment, self.owner, self._cameras, self._loads = None, None, {}, 0


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FileNotFoundError(f"{sys.executable} cannot import CALVIN: {error}. {INSTALL}") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the CALVIN checkout lacks {path}. {INSTALL}")
    return path


class CalvinSim:
    """Episodes of five subtasks, each of which pays 1.

    Attributes:
        steps: Steps since the reset.
        reward: 1 if the last step solved a subtask, else 0.
        over: The episode is over: all subtasks are solved, or one was not within its time.
        solved: Subtasks solved so far.

    Args:
        table: The process's simulator.
        oracle: CALVIN's judge.
        task: Of `TRAIN_SCENES`.
        options: The options.
    """

    def __init__(self, table: PlayTable, oracle: Any, task: str, options: CalvinOptions):
        self._table, self._oracle, self._options = table, oracle, options
        self._train_scenes = TRAIN_SCENES[task]
        self._sequences = sequences_of(options.root)
        self._subtasks: tuple[str, ...] = ()
        self._before: Mapping[str, Any] = {}  # CALVIN's info when the present subtask began
        self._steps_of_subtask = 0
        self.steps = 0
        self.reward = 0.0
        self.over = True
        self.solved = 0

    def reset(self, state_id: int) -> None:
        """Starts the episode `state_id` in its scene."""
        episode = self._sequences.episode(state_id, self._train_scenes)
        self._table.load(episode.scene, self)
        self._table.reset(*self._sequences.initial_state(episode.condition))
        self._subtasks = episode.subtasks
        self._before = self._table.environment.get_info()
        self._steps_of_subtask = self.steps = self.solved = 0
        self.reward, self.over = 0.0, False

    def _environment(self) -> Any:
        if self._table.owner is not self:
            raise RuntimeError(
                "another CALVIN episode was started in this worker: there must be one worker per environment"
            )
        return self._table.environment

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes one action and asks CALVIN's judge about the present subtask.

        Args:
            action: (7,), motion of the hand in x, y, z (1 is 2 cm) and about x, y, z (1 is 0.05 rad), clipped to
                [-1, 1], and the gripper: above 0 opens, else closes.

        Returns:
            Whether all five subtasks are solved.
        """
        command = np.clip(np.array(action, np.float64), -1.0, 1.0)  # a copy: calvin_env scales it in place
        command[-1] = OPEN if command[-1] > 0 else CLOSED
        info = self._environment().step(command)[3]
        self.steps += 1
        self._steps_of_subtask += 1
        subtask = self._subtasks[self.solved]
        done = bool(self._oracle.get_task_info_for_set(self._before, info, {subtask}))
        self.reward = float(done)
        if done:
            self.solved, self._before, self._steps_of_subtask = self.solved + 1, info, 0
        succeeded = self.solved == len(self._subtasks)
        self.over = succeeded or self._steps_of_subtask >= self._options.steps_per_subtask
        return succeeded

    @property
    def state(self) -> NDArray[np.float32]:
        """`robot_obs`, float32 (15,), or the first 7: hand x, y, z (m), Euler angles (rad), gripper opening (m)."""
        observed = self._environment().robot.get_observation()[0]
        size = ROBOT_STATE_DIM if self._options.joint_state else TCP_STATE_DIM
        return np.asarray(observed[:size], np.float32)

    def draw(self, images: Images) -> None:
        """Writes what the two cameras see."""
        self._environment()
        for key, camera in ((STATIC_CAMERA, "static"), (GRIPPER_CAMERA, "gripper")):
            images[key][...] = MID_GREY if self._options.blind else self._table.draw(camera)

    def frame(self, height: int, width: int, *, show_arm: bool) -> NDArray[np.uint8]:
        """Draws the static camera's view, uint8 (height, width, 3); the arm is always shown."""
        self._environment()
        return self._table.draw("static", height, width)

    def close(self) -> None:
        """Frees the process's simulator if it is this episode's; it may be broken."""
        if self._table.owner is self:
            self._table.close()


class CalvinBackend:
    """CALVIN inside one worker process.

    Attributes:
        max_idle: None are kept: the process has one simulator.

    Args:
        tasks: Of `TRAIN_SCENES`.
        options: Fields of `CalvinOptions`; root and python are set.

    Raises:
        FileNotFoundError: A part of the checkout or a module is missing.
    """

    max_idle = 0

    def __init__(self, tasks: Sequence[str], options: Mapping[str, Any]):
        self.options = CalvinOptions(**options)
        assert self.options.root is not None
        self._tasks = tasks
        self._table = PlayTable(Path(self.options.root), self.options)
        self._oracle = self._table.oracle()

    def make(self, task: int) -> CalvinSim:
        """Makes a simulator of the task with that index; the world is built by its reset."""
        return CalvinSim(self._table, self._oracle, self._tasks[task], self.options)

    def expert_action(self, sim: CalvinSim) -> NDArray[np.float32]:
        """There is no scripted expert.

        Raises:
            ValueError: Always.
        """
        raise ValueError("CALVIN has no scripted expert: no task has one; train on CALVIN's own demonstrations")

    def close(self) -> None:
        """Frees the simulator."""
        self._table.close()

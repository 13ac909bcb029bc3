"""Simulators of LIBERO's tasks for a worker process: exact initial states, LeRobot's observations."""

import atexit
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs import libero_experts
from pi_rl.envs.libero_options import (
    CAMERA_KEYS,
    INITIAL_STATES,
    LiberoOptions,
    LiberoTask,
    find_assets,
    libero_folder,
    tasks,
)
from pi_rl.envs.libero_physics import ArmControl, ObservationClock, Seen
from pi_rl.envs.renderer import CameraRenderer
from pi_rl.envs.rewards import TaskReward
from pi_rl.envs.simulator import Images
from pi_rl.envs.vector_env import TRAIN_STATE_OFFSET

MUJOCO_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
COLLISION_GROUP = 0
HOLD_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
"""LeRobot's action while objects settle: no motion, gripper open."""
MID_GREY = 127
PADS = ("gripper0_finger1_pad_collision", "gripper0_finger2_pad_collision")
_NUMPY_PICKLE = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled numpy array and refuses anything else: a pickle can name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what an array is made with."""
        if (module, name) not in _NUMPY_PICKLE:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and a file of initial states holds arrays only"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_initial_states(path: Path) -> NDArray[np.float64]:
    """Reads a task's fixed initial states. LIBERO reads them with torch, of which only the zip layout is needed.

    Args:
        path: A `.pruned_init` file of LIBERO.

    Returns:
        float64 (50, 1 + nq + nv): time, positions, velocities.

    Raises:
        ValueError: It holds something else.
    """
    with zipfile.ZipFile(path) as archive:
        [name] = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
        content = archive.read(name)
    try:
        states = _ArrayUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a file of initial states: {error}") from error
    if np.ndim(states) != 2 or len(states) != INITIAL_STATES:
        raise ValueError(f"{path} must hold {INITIAL_STATES} initial states, got an array of shape {np.shape(states)}")
    return np.asarray(states, np.float64)


def initial_state(state_id: int) -> int:
    """Which of a task's 50 fixed initial states a state id names.

    Args:
        state_id: An evaluation state, 0 to 49, or a training state from `TRAIN_STATE_OFFSET` up; those go round the
            same 50, which are all that LIBERO has (the paper, too, trains on them).

    Raises:
        ValueError: It is between the two, or negative.
    """
    if 0 <= state_id < INITIAL_STATES:
        return state_id
    if state_id >= TRAIN_STATE_OFFSET:
        return (state_id - TRAIN_STATE_OFFSET) % INITIAL_STATES
    raise ValueError(
        f"state id {state_id} does not exist: a LIBERO task has the initial states 0 to {INITIAL_STATES - 1}, and "
        f"training states from {TRAIN_STATE_OFFSET} up"
    )


def prepare_libero(assets: Path) -> None:
    """Makes LIBERO importable without its questions on the terminal, without network and without ~/.libero.

    It asks for paths at its first import unless it finds a configuration, so it gets one in a temporary folder. Paths
    of an earlier import in this process are left alone, except the assets'.

    Args:
        assets: From `find_assets`.
    """
    if "libero.libero" not in sys.modules:
        folder = tempfile.mkdtemp(prefix="pi_rl_libero_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        root = libero_folder()
        places = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets"}
        paths = {"benchmark_root": root, "assets": assets, **{key: root / name for key, name in places.items()}}
        lines = [f"{key}: {json.dumps(str(path))}\n" for key, path in paths.items()]
        Path(folder, "config.yaml").write_text("".join(lines), encoding="utf-8")
        os.environ["LIBERO_CONFIG_PATH"] = folder
    import libero.libero

    libero.libero._assets_path_cache = str(assets)


@dataclass
class _Moment:
    """Everything that a simulator's future depends on.

    Attributes:
        physics: MuJoCo's integration state.
        memory: Of the arm's control.
        clock: Of the observations.
        seen: The last observation.
        places: Where the fixtures stand, body positions and quaternions; LIBERO draws them at random at a reset.
        site_rgba: Colours of the markers.
    """

    physics: NDArray[np.float64]
    memory: tuple[NDArray[np.float64], NDArray[np.float64]]
    clock: tuple[float, bool]
    seen: Seen
    places: tuple[NDArray[np.float64], NDArray[np.float64]]
    site_rgba: NDArray[np.float32]


class _Scene:
    """One task's compiled model (100 MB), its control and its renderers, shared by all simulators of the task."""

    def __init__(self, task: LiberoTask, options: LiberoOptions):
        """Builds the scene (2 s, and once per process 3 s for numba's compilation of the controller)."""
        import mujoco
        from libero.libero.envs.env_wrapper import ControlEnv

        self.mujoco, self.task, self.options = mujoco, task, options
        self.states = read_initial_states(task.states_file)
        self._wrapper = ControlEnv(
            bddl_file_name=str(task.bddl_file), use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False
        )
        self.env = self._wrapper.env
        self.model = self.env.sim.model._model
        if self.states.shape[1] != 1 + self.model.nq + self.model.nv:
            raise ValueError(
                f"the initial states of {task.name} have {self.states.shape[1]} numbers, the scene has "
                f"{1 + self.model.nq + self.model.nv}: assets and hf-libero do not fit together"
            )
        self.cameras = {name: self.model.camera(theirs).id for name, theirs in MUJOCO_CAMERAS.items()}
        self._scratch = self.env.sim.data._data
        self._view = mujoco.MjData(self.model)
        self.settled: dict[int, _Moment] = {}
        self._active: LiberoSim | None = None
        self._renderers: dict[tuple[int, int, bool, bool], CameraRenderer] = {}
        self.users = 0
        self._reset_randomly(0)

    def _reset_randomly(self, seed: int) -> None:
        """LIBERO's own reset under a seed: places fixtures and makes a new controller."""
        outer = np.random.get_state()
        np.random.seed(seed)
        self.env.sim.data._data = self._scratch
        try:
            self._wrapper.reset()
        finally:
            np.random.set_state(outer)
        self.control = ArmControl(self.env)
        self._active = None

    def begin(self, sim: "LiberoSim", number: int) -> None:
        """Puts a simulator into an initial state before anything has settled.

        Where fixtures stand is not part of LIBERO's initial states: its reset draws it from numpy's global generator,
        here seeded with the number of the state.
        """
        self._put_aside(sim)
        self._reset_randomly(number)
        self.mujoco.mj_resetData(self.model, sim.data)
        self.control.data, self._active = sim.data, sim
        state, positions = self.states[number], 1 + self.model.nq
        sim.data.time, sim.data.qpos[:], sim.data.qvel[:] = state[0], state[1:positions], state[positions:]
        self.mujoco.mj_forward(self.model, sim.data)
        self.env._post_process()
        self.control.new_gripper()
        sim.clock = ObservationClock()
        sim.seen = self.control.look(sim.data.qpos.copy())

    def _put_aside(self, sim: "LiberoSim") -> None:
        """Saves the active simulator, unless it is `sim`, which is about to get another state."""
        if self._active not in (None, sim):
            self._active.moment = self.moment(self._active)
        self._active = None

    def activate(self, sim: "LiberoSim") -> None:
        """Makes a simulator the one that model, control and LIBERO's predicates are about."""
        if self._active is not sim:
            self.restore(sim, sim.moment)

    def moment(self, sim: "LiberoSim") -> _Moment:
        """Copies everything about the active simulator."""
        mujoco, model = self.mujoco, self.model
        physics = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, sim.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        return _Moment(
            physics=physics,
            memory=self.control.memory,
            clock=(sim.clock.elapsed, sim.clock.sampled),
            seen=sim.seen,
            places=(model.body_pos.copy(), model.body_quat.copy()),
            site_rgba=model.site_rgba.copy(),
        )

    def restore(self, sim: "LiberoSim", moment: _Moment) -> None:
        """Puts a simulator into a moment and makes it the active one."""
        mujoco, model = self.mujoco, self.model
        self._put_aside(sim)
        self.control.data, self._active = sim.data, sim
        mujoco.mj_resetData(model, sim.data)
        model.body_pos[:], model.body_quat[:] = moment.places
        model.site_rgba[:] = moment.site_rgba
        mujoco.mj_setState(model, sim.data, moment.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(model, sim.data)
        self.control.memory = moment.memory
        sim.clock = ObservationClock(*moment.clock)
        sim.seen = moment.seen

    def draw(self, seen: Seen, camera: str, out: NDArray[np.uint8], *, fast: bool, hide_arm: bool) -> None:
        """Draws what a camera saw, turned by 180 degrees as LeRobot turns it (OpenGL's rows begin at the bottom)."""
        mujoco, model, view = self.mujoco, self.model, self._view
        view.qpos[:] = seen.qpos
        mujoco.mj_kinematics(model, view)
        mujoco.mj_comPos(model, view)
        mujoco.mj_camlight(model, view)
        now = model.site_rgba.copy()
        model.site_rgba[:] = seen.site_rgba
        renderer = self._renderer(*out.shape[:2], fast=fast, hide_arm=hide_arm)
        renderer.render(view, out[:, ::-1], self.cameras[camera])
        model.site_rgba[:] = now

    def _renderer(self, height: int, width: int, *, fast: bool, hide_arm: bool) -> CameraRenderer:
        """The renderer of that kind; besides the policy's only the last one is kept, each holds all textures."""
        key = (height, width, fast, hide_arm)
        if key not in self._renderers:
            keep = (*self.options.size, self.options.fast_rendering, self.options.hide_arm)
            for other in [other for other in self._renderers if other != keep]:
                self._renderers.pop(other).close()
            self._renderers[key] = CameraRenderer(
                self.model,
                0,
                height,
                width,
                fast=fast,
                mirror=False,
                hidden=_arm_geoms(self.model) if hide_arm else None,
                hidden_groups=(COLLISION_GROUP,),
            )
        return self._renderers[key]

    def leave(self, sim: "LiberoSim") -> None:
        """Forgets a simulator; with the last one the renderers go too."""
        self._active = None if self._active is sim else self._active
        self.users -= 1
        if self.users == 0:
            self.close()

    def close(self) -> None:
        """Frees the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


class LiberoSim:
    """One simulator of one task.

    Attributes:
        scene: What it shares with the other simulators of the task.
        data: Its physics, `mujoco.MjData`.
        clock: When sensors are read.
        seen: The last reading.
        moment: Its whole state while another simulator of the scene is active.
        expert: The scripted expert's phase, reset with the episode.
        steps: Steps since the reset.
        reward: Of the last step, under the option `reward`.
        solved: Whether the task is solved now.
    """

    data: Any
    clock: ObservationClock
    seen: Seen
    moment: _Moment

    def __init__(self, backend: "LiberoBackend", scene: _Scene):
        """Makes the simulator; `reset` must come before anything else."""
        self._backend = backend
        self.scene = scene
        scene.users += 1
        self.expert = libero_experts.Phase()
        self.steps = 0
        self.reward = 0.0
        self.solved = False
        self._task_reward = TaskReward(scene.options.reward)
        self._pads = [scene.model.geom(name).id for name in PADS]
        self._robot = scene.model.body("robot0_base").id
        self.data = scene.mujoco.MjData(scene.model)

    def reset(self, state_id: int) -> None:
        """Starts the episode `state_id`; the result is the same to the bit whatever was simulated before.

        The settled state is computed once per initial state and scene, and copied after that.

        Args:
            state_id: See `initial_state`.

        Raises:
            ValueError: There is no such state.
        """
        number, scene = initial_state(state_id), self.scene
        if number not in scene.settled:
            scene.begin(self, number)
            for _ in range(scene.options.settle_steps):
                self._advance(HOLD_STILL)
            scene.settled[number] = scene.moment(self)
        scene.restore(self, scene.settled[number])
        self.steps, self.solved = 0, False
        self.expert = libero_experts.Phase()
        self._task_reward.reset(attached=self._attached())

    def _advance(self, action: NDArray[np.float64]) -> None:
        self.seen = self.scene.control.step(action, self.clock, self.seen)
        self.scene.env._post_process()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes one action.

        Args:
            action: (7,), displacement of the hand in x, y, z in 5 cm, its rotation vector in half radians, gripper
                (closes above 0, opens below); clipped to [-1, 1].

        Returns:
            Whether the task is solved now.

        Raises:
            BrokenPhysicsError: MuJoCo met a NaN or a huge number.
        """
        self.scene.activate(self)
        self._advance(np.clip(action.astype(np.float64), -1.0, 1.0))
        self.steps += 1
        self.solved = bool(self.scene.env._check_success())
        self.reward = float(self._task_reward.step(self.solved, self._attached()))
        return self.solved

    def _attached(self) -> bool:
        """Whether both finger pads press on one thing that can move; only asked for if it is paid."""
        if not self._task_reward.uses_attachment:
            return False
        model, data = self.scene.model, self.data
        pressed: list[set[int]] = [set(), set()]
        for first, second in data.contact.geom[: data.ncon].tolist():
            for pad, other in ((first, second), (second, first)):
                if pad in self._pads:
                    pressed[self._pads.index(pad)].add(int(model.body_weldid[model.geom_bodyid[other]]))
        return any(body and model.body_rootid[body] != self._robot for body in pressed[0] & pressed[1])

    @property
    def hand(self) -> NDArray[np.float64]:
        """Where the hand is now, (3,) in metres; observations are a physics step older."""
        return self.scene.control.hand

    @property
    def state(self) -> NDArray[np.float32]:
        """LeRobot's `observation.state`, float32 (8,): hand x, y, z in metres, its rotation vector, two fingers."""
        return self.seen.state()

    def draw(self, images: Images) -> None:
        """Writes what every camera of the specification sees."""
        scene = self.scene
        scene.activate(self)
        for camera in scene.options.drawn:
            out = images[CAMERA_KEYS[camera]]
            if scene.options.blind:
                out[...] = MID_GREY
            else:
                scene.draw(self.seen, camera, out, fast=scene.options.fast_rendering, hide_arm=scene.options.hide_arm)

    def frame(self, height: int, width: int, *, show_arm: bool) -> NDArray[np.uint8]:
        """Draws the agent view for a video, full quality, also when the policy is blind.

        Args:
            height: Pixels.
            width: Pixels.
            show_arm: Draw the arm; if not, it is as in the policy's images.

        Returns:
            uint8 (height, width, 3).
        """
        out = np.empty((height, width, 3), np.uint8)
        self.scene.activate(self)
        hide_arm = self.scene.options.hide_arm and not show_arm
        self.scene.draw(self.seen, "agentview", out, fast=False, hide_arm=hide_arm)
        return out

    def close(self) -> None:
        """Frees the scene with its last simulator."""
        self._backend.release(self)


class LiberoBackend:
    """All tasks of a vector environment inside one worker process: builds scenes, makes simulators.

    Attributes:
        max_idle: Simulators kept beside those in use.
    """

    max_idle = 10

    def __init__(self, chosen: Sequence[str], options: Mapping[str, Any]):
        """Prepares; scenes are built at their first use.

        Args:
            chosen: Task names; indices below point into this.
            options: Fields of `LiberoOptions`.

        Raises:
            FileNotFoundError: LIBERO's assets are not there.
        """
        self.options = LiberoOptions(**options)
        self._tasks = [tasks()[name] for name in chosen]
        prepare_libero(find_assets(self.options.assets))
        import libero.libero.envs  # noqa: F401  (3 s, at start rather than in the first reset)
        import mujoco

        mujoco.set_mju_user_warning(_warn)
        self._scenes: dict[int, _Scene] = {}

    def make(self, task: int) -> LiberoSim:
        """Makes one more simulator of the task with that index (2 s for a task's first, nothing after)."""
        if task not in self._scenes:
            self._scenes[task] = _Scene(self._tasks[task], self.options)
        return LiberoSim(self, self._scenes[task])

    def release(self, sim: LiberoSim) -> None:
        """Called by a simulator that is not used any more."""
        sim.scene.leave(sim)
        if sim.scene.users == 0:
            self._scenes = {task: scene for task, scene in self._scenes.items() if scene is not sim.scene}

    def expert_action(self, sim: LiberoSim) -> NDArray[np.float32]:
        """The scripted expert's action, float32 (7,); ValueError for a task that has none."""
        sim.scene.activate(sim)
        return libero_experts.expert_action(sim)

    def close(self) -> None:
        """Frees the renderers."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()


def _arm_geoms(model: Any) -> NDArray[np.int64]:
    """Geoms of the robot and its pedestal without the hand, whose names have a beginning of their own."""
    bodies = [model.body(int(body)).name for body in model.geom_bodyid]
    return np.array([geom for geom, body in enumerate(bodies) if body.startswith(("robot0_", "mount0_"))])


def _warn(message: str) -> None:
    """Prints MuJoCo's warnings; by default they are appended to a file in the user's current directory."""
    print(f"MuJoCo: {message}", file=sys.stderr)

"""MetaWorld for reinforcement learning: resets that depend on nothing but their id, and images worth their cost.

MuJoCo and MetaWorld are imported when the first simulator is made, not with this module.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.metaworld_options import STATE_DIM, MetaWorldOptions
from pi_rl.envs.renderer import CameraRenderer
from pi_rl.envs.rewards import TaskReward
from pi_rl.envs.simulator import Images
from pi_rl.envs.vector_env import IMAGE_KEY

MID_GREY = 127
LEROBOT_CORNER2 = (0.75, 0.075, 0.7)
PLACEMENT = ("body_pos", "body_quat", "geom_pos", "geom_quat", "site_pos", "site_quat")
"""Arrays of the compiled model that tasks write to when they place their objects."""


class _Scene:
    """One task in one process: a compiled model that all its simulators share, and the renderers of that model.

    Compiling costs 0.1 s, model and renderer hold 110 MB (190 MB at full quality and 480 pixels), so there is one of
    each; a simulator's own object placement is put into the model when that simulator is used (20 µs). Both are freed
    with the last simulator of the task and made anew for the next.
    """

    def __init__(self, task: str, options: MetaWorldOptions):
        self.task = task
        self.options = options
        self.model: Any = None
        self.pristine: dict[str, NDArray[Any]] = {}
        self.hand_state: NDArray[np.float64] | None = None  # physics after the hand has moved to its start
        self._active: MetaWorldSim | None = None
        self._renderers: dict[tuple[int, int, bool, bool], CameraRenderer] = {}
        self._camera = -1
        self._simulators = 0

    def make_environment(self) -> Any:
        """Makes MetaWorld's own environment on the shared model, goal visible in the raw observation."""
        import mujoco
        from gymnasium.spaces import Box
        from metaworld.env_dict import ENV_CLS_MAP

        def shared_simulation(env: Any) -> tuple[Any, Any]:
            if self.model is None:
                self.model = mujoco.MjModel.from_xml_path(env.fullpath)
            return self.model, mujoco.MjData(self.model)

        self.activate(None)
        base = ENV_CLS_MAP[self.task]
        env = type(base.__name__, (base,), {"_initialize_simulation": shared_simulation})()
        if not self.pristine:
            self._place_camera()
            self.pristine = {field: getattr(self.model, field).copy() for field in PLACEMENT}
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        env._partially_observable = False
        env.max_path_length = sys.maxsize  # the worker keeps the time limit; experts may take longer
        low, high = self._placement_bounds(env)
        env._random_reset_space = Box(low, high, dtype=np.float64)
        # MetaWorld clips observations to this space; its goal bounds would cut a widened goal short.
        seen = env.sawyer_observation_space
        goal = np.r_[np.zeros(len(seen.low) - 3), np.full(3, np.inf)]
        env.sawyer_observation_space = Box(seen.low - goal, seen.high + goal, dtype=np.float64)
        self._simulators += 1
        return env

    def release(self, sim: "MetaWorldSim") -> None:
        """Takes back what `make_environment` gave to a simulator; the last one takes the scene with it."""
        if self._active is sim:
            self._active = None  # its placement stays in the model until the next simulator puts in its own
        self._simulators -= 1
        if self._simulators == 0:
            self.close()

    def _placement_bounds(self, env: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bounds of the random placement under the options."""
        space = env._random_reset_space
        given = (self.options.object_range or {}).get(self.task)
        if given is not None:
            low, high = np.asarray(given["low"], float), np.asarray(given["high"], float)
            if low.shape != space.low.shape:
                raise ValueError(
                    f"object_range of {self.task} must have {len(space.low)} numbers (MetaWorld's own: low "
                    f"{space.low.tolist()}, high {space.high.tolist()}), got {len(low)}"
                )
            return low, high
        centre, half = (space.low + space.high) / 2, (space.high - space.low) / 2
        flat = np.arange(len(half)) % 3 < 2  # x and y of the object, and of the goal where there is one
        half = np.where(flat, half * self.options.object_spread, half)
        low, high = centre - half, centre + half
        reach_low = np.resize(env.hand_low, len(low))
        reach_high = np.resize(env.hand_high, len(high))
        # The hand's reach stops the widening but never narrows MetaWorld's own bounds.
        low = np.where(flat, np.maximum(low, np.minimum(reach_low, space.low)), low)
        high = np.where(flat, np.minimum(high, np.maximum(reach_high, space.high)), high)
        return low, high

    def _place_camera(self) -> None:
        """Applies the camera options to the model; every simulator of the task sees them."""
        options, model = self.options, self.model
        self._camera = model.camera(options.camera).id
        if options.camera == "corner2":
            model.cam_pos[self._camera] = LEROBOT_CORNER2
        if options.camera_pos is not None:
            model.cam_pos[self._camera] = options.camera_pos
        if options.camera_fovy is not None:
            model.cam_fovy[self._camera] = options.camera_fovy
        if options.camera_lookat is not None:
            model.cam_quat[self._camera] = _look_at(model.cam_pos[self._camera], np.array(options.camera_lookat))

    def activate(self, sim: "MetaWorldSim | None") -> None:
        """Puts a simulator's object placement into the shared model (None: the pristine one)."""
        if self._active is sim and sim is not None:
            return
        if self._active is not None:
            self._active.placement = {field: getattr(self.model, field).copy() for field in PLACEMENT}
        for field, values in (self.pristine if sim is None else sim.placement).items():
            getattr(self.model, field)[:] = values
        self._active = sim

    def renderer(self, height: int, width: int, *, fast: bool, hide_arm: bool) -> CameraRenderer:
        """Returns the renderer of that size and kind, made at its first use."""
        key = (height, width, fast, hide_arm)
        if key not in self._renderers:
            self._renderers[key] = CameraRenderer(
                self.model,
                self._camera,
                height,
                width,
                fast=fast,
                mirror=self.options.camera == "corner2" and self.options.camera_lookat is None,
                hidden=_arm_geoms(self.model) if hide_arm else None,
            )
        return self._renderers[key]

    def close(self) -> None:
        """Frees the renderers and the model."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._active = self.model = self.hand_state = None
        self.pristine = {}


def _look_at(position: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternion (w, x, y, z) of a camera at `position` looking at `target`, z up (y up if it looks straight down)."""
    import mujoco

    forward = target - position
    distance = np.linalg.norm(forward)
    if distance < 1e-6:
        raise ValueError(f"camera_lookat {target.tolist()} is where the camera stands")
    forward = forward / distance
    up = np.array([0.0, 1.0, 0.0]) if abs(forward[2]) > 0.999 else np.array([0.0, 0.0, 1.0])
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, forward), -forward], axis=1)  # MuJoCo cameras look along their -z
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    return quaternion


def _is_below(model: Any, body: int, root: int) -> bool:
    """Whether a body is `root` or one of its descendants."""
    while body not in (0, root):
        body = int(model.body_parentid[body])
    return body == root


def _arm_geoms(model: Any) -> NDArray[np.int64]:
    """Geoms of the robot from its base up to, but without, the hand."""
    base, hand = model.body("base").id, model.body("hand").id
    bodies = [int(body) for body in model.geom_bodyid]
    return np.array(
        [geom for geom, body in enumerate(bodies) if _is_below(model, body, base) and not _is_below(model, body, hand)]
    )


def is_holding(model: Any, data: Any) -> bool:
    """Whether both finger pads press on one thing that can move and is not the robot.

    MetaWorld's own `info["grasp_success"]` is no measure of that: it is constant in 15 of the 50 tasks and tells in
    seven others whether the gripper is open.

    Args:
        model: Compiled model of a MetaWorld task.
        data: Its physics after a step.
    """
    pads = (model.geom("leftpad_geom").id, model.geom("rightpad_geom").id)
    pressed: tuple[set[int], set[int]] = (set(), set())
    for contact, (first, second) in enumerate(data.contact.geom[: data.ncon].tolist()):
        for pad, other in ((first, second), (second, first)):
            if pad in pads and data.contact.efc_address[contact] >= 0:
                # bodies without joints of their own move with, and count as, the one they are fixed to
                pressed[pads.index(pad)].add(int(model.body_weldid[model.geom_bodyid[other]]))
    robot = model.body("base").id
    return any(body != 0 and not _is_below(model, body, robot) for body in pressed[0] & pressed[1])


class MetaWorldSim:
    """One simulator of one task.

    Attributes:
        task: Task name.
        raw_obs: MetaWorld's own observation, float64 (39,): current 18, previous 18, goal 3.
        steps: Steps since the reset.
        reward: Of the last step, under the option `reward`.
    """

    def __init__(self, scene: _Scene):
        """Makes the simulator; `reset` must come before anything else."""
        import mujoco
        from metaworld.policies import ENV_POLICY_MAP

        self._mujoco = mujoco
        self._scene = scene
        self.task = scene.task
        self.env = scene.make_environment()
        self.data = self.env.data
        self.placement = dict(scene.pristine)
        self.raw_obs = np.zeros(39)
        self.steps = 0
        self.reward = 0.0
        self._task_reward = TaskReward(scene.options.reward)
        self.expert = ENV_POLICY_MAP[self.task]()
        self._move_hand = self.env._reset_hand
        self.env._reset_hand = self._reset_hand
        skipped = ("model", "data", "mujoco_renderer", "_np_random", "_np_random_seed")
        self._attributes = {key: value for key, value in vars(self.env).items() if key not in skipped}
        self._kept = {*skipped, *self._attributes}
        self._attributes = {key: _frozen(value) for key, value in self._attributes.items()}

    def reset(self, state_id: int) -> None:
        """Starts the episode `state_id`; the result is the same to the bit whatever was simulated before.

        MetaWorld's own reset is not a function of its seed. `mj_resetData` resets positions and velocities, but where
        the fixtures stand is in the model, so the 250 physics steps that bring the hand to its start run against the
        previous episode's fixtures; it runs twice, the first time from wherever the last episode stopped; and objects
        hold attributes from before. Also, in seven tasks the first observation (and in more the first image) shows a
        fixture or goal where it was, because it is moved after the last `mj_forward`. Here model and attributes are
        put back first, one pass is made, and positions are computed once more before anything is read.

        Args:
            state_id: Seed of the placement, at least 0.
        """
        from gymnasium.utils import seeding

        env = self.env
        self._scene.activate(self)
        for field, values in self._scene.pristine.items():
            getattr(env.model, field)[:] = values
        for key in set(vars(env)) - self._kept:
            delattr(env, key)
        for key, value in self._attributes.items():
            setattr(env, key, _frozen(value))
        env.np_random = seeding.np_random(int(state_id))[0]
        self._mujoco.mj_resetData(env.model, env.data)
        env.reset_model()
        self._mujoco.mj_forward(env.model, env.data)
        current = env._get_curr_obs_combined_no_goal()
        env._prev_obs = current
        self.raw_obs = np.hstack((current, current, env._get_pos_goal()))
        self.steps = 0
        self._task_reward.reset(attached=self._attached())

    def _attached(self) -> bool:
        return self._task_reward.uses_attachment and is_holding(self.env.model, self.data)

    def _reset_hand(self, steps: int = 50) -> None:
        """Moves the hand to its start; simulated once per task (3 ms), then restored, which is the same state."""
        mujoco, scene, env = self._mujoco, self._scene, self.env
        whole = mujoco.mjtState.mjSTATE_INTEGRATION
        if scene.hand_state is None:
            self._move_hand(steps)
            scene.hand_state = np.zeros(mujoco.mj_stateSize(env.model, whole))
            mujoco.mj_getState(env.model, env.data, scene.hand_state, whole)
        mujoco.mj_setState(env.model, env.data, scene.hand_state, whole)
        mujoco.mj_forward(env.model, env.data)
        self._move_hand(0)  # no physics: what else the task notes down at this point

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes one action.

        Args:
            action: (4,), hand displacement in x, y, z in hundredths of a metre and gripper effort; clipped to [-1, 1].

        Returns:
            Whether the task is solved now. MetaWorld itself never ends an episode.
        """
        self._scene.activate(self)
        observation, _, _, _, info = self.env.step(np.clip(action.astype(np.float64), -1.0, 1.0))
        self.raw_obs = observation
        self.steps += 1
        solved = bool(info["success"] > 0.5)
        self.reward = float(self._task_reward.step(solved, self._attached()))
        return solved

    @property
    def state(self) -> NDArray[np.float32]:
        """LeRobot's `observation.state`, float32 (4,): hand x, y, z in metres and gripper opening in [0, 1]."""
        return self.raw_obs[:STATE_DIM].astype(np.float32)

    def draw(self, images: Images) -> None:
        """Writes the policy's image, uint8 (height, width, 3)."""
        out, options = images[IMAGE_KEY], self._scene.options
        if options.blind:
            out[...] = MID_GREY
            return
        height, width = options.size
        renderer = self._scene.renderer(height, width, fast=options.fast_rendering, hide_arm=options.hide_arm)
        renderer.render(self.data, out)

    def close(self) -> None:
        """Gives up the physics; the task's model and renderers go with its last simulator."""
        if self.env is None:
            return
        del self.env._reset_hand  # it leads back here, and a cycle would keep the physics
        self.env = self.data = self.expert = self._move_hand = None
        self._attributes, self.placement = {}, {}
        self._scene.release(self)

    def frame(self, height: int, width: int, *, show_arm: bool) -> NDArray[np.uint8]:
        """Draws a frame for a video, full quality, also when the policy is blind.

        Args:
            height: Pixels.
            width: Pixels.
            show_arm: Draw the arm; if not, it is as in the policy's images.

        Returns:
            uint8 (height, width, 3).
        """
        out = np.empty((height, width, 3), np.uint8)
        hide_arm = self._scene.options.hide_arm and not show_arm
        self._scene.renderer(height, width, fast=False, hide_arm=hide_arm).render(self.data, out)
        return out


def _warn(message: str) -> None:
    """Prints MuJoCo's warnings; by default they are appended to a file in the user's current directory."""
    print(f"MuJoCo: {message}", file=sys.stderr)


def _frozen(value: Any) -> Any:
    """Copies arrays and containers; views into the physics stay views, everything else is shared."""
    is_view = isinstance(value, np.ndarray) and value.base is not None
    return copy.deepcopy(value) if isinstance(value, np.ndarray | dict | list) and not is_view else value


def expert_action(sim: MetaWorldSim) -> NDArray[np.float32]:
    """Asks MetaWorld's scripted expert of the simulator's task.

    Args:
        sim: A simulator after `reset`.

    Returns:
        float32 (4,), clipped to [-1, 1].
    """
    return np.clip(sim.expert.get_action(sim.raw_obs), -1.0, 1.0).astype(np.float32)


class MetaWorldBackend:
    """All tasks of a vector environment inside one worker process: makes simulators, owns their renderers."""

    max_idle = 8  # each may keep a scene of 110 to 190 MB that no other simulator uses

    def __init__(self, tasks: Sequence[str], options: Mapping[str, Any]):
        """Prepares; models are compiled at their first use.

        Args:
            tasks: Task names; indices below point into this.
            options: Fields of `MetaWorldOptions`.
        """
        import metaworld  # noqa: F401  (1.2 s, at start rather than in the first reset)
        import mujoco

        mujoco.set_mju_user_warning(_warn)
        self.options = MetaWorldOptions(**options)
        self._scenes = [_Scene(task, self.options) for task in tasks]

    def make(self, task: int) -> MetaWorldSim:
        """Makes one more simulator of the task with that index.

        It takes 2 ms; 0.1 s for a task's first, which takes 0.3 to 1.3 s more for its first image.
        """
        return MetaWorldSim(self._scenes[task])

    def expert_action(self, sim: MetaWorldSim) -> NDArray[np.float32]:
        """The scripted expert's action, float32 (4,)."""
        return expert_action(sim)

    def close(self) -> None:
        """Frees renderers and models."""
        for scene in self._scenes:
            scene.close()

"""One control step of LIBERO's robot: the same numbers as robosuite's own loop in about half the time."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUBSTEPS = 25
CONTROL_PERIOD_S = 1.0 / 20
SUBSTEP_S = 0.002


class BrokenPhysicsError(RuntimeError):
    """MuJoCo found a NaN or a huge number; by itself it would begin anew at the model's initial pose, in silence."""


@dataclasses.dataclass
class ObservationClock:
    """Tells after which physics steps robosuite reads its sensors and cameras.

    It reads them not at the end of a control step but when timers of its own say so: the second last of the 25 physics
    steps as a rule, with whatever rounding adds up over an episode. What a policy sees depends on it, so the timer is
    kept as robosuite keeps it: two forced readings at a reset, then one addition per physics step.

    Attributes:
        elapsed: Seconds since the last period began.
        sampled: Whether this period's reading was made.
    """

    elapsed: float = 0.0 + SUBSTEP_S + SUBSTEP_S
    sampled: bool = True

    def tick(self) -> bool:
        """Counts one physics step; returns whether the sensors are read after it."""
        self.elapsed += SUBSTEP_S
        read = not self.sampled and self.elapsed <= CONTROL_PERIOD_S
        self.sampled = self.sampled or read
        if self.elapsed >= CONTROL_PERIOD_S:
            read = read or not self.sampled
            self.elapsed %= CONTROL_PERIOD_S
            self.sampled = False
        return read


@dataclasses.dataclass
class Seen:
    """What sensors and cameras saw at their last reading.

    Attributes:
        qpos: float64 (nq,), positions of the frame that the cameras show.
        site_rgba: float32 (sites, 4), colours of the markers then, such as the glow of a burner.
        hand: float64 (3,), gripper position in metres.
        turn: float64 (4,), the hand's quaternion w, x, y, z.
        fingers: float64 (2,), finger positions in metres, one physics step newer than the rest.
    """

    qpos: NDArray[np.float64]
    site_rgba: NDArray[np.float32]
    hand: NDArray[np.float64]
    turn: NDArray[np.float64]
    fingers: NDArray[np.float64]

    def state(self) -> NDArray[np.float32]:
        """LeRobot's `observation.state`, float32 (8,): position, rotation vector, fingers."""
        return np.concatenate([self.hand, rotation_vector(self.turn), self.fingers]).astype(np.float32)


def rotation_vector(quaternion: NDArray[np.float64]) -> NDArray[np.float32]:
    """Axis times angle in radians, computed in float32 and without choosing the shorter way round, as LeRobot does.

    Args:
        quaternion: (4,), w, x, y, z.

    Returns:
        float32 (3,), length in [0, 2 pi].
    """
    w, *axis = quaternion.astype(np.float32)
    w = np.clip(w, np.float32(-1), np.float32(1))
    length = np.sqrt(np.float32(1) - w * w)
    if length <= 1e-10:
        return np.zeros(3, np.float32)
    return np.array(axis, np.float32) / length * (np.float32(2) * np.arccos(w))


class ArmControl:
    """robosuite's operational-space control of the arm and its gripper, for any `MjData` of one model.

    robosuite computes all positions, velocities and contacts three times per physics step: before the controller, in
    it, and in MuJoCo's step. They are functions of the state, so once is enough: here MuJoCo's step is taken in its
    two halves with the controller between them.
    """

    def __init__(self, env: Any):
        """Takes over the controller of a LIBERO problem after its `reset`.

        Args:
            env: The inner robosuite environment with one arm.
        """
        import mujoco

        self._mujoco = mujoco
        robot = env.robots[0]
        self.controller, self._gripper = robot.controller, robot.gripper
        self._wrapped = env.sim.data
        self._model = model = env.sim.model._model
        self._site = env.sim.model.site_name2id(self.controller.eef_name)
        self._hand = env.sim.model.body_name2id(robot.robot_model.eef_name)
        self._arm_actuators = list(robot._ref_joint_actuator_indexes)
        self._arm_limits = robot.torque_limits
        self._finger_actuators = list(robot._ref_joint_gripper_actuator_indexes)
        self._fingers = [int(index) for index in robot._ref_gripper_joint_pos_indexes]
        finger_range = model.actuator_ctrlrange[self._finger_actuators]
        self._finger_bias = 0.5 * (finger_range[:, 1] + finger_range[:, 0])
        self._finger_weight = 0.5 * (finger_range[:, 1] - finger_range[:, 0])
        self._jacobians = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self._mass = np.zeros((model.nv, model.nv))
        self.controller.update = self._update

    @property
    def data(self) -> Any:
        """The simulator that is controlled, `mujoco.MjData`."""
        return self._wrapped._data

    @data.setter
    def data(self, data: Any) -> None:
        self._wrapped._data = data

    @property
    def hand(self) -> NDArray[np.float64]:
        """Position between the finger tips, (3,) in metres."""
        return self.data.site_xpos[self._site].copy()

    @property
    def memory(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What the control remembers between steps: the orientation it holds, and the gripper's gradual command."""
        return np.array(self.controller.goal_ori), np.array(self._gripper.current_action)

    @memory.setter
    def memory(self, values: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
        self.controller.goal_ori, self._gripper.current_action = np.array(values[0]), np.array(values[1])
        self.controller.new_update = True

    def new_gripper(self) -> None:
        """Forgets the gripper's command, which robosuite's reset leaves in place unless it builds a new model.

        The new controller is left as it is: robosuite computes its first command from where the arm stood when the
        controller was made, not from the initial state that was set after that.
        """
        self._gripper.current_action = np.zeros(self._gripper.dof)

    def _update(self, force: bool = False) -> None:
        """The controller's `update` without the third `mj_forward`; same operations on same layouts, so same bits."""
        controller = self.controller
        if not (controller.new_update or force):
            return
        mujoco, model, data = self._mujoco, self._model, self.data
        joints, (linear, angular) = controller.qvel_index, self._jacobians
        mujoco.mj_jacSite(model, data, linear, angular, self._site)
        controller.ee_pos = np.array(data.site_xpos[self._site])
        controller.ee_ori_mat = np.array(data.site_xmat[self._site].reshape(3, 3))
        controller.ee_pos_vel = np.dot(linear, data.qvel)
        controller.ee_ori_vel = np.dot(angular, data.qvel)
        controller.joint_pos = np.array(data.qpos[controller.qpos_index])
        controller.joint_vel = np.array(data.qvel[joints])
        controller.J_pos = np.array(linear[:, joints])
        controller.J_ori = np.array(angular[:, joints])
        controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
        mujoco.mj_fullM(model, self._mass, data.qM)
        controller.mass_matrix = self._mass[joints, :][:, joints]
        controller.new_update = False

    def step(self, action: NDArray[np.float64], clock: ObservationClock, seen: Seen) -> Seen:
        """Simulates one control step, 25 physics steps.

        Args:
            action: (7,) in [-1, 1]: displacement in 5 cm, rotation vector in half radians, gripper (closes above 0).
            clock: Is moved on.
            seen: What was seen last.

        Returns:
            What is seen now.

        Raises:
            BrokenPhysicsError: MuJoCo met a NaN or a huge number.
        """
        mujoco, model, data, controller = self._mujoco, self._model, self.data, self.controller
        for substep in range(SUBSTEPS):
            mujoco.mj_step1(model, data)
            if substep == 0:
                controller.set_goal(action[:6])
            data.ctrl[self._arm_actuators] = np.clip(controller.run_controller(), *self._arm_limits)
            gripper = self._gripper.format_action(action[6:])
            data.ctrl[self._finger_actuators] = self._finger_bias + self._finger_weight * gripper
            if clock.tick():
                qpos = data.qpos.copy()  # what cameras show: bodies move at the very end of a physics step
                mujoco.mj_step2(model, data)
                seen = self.look(qpos)
            else:
                mujoco.mj_step2(model, data)
        self._check()
        return seen

    def look(self, qpos: NDArray[np.float64]) -> Seen:
        """Reads the sensors; `qpos` are the positions that the bodies' places were computed from."""
        data = self.data
        return Seen(
            qpos=qpos,
            site_rgba=self._model.site_rgba.copy(),
            hand=data.site_xpos[self._site].copy(),
            turn=data.xquat[self._hand].copy(),
            fingers=data.qpos[self._fingers],
        )

    def _check(self) -> None:
        warnings = self._mujoco.mjtWarning
        for kind in (warnings.mjWARN_BADQPOS, warnings.mjWARN_BADQVEL, warnings.mjWARN_BADQACC):
            if self.data.warning[int(kind)].number:
                raise BrokenPhysicsError(f"MuJoCo's physics broke down at {self.data.time:.2f} s ({kind.name})")

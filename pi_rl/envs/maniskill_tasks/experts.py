"""A scripted expert that takes an object from above and puts it down on another; for demonstrations.

Imported in the process that simulates; ManiSkill must be importable.
"""

import math
from typing import Any

import numpy as np
import torch
from mani_skill.utils.structs.pose import Pose
from numpy.typing import NDArray

MAX_STEP = 0.04
"""Metres per control step."""
MAX_TURN = 0.35
"""Radians per control step."""
CLEARANCE = 0.08
"""Metres above the object at which the gripper comes and goes."""
CARRY = 0.10
"""Metres by which the object is lifted."""
REACHED = 0.008
"""Metres: a place is reached."""
FINGER_DEPTH = 0.012
"""Metres that the fingers' middle goes below the object's top, at most down to its middle."""
TABLE = 0.8695
"""Height of the table's top, metres."""
LOWEST = 0.012
"""Metres above the table that the fingers' middle keeps."""
Point = NDArray[Any]
CLOSING_STEPS, OPENING_STEPS = 3, 2
DROP = 0.01
"""Metres above the target at which the object is let go."""


class PutExpert:
    """Takes `env.source` from above, across its narrower side, and puts it on `env.target`.

    The controller adds each action to the pose it aims at, so the expert compares that pose, not the measured one,
    with where it wants to be; what remains of the error when a place should have been reached is small.

    Args:
        env: One environment (B = 1) after its reset.
    """

    def __init__(self, env: Any):
        self._env = env
        self._arm = env.agent.controller.controllers["arm"]
        self._phases = (self._above, self._down, self._close, self._lift, self._over, self._lower, self._open)
        self._begin()

    def _begin(self) -> None:
        self._phase = 0
        self._waited = 0
        self._turned = 0.0
        self._turn = self._grasp_turn()
        self._offset: Point = np.zeros(3)
        self._held = 0.0
        self._top: Point = np.zeros(3)
        self._end: Point = np.zeros(3)

    def _grasp_turn(self) -> float:
        """Angle by which the gripper must turn about the vertical, in [-pi/2, pi/2]."""
        matrix = self._env.source.pose.to_transformation_matrix()[0, :3, :3].numpy()
        size = self._env.source_size[0].numpy()
        flat = matrix[:2] * size  # the box's three edges, seen from above
        lengths = np.linalg.norm(flat, axis=0)
        longest = flat[:, lengths.argmax()]
        along = math.atan2(longest[1], longest[0]) + math.pi / 2  # the fingers close across the longest edge
        closing = self._arm.ee_pose.to_transformation_matrix()[0, :2, 1].numpy()
        turn = along - math.atan2(closing[1], closing[0])
        turn = (turn + math.pi / 2) % math.pi - math.pi / 2
        return 0.0 if lengths.max() < 1.2 * np.sort(lengths)[1] and lengths.max() < 0.06 else turn

    def _source(self) -> Point:
        return self._env.source.pose.p[0].double().numpy()

    def _half_height(self, actor: Any, size: torch.Tensor) -> float:
        matrix = actor.pose.to_transformation_matrix()[0, :3, :3]
        return float((matrix[2].abs() * size[0]).sum() / 2)

    def _aim(self) -> Point:
        """The position that the controller aims at, in the world."""
        return (self._env.agent.robot.pose * Pose.create(self._arm._target_pose.raw_pose)).p[0].double().numpy()

    def _grasp_point(self) -> Point:
        point = self._source()
        half = self._half_height(self._env.source, self._env.source_size)
        point[2] = max(point[2] + max(0.0, half - FINGER_DEPTH), TABLE + LOWEST)
        return point

    def _release_point(self) -> Point:
        target = self._env.target.pose.p[0].double().numpy()
        top = target[2] + self._half_height(self._env.target, self._env.target_size)
        point = target + self._offset
        point[2] = top + DROP + self._held
        return point

    def __call__(self) -> NDArray[np.float32]:
        """Returns the next action, float32 (7,)."""
        aim = self._aim()
        while self._phase < len(self._phases):
            goal, grip, done = self._phases[self._phase](aim)
            if not done:
                return self._action(goal - aim, grip)
            self._phase += 1
            self._waited = 0
        if np.linalg.norm(self._end - aim) < REACHED and not bool(self._env.evaluate()["success"]):
            self._begin()  # it was dropped, or never held
        return self._action(self._end - aim, 1.0)

    # Each phase tells where to go, whether the gripper is open there, and whether the phase is over.

    def _above(self, aim: Point) -> tuple[Point, float, bool]:
        goal = self._grasp_point() + [0, 0, CLEARANCE]
        return goal, 1.0, self._at(goal, aim) and abs(self._turn - self._turned) < 0.05

    def _down(self, aim: Point) -> tuple[Point, float, bool]:
        goal = self._grasp_point()
        return goal, 1.0, self._at(goal, aim)

    def _close(self, aim: Point) -> tuple[Point, float, bool]:
        self._waited += 1
        if self._waited > CLOSING_STEPS:
            self._top = self._end = aim + [0, 0, CARRY]
            self._offset = aim - self._source()
            self._held = self._offset[2] + self._half_height(self._env.source, self._env.source_size)
            self._offset[2] = 0.0
            if not bool(self._env.evaluate()["is_grasped"]):
                self._phase = len(self._phases)  # up, and begin again
        return aim, 0.0, self._waited > CLOSING_STEPS

    def _lift(self, aim: Point) -> tuple[Point, float, bool]:
        return self._top, 0.0, self._at(self._top, aim)

    def _over(self, aim: Point) -> tuple[Point, float, bool]:
        goal = self._release_point()
        goal[2] = max(aim[2], goal[2])
        return goal, 0.0, self._at(goal, aim)

    def _lower(self, aim: Point) -> tuple[Point, float, bool]:
        goal = self._release_point()
        return goal, 0.0, self._at(goal, aim)

    def _open(self, aim: Point) -> tuple[Point, float, bool]:
        self._waited += 1
        self._end = aim + [0, 0, CLEARANCE]
        return aim, 1.0, self._waited > OPENING_STEPS

    def _at(self, goal: Point, aim: Point) -> bool:
        return bool(np.linalg.norm(goal - aim) < REACHED)

    def _action(self, error: Point, grip: float) -> NDArray[np.float32]:
        distance = np.linalg.norm(error)
        step = error * min(1.0, MAX_STEP / max(float(distance), 1e-9))
        turn = float(np.clip(self._turn - self._turned, -MAX_TURN, MAX_TURN)) if self._phase < 2 else 0.0
        self._turned += turn
        # the robot's frame is the world's turned by half a circle
        return np.array([-step[0], -step[1], step[2], 0.0, 0.0, turn, grip], np.float32)

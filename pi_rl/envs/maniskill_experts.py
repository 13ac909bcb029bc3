"""Scripted experts for ManiSkill tasks with a Panda that is moved by hand displacements (`pd_ee_delta_pos`).

They look at the simulator's state and steer with a proportional controller. ManiSkill's own demonstrators plan with
mplib, which crashes (segmentation fault) beside the numpy 2 that LeRobot needs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

METRES_PER_ACTION = 0.1
OPEN, SHUT = 1.0, -1.0
CLOSE = 0.01
"""Metres at which a waypoint counts as reached."""
GRASP_STEPS = 3


def _position(pose: Any) -> NDArray[np.float64]:
    """x, y, z of a pose, or of a batch of one."""
    return pose.p[0].cpu().numpy().astype(np.float64)


class _HandExpert:
    """Moves the hand of a single environment towards points."""

    def __init__(self, env: Any):
        self._env = env
        self._phase = 0

    def _hand(self) -> NDArray[np.float64]:
        return _position(self._env.agent.tcp.pose)

    def _towards(self, point: NDArray[np.float64], gripper: float) -> NDArray[np.float32]:
        displacement = (point - self._hand()) / METRES_PER_ACTION
        return np.append(np.clip(displacement, -1.0, 1.0), gripper).astype(np.float32)

    def _near(self, point: NDArray[np.float64], distance: float = CLOSE) -> bool:
        return bool(np.linalg.norm(point - self._hand()) < distance)


class PickCubeExpert(_HandExpert):
    """Goes above the cube, down, takes it and carries it to the goal, where it holds it."""

    HOVER = 0.06

    def __call__(self) -> NDArray[np.float32]:
        """Returns the next action, (4,)."""
        cube, goal = _position(self._env.cube.pose), _position(self._env.goal_site.pose)
        above = cube + [0.0, 0.0, self.HOVER]
        if self._phase == 0 and self._near(above, 2 * CLOSE):
            self._phase = 1
        if self._phase == 1 and self._near(cube):
            self._phase = 2
        if self._phase == 0:
            return self._towards(above, OPEN)
        if self._phase == 1:
            return self._towards(cube, OPEN)
        if self._phase <= GRASP_STEPS + 1:
            self._phase += 1
            return self._towards(cube, SHUT)
        if np.linalg.norm(cube - self._hand()) > 2 * self._env.cube_half_size:  # it slipped out: once more
            self._phase = 0
            return self._towards(above, OPEN)
        return self._towards(goal + self._hand() - cube, SHUT)


class PushCubeExpert(_HandExpert):
    """Goes behind the cube with the hand shut and pushes it into the target, where it stops."""

    BEHIND = 0.06
    HEIGHT = 0.02
    REST = 0.04
    """How far from the target's centre the cube is left, well inside its radius of 0.1 m."""

    def __call__(self) -> NDArray[np.float32]:
        """Returns the next action, (4,)."""
        cube, target = _position(self._env.obj.pose), _position(self._env.goal_region.pose)
        behind = np.array([cube[0] - self.BEHIND, cube[1], self.HEIGHT])
        above = behind + [0.0, 0.0, self.BEHIND]
        if self._phase == 0 and self._near(above, 2 * CLOSE):
            self._phase = 1
        if self._phase == 1 and self._near(behind):
            self._phase = 2
        if self._phase == 0:
            return self._towards(above, SHUT)
        if self._phase == 1:
            return self._towards(behind, SHUT)
        if cube[0] >= target[0] - self.REST:
            return self._towards(self._hand(), SHUT)
        return self._towards(np.array([self._hand()[0] + METRES_PER_ACTION / 2, cube[1], self.HEIGHT]), SHUT)

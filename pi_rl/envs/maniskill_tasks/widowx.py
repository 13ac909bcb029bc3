"""The WidowX of SIMPLER's table: its state, its actions, and how it stands when an episode begins.

Imported in the process that simulates.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

CAMERA = "3rd_view_camera"
START_QPOS = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037)
"""Joints at the start, as measured in BridgeData V2: six of the arm (radians), two fingers (metres)."""
TABLE_ROOT = (0.147, 0.028, 0.870)
"""Where the robot stands in front of the flat table, metres; it looks along -x."""
OPEN_ABOVE = 0.5


def joint_state(env: Any) -> torch.Tensor:
    """The paper's "current joint pose": all eight joints, as RLinf gives them to π0.

    Args:
        env: Environment with one WidowX.

    Returns:
        float32 (B, 8): waist, shoulder, elbow, forearm roll, wrist angle and wrist rotation in radians, then the two
        fingers in metres (0.015 closed, 0.037 open).
    """
    return env.agent.robot.get_qpos().float()


def controller_action(action: torch.Tensor) -> torch.Tensor:
    """What the controller is told: the same, but its gripper knows -1 (close) and 1 (open) instead of [0, 1].

    Args:
        action: (..., 7): displacement of the gripper in x, y, z (metres, in the robot's frame), rotation about these
            axes (radians), and the gripper, which opens above 0.5 and closes below.

    Returns:
        (..., 7), of the same type.
    """
    gripper = torch.where(action[..., 6:] > OPEN_ABOVE, 1.0, -1.0).to(action.dtype)
    return torch.cat([action[..., :6], gripper], dim=-1)


_Environment: Any = object  # ManiSkill's class comes later among the bases


class WidowXActions(_Environment):
    """Mixed into ManiSkill environments: takes actions as policies for BridgeData give them (`controller_action`)."""

    def _step_action(self, action: Any) -> Any:
        if action is not None:
            action = controller_action(torch.as_tensor(action))
        return super()._step_action(action)


def state_ids(options: dict[str, Any], rows: int) -> list[int]:
    """The state ids of a reset, from `options["episode_id"]`; zeros where none are given (the first, empty reset)."""
    given = torch.as_tensor(options.get("episode_id", 0)).reshape(-1)
    return given.expand(rows).tolist()


@contextlib.contextmanager
def others_untouched(env: Any, env_idx: torch.Tensor) -> Iterator[None]:
    """Within it physics may be stepped for some environments of a batch; the others are put back afterwards.

    Args:
        env: The environment, inside its `_initialize_episode`.
        env_idx: int64 (n,), those that are being reset.
    """
    from mani_skill.utils import common  # not above: it fixes the folder of assets for the whole process

    others = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    others[env_idx] = False
    rows = others.nonzero()[:, 0]
    kept = env.get_state_dict() if len(rows) else None
    yield
    if kept is not None:
        mask = env.scene._reset_mask.clone()
        env.set_state_dict(common.index_dict_array(kept, rows), rows)
        env.scene._reset_mask = mask

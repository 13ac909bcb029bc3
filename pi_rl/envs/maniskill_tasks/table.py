"""The ManiSkill tasks that can be named, and what each of them is; imports no simulator."""

from pi_rl.envs.maniskill_tasks.task import ManiSkillTask
from pi_rl.envs.maniskill_tasks.widowx_table import GENERALIZATION, SIMPLER

PANDA_HAND = ("panda_hand", "panda_leftfinger", "panda_rightfinger")

_TASKS = (
    ManiSkillTask(
        env_id="PickCube-v1",
        instruction="pick up the red cube and hold it at the goal position",
        state="pi_rl.envs.maniskill:hand_and_goal_state",  # the goal is in no image: ManiSkill hides its marker
        state_dim=7,
        attached="is_grasped",
        hand=PANDA_HAND,
        expert="pi_rl.envs.maniskill_experts:PickCubeExpert",
    ),
    ManiSkillTask(
        env_id="PushCube-v1",
        instruction="push the blue cube onto the red and white target",
        hand=PANDA_HAND,
        expert="pi_rl.envs.maniskill_experts:PushCubeExpert",
    ),
)

TASKS: dict[str, ManiSkillTask] = {task.env_id: task for task in (*_TASKS, *SIMPLER, *GENERALIZATION)}
"""Tasks by name."""

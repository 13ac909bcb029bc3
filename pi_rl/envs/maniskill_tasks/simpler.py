"""SIMPLER's four WidowX tasks: ManiSkill's own environments, made fit for training.

Importing this module registers them in place of ManiSkill's. What differs from those: the gripper's action
(`widowx.controller_action`); evaluation states are the 24 of SIMPLER and training states lie around them; the robot is
out of the way while objects come to rest, so that where it was last makes no difference; several tasks in one process
each keep the photograph behind them (ManiSkill's share one); `evaluate` judges every environment of a batch by itself
and tells what is held now.
"""

import math
from typing import Any

import numpy as np
import torch
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.put_on_in_scene import (
    PutCarrotOnPlateInScene,
    PutEggplantInBasketScene,
    PutSpoonOnTableClothInScene,
    StackGreenCubeOnYellowCubeBakedTexInScene,
)
from mani_skill.utils.geometry.rotation_conversions import quaternion_multiply, quaternion_to_matrix
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose

from pi_rl.envs.maniskill_tasks.widowx import START_QPOS, WidowXActions, others_untouched, state_ids
from pi_rl.envs.vector_env import TRAIN_STATE_OFFSET

RAISED = 1.0
"""Metres by which the robot is lifted out of the way while objects come to rest."""


class SimplerTask(WidowXActions):
    """What the four tasks have in common; comes before ManiSkill's class among the bases.

    Attributes:
        shift: Training states: each object is at most so many metres in x and y from a place of the evaluation.
        turn: And its angle about the vertical at most so many radians from that there.
        pressing: Whether object and target must press on each other.
        height_margin: Metres; see `evaluate`.
    """

    shift = 0.02
    turn = math.radians(20)
    pressing = True
    height_margin = 0.02

    def __init__(self, **kwargs: Any):
        self._rgb_overlay_images: dict[str, Any] = {}  # else all environments of a process share one
        self._objects_to_remove_from_greenscreen: list[Any] = []
        self._grid: Any = None
        self._halves: Any = None
        super().__init__(**kwargs)

    def _load_scene(self, options: dict[str, Any]) -> None:
        super()._load_scene(options)
        if self._grid is None:
            self._grid = self.xyz_configs, self.quat_configs

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict[str, Any]) -> None:
        count = len(env_idx)
        places, turns = zip(*(self._layout(state) for state in state_ids(options, count)), strict=True)
        # ManiSkill looks up row (i // n) of the places and row (i % n) of the turns: (n + 1) i gives both to episode i
        self.xyz_configs, self.quat_configs = torch.stack(places), torch.stack(turns)
        rows = (count + 1) * torch.arange(count, device=self.device)
        raised = Pose.create_from_pq([0.0, 0.0, RAISED], device=self.device) * self.agent.robot.pose
        self.agent.robot.set_pose(raised[env_idx] if count < self.num_envs else raised)
        self.agent.reset(init_qpos=torch.tensor([START_QPOS] * count, device=self.device))
        with others_untouched(self, env_idx):
            super()._initialize_episode(env_idx, {**options, "episode_id": rows})
        self._note_boxes(env_idx)

    def _layout(self, state_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (2, 3) and quaternions (2, 4) of object and target."""
        places, turns = self._grid
        chosen = state_id % (len(places) * len(turns))
        if state_id < TRAIN_STATE_OFFSET:
            return places[chosen // len(turns)], turns[chosen % len(turns)]
        generator = np.random.default_rng(state_id)
        chosen = int(generator.integers(len(places) * len(turns)))
        place, turn = places[chosen // len(turns)].clone(), turns[chosen % len(turns)]
        shift = generator.uniform(-self.shift, self.shift, (2, 2)).astype(np.float32)
        half = generator.uniform(-self.turn, self.turn, 2).astype(np.float32) / 2
        place[:, :2] += torch.as_tensor(shift, device=place.device)
        about_z = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=1)
        return place, quaternion_multiply(torch.as_tensor(about_z, device=turn.device), turn)

    def _note_boxes(self, env_idx: torch.Tensor) -> None:
        """Half the boxes of object and target where they came to rest, as ManiSkill turns them: with their signs."""
        if self._halves is None:
            self._halves = torch.zeros(2, self.num_envs, 3, device=self.device)
        for number, (actor, size) in enumerate(((self.source, self.source_size), (self.target, self.target_size))):
            turned = (quaternion_to_matrix(actor.pose.q) @ size[..., None])[..., 0]
            self._halves[number, env_idx] = turned[env_idx] / 2

    def evaluate(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """What is solved and what is held: ManiSkill's rules, which know only one environment, for all of them.

        Returns:
            `success`: bool (B,), the object is on the target: no further from its middle in x and y than the diagonal
            of half its box and 3 mm, above its middle by no more than both half heights and `height_margin` and,
            where the task says so (`pressing`), they press on each other with more than 0.05 N. `is_grasped`: bool
            (B,), both fingers press on the object now.
        """
        source_half, target_half = self._halves
        offset = self.source.pose.p - self.target.pose.p
        near = offset[:, :2].norm(dim=1) <= target_half[:, :2].norm(dim=1) + 0.003
        gap = offset[:, 2] - target_half[:, 2] - source_half[:, 2]
        success = near & (offset[:, 2] > 0) & (gap <= self.height_margin)
        if self.pressing:
            forces = self.scene.get_pairwise_contact_forces(self.source, self.target)
            success &= forces.norm(dim=1) > 0.05
        return {"success": success, "is_grasped": self.agent.is_grasping(self.source)}

    @property
    def source(self) -> Actor:
        """The object."""
        return self.objs[self.source_obj_name]

    @property
    def target(self) -> Actor:
        """What it is to be put on."""
        return self.objs[self.target_obj_name]

    @property
    def source_size(self) -> torch.Tensor:
        """The object's box in its own frame, float32 (B, 3), metres."""
        return self.episode_model_bbox_sizes[self.source_obj_name].float().expand(self.num_envs, 3)

    @property
    def target_size(self) -> torch.Tensor:
        """The box of what it is to be put on."""
        return self.episode_model_bbox_sizes[self.target_obj_name].float().expand(self.num_envs, 3)


class PutCarrot(SimplerTask, PutCarrotOnPlateInScene):
    """Put the carrot on the plate."""


class PutSpoon(SimplerTask, PutSpoonOnTableClothInScene):
    """Put the spoon on the cloth; part of it is enough."""

    pressing = False


class StackCube(SimplerTask, StackGreenCubeOnYellowCubeBakedTexInScene):
    """Put the green cube on the yellow one."""


class PutEggplant(SimplerTask, PutEggplantInBasketScene):
    """Put the eggplant from the sink into the basket."""

    shift = 0.01  # it lies between the walls of the sink
    pressing = False
    height_margin = 0.06


for _name, _class in (
    ("PutCarrotOnPlateInScene-v1", PutCarrot),
    ("PutSpoonOnTableClothInScene-v1", PutSpoon),
    ("StackGreenCubeOnYellowCubeBakedTexInScene-v1", StackCube),
    ("PutEggplantInBasketScene-v1", PutEggplant),
):
    register_env(_name, max_episode_steps=60, override=True)(_class)

"""The scenes of the generalisation benchmark: an object, a receptacle and a photograph of a table behind them.

Written for any number of environments in one batched simulation. A single environment (physics on the CPU) holds only
the models of its episode and is rebuilt when they change; a batched one holds all 25 objects and 17 receptacles in
every environment, out of sight, because it cannot be rebuilt.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import WidowX250SBridgeDatasetFlatTable
from mani_skill.utils import sapien_utils
from mani_skill.utils.geometry.rotation_conversions import quaternion_to_matrix
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig
from numpy.typing import NDArray
from sapien.physx import PhysxMaterial

from pi_rl.envs.maniskill_tasks import files
from pi_rl.envs.maniskill_tasks.benchmark import (
    BENCHMARKS,
    MOVE_STEP,
    OBJECTS,
    PLATES,
    TABLES,
    Benchmark,
    Episode,
    one_plate,
    robot_offsets,
)
from pi_rl.envs.maniskill_tasks.overlay import blend_foreground, blend_image, is_foreground
from pi_rl.envs.maniskill_tasks.widowx import (
    CAMERA,
    START_QPOS,
    TABLE_ROOT,
    WidowXActions,
    others_untouched,
    state_ids,
)

STAGE = "stages/bridge_table_1_v1.glb"
STAGE_POSITION = (2.0634, 2.8313, 0.0)
ROBOT_TURN = (0.0, 0.0, 0.0, 1.0)
RAISED = 1.0
"""Metres by which the robot is lifted out of the way while objects come to rest."""
SETTLE_STEPS = 650
"""Physics steps (2 ms) in which objects come to rest: RL4VLA's 50 and, always, the 600 that it adds if they move."""
DROP_HEIGHTS = {"": (0.95, 0.95), "object": (0.95, 0.92, 1.0), "plate": (1.0, 0.92, 0.96)}
"""Heights in metres from which object, plate and third thing fall, by `Benchmark.third`; the table is at 0.87."""
PARKED = 10.0
"""Metres along x, behind the camera, where models stand on a shelf that no episode needs now."""
XY_MARGIN, Z_MARGIN, MIN_FORCE = 0.01, 0.05, 0.03
"""When an object is on a plate: metres, metres, newtons."""


class PutOnPlate(WidowXActions, BaseEnv):
    """Put an object on a receptacle.

    Attributes:
        source: The object of each environment.
        target: The receptacle of each environment.
        source_size: Its box, float32 (B, 3), in its own frame, metres.
        target_size: The same of the receptacle.
        episodes: What each environment's episode holds.

    Args:
        benchmark: Name of a row in `BENCHMARKS`.
        use_multiple_plates: Whether 17 receptacles take part or one; no matter for rows that name receptacles.
        **kwargs: Of ManiSkill's `BaseEnv`.

    Raises:
        FileNotFoundError: Models, photographs, the stage or the robot are missing.
    """

    SUPPORTED_OBS_MODES = ("rgb+segmentation",)
    SUPPORTED_REWARD_MODES = ("none",)

    def __init__(self, *, benchmark: str, use_multiple_plates: bool = True, **kwargs: Any):
        row = BENCHMARKS[benchmark]
        self.benchmark: Benchmark = row if use_multiple_plates else one_plate(row)
        self._check_files()
        self.episodes: list[Episode] = []
        super().__init__(robot_uids=WidowX250SBridgeDatasetFlatTable, **kwargs)

    def _check_files(self) -> None:
        name, carrot, bridge = self.benchmark.name, files.carrot_folder(), files.bridge_folder()
        needed = [carrot / kind / "model_db.json" for kind in ("more_carrot", "more_plate")]
        for kind, models in (("more_carrot", OBJECTS), ("more_plate", PLATES)):
            needed += [path for model in models for path in files.model_files(carrot / kind / model)]
        needed += [_photograph(index) for index in self.benchmark.tables]
        needed += [_texture(index) for index in range(len(TABLES)) if self.benchmark.blend]
        files.check(name, carrot, needed, files.CARROT_SOURCE)
        files.check(name, bridge, [bridge / STAGE], files.BRIDGE_SOURCE)
        files.check_robot(name)

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(sim_freq=500, control_freq=5, spacing=20)

    # Building

    def _load_agent(self, options: dict[str, Any]) -> None:
        super()._load_agent(options, sapien.Pose(TABLE_ROOT, ROBOT_TURN))

    def _load_lighting(self, options: dict[str, Any]) -> None:
        self.scene.set_ambient_light([0.3] * 3)
        self.scene.add_directional_light([0, 0, -1], [2.2] * 3, shadow=False)
        for direction in ([-1, -0.5, -1], [1, 1, -1]):
            self.scene.add_directional_light(direction, [0.7] * 3)

    def _load_scene(self, options: dict[str, Any]) -> None:
        for robot in self.agent.robot._objs:
            sapien_utils.set_articulation_render_material(robot, specular=0.9, roughness=0.3)
        self._build_stage()
        objects: Any = range(len(OBJECTS))
        plates: Any = range(len(PLATES))
        if self.num_envs == 1:
            objects, plates = self.benchmark.models(state_ids(options, 1)[0])
        else:
            self._build_shelf()
        self.objects = {index: self._build("more_carrot", OBJECTS, index) for index in objects}
        self.plates = {index: self._build("more_plate", PLATES, index) for index in plates}
        links = [link.per_scene_id.expand(self.num_envs) for link in self.agent.robot.get_links()]
        self._robot_ids = torch.stack(links, dim=1).long()

    def _build_stage(self) -> None:
        builder = self.scene.create_actor_builder()
        upright = sapien.Pose(q=[0.707, 0.707, 0, 0])  # as in SIMPLER: the file's y axis points up
        stage = str(files.bridge_folder() / STAGE)
        builder.add_nonconvex_collision_from_file(stage, pose=upright)
        builder.add_visual_from_file(stage, pose=upright)
        builder.initial_pose = sapien.Pose(STAGE_POSITION)
        builder.build_static(name="stage")

    def _build_shelf(self) -> None:
        builder = self.scene.create_actor_builder()
        builder.add_box_collision(half_size=[2.0, 6.0, 0.1])
        builder.initial_pose = sapien.Pose([PARKED, 0.0, 0.7])
        builder.build_static(name="shelf")

    def _build(self, kind: str, names: tuple[str, ...], index: int) -> Actor:
        folder = files.carrot_folder() / kind / names[index]
        collision, visual = files.model_files(folder)
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            str(collision),
            material=PhysxMaterial(static_friction=1.0, dynamic_friction=1.0, restitution=0.0),
            density=_models(kind)[names[index]]["density"],
        )
        builder.add_visual_from_file(str(visual))
        builder.initial_pose = sapien.Pose(_parking(kind, index))
        return builder.build(name=f"{kind}/{names[index]}")

    # Episodes

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict[str, Any]) -> None:
        rows = env_idx.tolist()
        states = state_ids(options, len(rows))
        first = not self.episodes
        if first:
            self._allocate()
        for row, state in zip(rows, states, strict=True):
            self.episodes[row] = self.benchmark.episode(state)
            self._models[row] = self.benchmark.models(state)
        self._choose()
        self._set_background(rows)
        self._place(rows)
        self._settle(env_idx)
        self._place_robot(rows)
        self._control_steps[env_idx] = 0
        self.source_box[env_idx] = _turned_size(self.source_size, self.source.pose.q)[env_idx]
        self.target_box[env_idx] = _turned_size(self.target_size, self.target.pose.q)[env_idx]

    def _allocate(self) -> None:
        count, device = self.num_envs, self.device
        self.episodes = [self.benchmark.episode(0)] * count
        self._models = [self.benchmark.models(0)] * count
        self._control_steps = torch.zeros(count, dtype=torch.long, device=device)
        self.source_box = torch.zeros(count, 3, device=device)
        self.target_box = torch.zeros(count, 3, device=device)
        sensor = self._sensor_configs[CAMERA]
        shape = (sensor.height, sensor.width)
        self._background = torch.zeros(count, *shape, 3, dtype=torch.uint8, device=device)
        twice = 2 if self.benchmark.blend == "image" else 1
        self._textures = torch.zeros(count, twice * shape[0], twice * shape[1], 3, dtype=torch.uint8, device=device)

    def _choose(self) -> None:
        """Gathers what every environment's episode is about into actors that address all environments at once."""
        objects, plates = zip(*self._models, strict=True)
        self.source = self._view(self.objects, [models[0] for models in objects], "source")
        self.target = self._view(self.plates, [models[0] for models in plates], "target")
        self.third = None
        if self.benchmark.extra == "object":
            self.third = self._view(self.objects, [models[1] for models in objects], "third")
        elif self.benchmark.extra == "plate":
            self.third = self._view(self.plates, [models[1] for models in plates], "third")
        self.source_size = self._sizes("more_carrot", OBJECTS, [models[0] for models in objects])
        self.target_size = self._sizes("more_plate", PLATES, [models[0] for models in plates])

    def _view(self, actors: dict[int, Actor], chosen: list[int], name: str) -> Actor:
        missing = sorted({index for index in chosen if index not in actors})
        if missing:
            raise RuntimeError(f"the scene was built without the models {missing}: reset it with reconfigure=True")
        entities = [actors[index]._objs[row] for row, index in enumerate(chosen)]
        everywhere = torch.arange(self.num_envs, device=self.device)
        return Actor.create_from_entities(entities, self.scene, everywhere, shared_name=name)

    def _sizes(self, kind: str, names: tuple[str, ...], chosen: list[int]) -> torch.Tensor:
        boxes = [_models(kind)[names[index]]["bbox"] for index in chosen]
        sizes = np.array([np.subtract(box["max"], box["min"]) for box in boxes], np.float32)
        return torch.as_tensor(sizes, device=self.device)

    def _set_background(self, rows: list[int]) -> None:
        height, width = self._background.shape[1:3]
        for row in rows:
            episode = self.episodes[row]
            self._background[row] = torch.from_numpy(_picture(_photograph(episode.table), height, width))
            if self.benchmark.blend:
                height2, width2 = self._textures.shape[1:3]
                self._textures[row] = torch.from_numpy(_picture(_texture(episode.extra), height2, width2))

    def _place(self, rows: list[int]) -> None:
        """Puts the models of these environments over the table, all others onto the shelf."""
        for kind, actors in (("more_carrot", self.objects), ("more_plate", self.plates)):
            for index, actor in actors.items():
                actor.set_pose(self._poses([(*_parking(kind, index), 0.0)] * len(rows)))
        episodes = [self.episodes[row] for row in rows]
        places = [self.benchmark.placements[episode.placement] for episode in episodes]
        yaws = [self.benchmark.yaws[episode.yaw] for episode in episodes]
        heights = DROP_HEIGHTS[self.benchmark.third]
        third_yaws = yaws if self.benchmark.extra == "object" else [0.0] * len(rows)
        for part, (actor, turns) in enumerate(
            ((self.source, yaws), (self.target, [0.0] * len(rows)), (self.third, third_yaws))
        ):
            if actor is not None:
                points = [(*place[part], heights[part], yaw) for place, yaw in zip(places, turns, strict=True)]
                actor.set_pose(self._poses(points))

    def _poses(self, points: Sequence[tuple[float, ...]]) -> Pose:
        """Poses from x, y, z and yaw."""
        numbers = torch.tensor(points, dtype=torch.float32, device=self.device)
        half = numbers[:, 3] / 2
        none = torch.zeros_like(half)
        return Pose.create_from_pq(numbers[:, :3], torch.stack([half.cos(), none, none, half.sin()], dim=1))

    def _settle(self, env_idx: torch.Tensor) -> None:
        """Lets the objects of these environments come to rest, the robot out of the way; others are put back."""
        raised = (*TABLE_ROOT[:2], TABLE_ROOT[2] + RAISED)
        self.agent.robot.set_pose(sapien.Pose(raised, ROBOT_TURN))
        self.agent.reset(init_qpos=torch.tensor([START_QPOS], device=self.device).expand(len(env_idx), -1))
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
        with others_untouched(self, env_idx):
            for _ in range(SETTLE_STEPS):
                self.scene.step()
            if self.gpu_sim_enabled:
                self.scene._gpu_fetch_all()

    def _place_robot(self, rows: list[int]) -> None:
        self.agent.robot.set_pose(sapien.Pose(TABLE_ROOT, ROBOT_TURN))
        qpos = torch.tensor([START_QPOS] * len(rows), device=self.device)
        if self.benchmark.extra == "pose":
            offsets = [robot_offsets()[self.episodes[row].extra] for row in rows]
            qpos[:, :6] += torch.tensor(offsets, device=self.device)
        self.agent.reset(init_qpos=qpos)

    def _after_control_step(self) -> None:
        self._control_steps += 1
        if self.benchmark.moves:
            due = self._control_steps == MOVE_STEP
            if due.any():
                self._move(due)

    def _move(self, due: torch.Tensor) -> None:
        """Takes the object of some environments to the third place, above the table; it falls in the next step."""
        rows = due.nonzero()[:, 0].tolist()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        mask, self.scene._reset_mask = self.scene._reset_mask, due
        points = []
        for row in rows:
            place = self.benchmark.placements[self.episodes[row].placement][2]
            yaw = self.benchmark.yaws[self.episodes[row].yaw]
            points.append((*place, DROP_HEIGHTS[self.benchmark.third][2], yaw))
        self.source.set_pose(self._poses(points))
        still = torch.zeros(len(rows), 3, device=self.device)
        self.source.set_linear_velocity(still)
        self.source.set_angular_velocity(still)
        self.scene._reset_mask = mask
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()

    # Success

    def evaluate(self) -> dict[str, torch.Tensor]:
        """What is solved and what is held.

        Returns:
            `success`: bool (B,), the object is on the receptacle: its middle no further away in x and y than half the
            receptacle's longest side and 1 cm, above the receptacle's middle by no more than both half heights and
            5 cm, and the two press on each other with more than 0.03 N. `is_grasped`: bool (B,), both fingers press
            on the object.
        """
        offset = self.source.pose.p - self.target.pose.p
        near = offset[:, :2].norm(dim=1) <= self.target_box.amax(1) / 2 + XY_MARGIN
        gap = offset[:, 2] - self.source_box[:, 2] / 2 - self.target_box[:, 2] / 2
        forces = self.scene.get_pairwise_contact_forces(self.source, self.target)
        touching = forces.norm(dim=1) > MIN_FORCE
        success = near & (offset[:, 2] > 0) & (gap <= Z_MARGIN) & touching
        return {"success": success, "is_grasped": self.agent.is_grasping(self.source)}

    def get_language_instruction(self, **_: Any) -> list[str]:
        """What the policy is told, by environment; the same as `Benchmark.instruction`."""
        return [self.benchmark.phrase(episode) for episode in self.episodes]

    # Pictures

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict[str, Any]:
        data = super()._get_obs_sensor_data(apply_texture_transforms)
        camera = data[CAMERA]
        device = camera["rgb"].device
        ids = [self._robot_ids, self.source.per_scene_id[:, None], self.target.per_scene_id[:, None]]
        ids += [] if self.third is None else [self.third.per_scene_id[:, None]]
        mask = is_foreground(camera["segmentation"][..., 0], torch.cat(ids, dim=1).long().to(device))
        picture = torch.where(mask[..., None], camera["rgb"], self._background.to(device))
        if self.benchmark.blend:
            blend = blend_foreground if self.benchmark.blend == "foreground" else blend_image
            textures = self._textures.to(device).float()
            picture = blend(picture.float(), mask, textures, self.benchmark.strength).clamp(0, 255).to(torch.uint8)
        camera["rgb"] = picture
        return data


def _turned_size(size: torch.Tensor, quaternion: torch.Tensor) -> torch.Tensor:
    """Sizes (B, 3) of the upright boxes around turned boxes."""
    return (quaternion_to_matrix(quaternion).abs() @ size[..., None])[..., 0]


def _parking(kind: str, index: int) -> tuple[float, float, float]:
    return PARKED + (kind == "more_plate"), 0.3 * index - 4.0, 0.9


def _photograph(index: int) -> Path:
    return files.carrot_folder() / "more_table" / "imgs" / f"{TABLES[index]}.png"


def _texture(index: int) -> Path:
    return files.carrot_folder() / "more_table" / "textures" / f"{index + 1:03}.png"


@functools.cache
def _models(kind: str) -> dict[str, dict[str, Any]]:
    return dict(json.loads((files.carrot_folder() / kind / "model_db.json").read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=64)
def _picture(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """A picture, uint8 (height, width, 3)."""
    loaded = cv2.imread(str(path))
    if loaded is None:
        raise ValueError(f"{path} is not a picture that can be read; download it again")
    scaled = cv2.resize(cv2.cvtColor(loaded, cv2.COLOR_BGR2RGB), (width, height))
    return np.asarray(scaled, np.uint8)


for _name in BENCHMARKS:
    register_env(_name, max_episode_steps=80, benchmark=_name)(PutOnPlate)

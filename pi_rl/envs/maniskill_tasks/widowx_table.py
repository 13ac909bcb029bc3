"""The WidowX tasks' entries in the table of ManiSkill tasks: SIMPLER's four and the generalisation benchmark."""

from collections.abc import Hashable, Mapping
from typing import Any

from pi_rl.envs.maniskill_tasks.benchmark import (
    BENCHMARKS,
    EXECUTION,
    MAIN,
    SEMANTIC,
    UNSEEN,
    VISION,
    Benchmark,
    one_plate,
)
from pi_rl.envs.maniskill_tasks.task import ManiSkillTask

MAX_EPISODE_STEPS = 48
"""The paper's Table 8. ManiSkill has 60 (the eggplant: 120), RLinf 80."""
SIMPLER_STATES = 24
_BRIDGE = "data/tasks/bridge_v2_real2sim_dataset"
_ROBOT = "data/robots/widowx/wx250s.urdf"
_SOURCE = (
    "Get them by `pi-rl assets maniskill`: the data set haosulab/ManiSkill_bridge_v2_real2sim on the Hugging Face Hub "
    "and github.com/haosulab/ManiSkill-WidowX250S."
)

_WIDOWX: dict[str, Any] = {
    "control_mode": "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
    "action_low": (-1.0,) * 3 + (-1.5707964,) * 3 + (0.0,),
    "action_high": (1.0,) * 3 + (1.5707964,) * 3 + (1.0,),
    "state": "pi_rl.envs.maniskill_tasks.widowx:joint_state",
    "state_dim": 8,
    "camera": "3rd_view_camera",
    "size": (480, 640),
    "resampled": True,
    "obs_mode": "rgb+segmentation",
    "video_camera": None,
    "max_episode_steps": MAX_EPISODE_STEPS,
    "fps": 5,
    "attached": "is_grasped",
    "seedless": True,
}


def rebuilt(state_id: int, kwargs: Mapping[str, Any]) -> Hashable:
    """A scene is never used twice: in one that was, the physics of hard collisions depends on what happened before."""
    return object()


def _simpler(name: str, instruction: str, models: tuple[str, ...], **more: Any) -> ManiSkillTask:
    sink = "sink" in models
    photograph, stage, database = (
        ("bridge_sink.png", "bridge_table_1_v2.glb", "info_bridge_custom_v0.json")
        if sink
        else ("bridge_real_eval_1.png", "bridge_table_1_v1.glb", more.pop("database", "info_bridge_custom_v0.json"))
    )
    meshes = [f"custom/models/{model}/{part}" for model in models for part in ("collision.obj", "textured.dae")]
    needed = (f"stages/{stage}", *meshes, f"custom/{database}", f"real_inpainting/{photograph}")
    return ManiSkillTask(
        env_id=name,
        instruction=instruction,
        module="pi_rl.envs.maniskill_tasks.simpler",
        eval_states=SIMPLER_STATES,
        groups=("simpler",),
        variant=rebuilt,
        assets=(_ROBOT, *(f"{_BRIDGE}/{path}" for path in needed)),
        assets_source=_SOURCE,
        **more,
        **_WIDOWX,
    )


_EXPERT = "pi_rl.envs.maniskill_tasks.experts:PutExpert"
SIMPLER = (
    _simpler(
        "PutCarrotOnPlateInScene-v1",
        "put carrot on plate",
        ("bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"),
        expert=_EXPERT,
    ),
    _simpler(
        "PutSpoonOnTableClothInScene-v1",
        "put the spoon on the towel",
        ("bridge_spoon_generated_modified", "table_cloth_generated_shorter"),
        expert=_EXPERT,
    ),
    _simpler(
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
        "stack the green block on the yellow block",
        ("baked_green_cube_3cm", "baked_yellow_cube_3cm"),
        database="info_bridge_custom_baked_tex_v0.json",
        expert=_EXPERT,
    ),
    _simpler(
        "PutEggplantInBasketScene-v1",
        "put eggplant into yellow basket",
        ("eggplant", "dummy_sink_target_plane", "sink"),
    ),
)
"""The instructions are ManiSkill's, which checkpoints were trained with."""


def _row(name: str, kwargs: Mapping[str, Any]) -> Benchmark:
    return BENCHMARKS[name] if kwargs["use_multiple_plates"] else one_plate(BENCHMARKS[name])


def _instruction(state_id: int, kwargs: Mapping[str, Any]) -> str:
    return _row(kwargs["benchmark"], kwargs).instruction(state_id)


def _generalization(row: Benchmark) -> ManiSkillTask:
    groups = [
        name
        for name, rows in (
            ("ood", (*VISION, *SEMANTIC, *EXECUTION)),
            ("ood_vision", VISION),
            ("ood_semantic", SEMANTIC),
            ("ood_execution", EXECUTION),
            ("unseen", UNSEEN),
        )
        if row in rows
    ]
    return ManiSkillTask(
        env_id=row.name,
        instruction="put the object on the receptacle",
        instruction_of=_instruction,
        module="pi_rl.envs.maniskill_tasks.put_on_plate",
        kwargs={"benchmark": row.name, "use_multiple_plates": True},
        eval_states=row.eval_states,
        groups=tuple(groups),
        variant=rebuilt,
        assets=(_ROBOT, f"{_BRIDGE}/stages/bridge_table_1_v1.glb"),  # the environment itself looks for the models
        assets_source=_SOURCE,
        expert=_EXPERT,
        **_WIDOWX,
    )


GENERALIZATION = tuple(_generalization(row) for row in (MAIN, *VISION, *SEMANTIC, *EXECUTION, *UNSEEN))

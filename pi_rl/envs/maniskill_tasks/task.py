"""What must be said of a ManiSkill task; imports no simulator."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pi_rl.envs.vector_env import EVAL_STATES


@dataclass(frozen=True, kw_only=True)
class ManiSkillTask:
    """One task.

    An episode is `env.reset(seed=state_id, options={"episode_id": state_id})`, both as one number per environment.
    What is solved is `evaluate()["success"]`. Functions and classes are named as "module:name" and imported in the
    process that simulates.

    Attributes:
        env_id: Name of the Gymnasium registration.
        instruction: What the policy is told.
        instruction_of: (state id, kwargs of the environment) to the instruction, where it depends on the episode; pure
            and quick, it is called for every observation.
        module: Module whose import registers the environment; None where ManiSkill does.
        kwargs: More arguments of `gym.make`. `use_multiple_plates` among them is replaced by the option of that name.
        control_mode: Controller of the robot.
        action_low: Lower bounds of an action.
        action_high: Upper bounds.
        state: "module:function" from the (unwrapped) environment to `observation.state`, torch float32 (B, state_dim).
        state_dim: Size of the state.
        camera: Name of the sensor that is the policy's camera.
        size: Its native (height, width) in pixels.
        resampled: An image of another size is rendered at the native size and scaled, as it must be where a photograph
            is laid under it; otherwise the camera renders that size itself, and may be moved by the options.
        obs_mode: ManiSkill's observation mode in which the camera's image is complete.
        video_camera: ManiSkill's camera for videos; None for the policy's own.
        max_episode_steps: Time limit, unless the options give another.
        fps: Control steps per second.
        eval_states: Evaluation states, ids [0, eval_states).
        groups: Names of the groups it belongs to, such as "simpler".
        attached: Key of `evaluate()` that tells whether an object is attached to the gripper; None where nothing is
            taken up, and the structured reward does not exist.
        hand: Robot links that are still drawn when the option `hide_arm` hides the others; empty where it must not.
        variant: (state id, kwargs) to what the scene is built from; where that changes from one episode to the next
            the scene is rebuilt (an `object()` equals no other: always). None where all episodes share one scene. A
            batched simulation (num_envs > 1) is never rebuilt: there the environment must hold everything at once.
        seedless: Its episodes follow from the state id without ManiSkill's generators: a batch may be reset at once.
        assets: Files that must exist, relative to the folder of assets.
        assets_source: Where they come from: a command, or a sentence.
        expert: "module:name" of a class whose instances, made from the environment after each reset, return
            the next action when called: float32 (A,). None where there is no scripted expert.
    """

    env_id: str
    instruction: str
    instruction_of: Callable[[int, Mapping[str, Any]], str] | None = None
    module: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    control_mode: str = "pd_ee_delta_pos"
    action_low: tuple[float, ...] = (-1.0,) * 4
    action_high: tuple[float, ...] = (1.0,) * 4
    state: str = "pi_rl.envs.maniskill:hand_state"
    state_dim: int = 4
    camera: str = "base_camera"
    size: tuple[int, int] = (128, 128)
    resampled: bool = False
    obs_mode: str = "rgb"
    video_camera: str | None = "render_camera"
    max_episode_steps: int = 50
    fps: int = 20
    eval_states: int = EVAL_STATES
    groups: tuple[str, ...] = ()
    attached: str | None = None
    hand: tuple[str, ...] = ()
    variant: Callable[[int, Mapping[str, Any]], Hashable] | None = None
    seedless: bool = False
    assets: tuple[str, ...] = ()
    assets_source: str = ""
    expert: str | None = None

"""What to look at when a policy solves nothing before it is trained."""

import logging
from collections.abc import Mapping
from typing import Any

from lerobot.processor import PolicyProcessorPipeline, UnnormalizerProcessorStep

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.policies.checkpoints import LoadedPolicy
from pi_rl.policies.flow_policy import FlowPolicy
from pi_rl.rollout.evaluator import EpisodeResults

MIN_EPISODES = 10
"""Fewer unsolved episodes are no reason for a warning."""
_ACTION = "action"
logger = logging.getLogger(__name__)


def warn_about_zero_success(results: EpisodeResults, loaded: LoadedPolicy, policy: FlowPolicy) -> None:
    """Warns where no episode of an evaluation was solved, and lists the usual causes with this run's numbers.

    Environments without cameras are left out: they need not know success, and no checkpoint was made elsewhere for
    them.

    Args:
        results: Evaluation of a policy before its training.
        loaded: The policy and its processors.
        policy: The same policy as rollouts use it.
    """
    spec = results.spec
    solved_nothing = not (results.success.any() or (spec.subtasks > 1 and results.returns.any()))
    if len(results.success) >= MIN_EPISODES and solved_nothing and spec.cameras:
        logger.warning(zero_success_message(results, loaded, policy))


def zero_success_message(results: EpisodeResults, loaded: LoadedPolicy, policy: FlowPolicy) -> str:
    """The warning's text; arguments as for `warn_about_zero_success`."""
    spec = results.spec
    name = loaded.path.name if loaded.path is not None else type(loaded.policy).__name__
    causes = (
        f"wrong suite: {name} must have been fine-tuned on {spec.name}, with its instructions such as "
        f"{spec.instructions[0]!r}.",
        f"images: the policy sees {_cameras(policy, loaded)}, the environment draws {_sizes(spec.cameras)}. The keys "
        "may stand for other cameras than in the fine-tuning data, or the images be flipped or rotated beside it "
        "(LIBERO's are turned by 180°, MetaWorld's corner2 is mirrored on both axes).",
        f"actions: {_statistics(loaded.postprocessor)}; the environment takes {_bounds(spec)}. They must be those of "
        "this environment's data.",
        f"n_action_steps: {policy.n_action_steps} of {policy.chunk_size} predicted actions are executed before the "
        "policy looks again.",
        f"control mode and state layout: actions have {spec.action_dim} numbers, observation.state has "
        f"{spec.state_dim}; equal sizes may still mean other things (absolute or relative, gripper's sign, order).",
        f"horizon: episodes end after {spec.max_episode_steps} steps (max_episode_steps).",
    )
    return (
        f"{name} solved none of {len(results.success)} evaluation episodes in {spec.name} "
        f"(mean return {results.returns.mean():.3g}). Reinforcement learning with a reward for success cannot start "
        "from there. Usual causes:" + "".join(f"\n  - {cause}" for cause in causes)
    )


def _cameras(policy: FlowPolicy, loaded: LoadedPolicy) -> str:
    shapes = {key: loaded.policy.config.input_features[key].shape for key in policy.cameras}
    return _sizes({key: (shape[-2], shape[-1]) for key, shape in shapes.items()})


def _sizes(cameras: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{key} ({height} x {width})" for key, (height, width) in cameras.items()) or "no image"


def _bounds(spec: EnvSpec) -> str:
    return f"{min(spec.action_low):g} to {max(spec.action_high):g}"


def _statistics(postprocessor: PolicyProcessorPipeline) -> str:
    """What the postprocessor multiplies normalised actions by."""
    numbers: dict[str, Any] = {}
    for step in getattr(postprocessor, "steps", ()):
        if isinstance(step, UnnormalizerProcessorStep):
            numbers.update(step.state_dict())
    kept = {
        name: numbers[f"{_ACTION}.{name}"]
        for name in ("mean", "std", "min", "max", "q01", "q99")
        if f"{_ACTION}.{name}" in numbers
    }
    if not kept:
        return "the postprocessor holds no statistics, so the policy's outputs are taken as they are"
    listed = ", ".join(
        f"{name} {values.min().item():.3g} to {values.max().item():.3g}" for name, values in kept.items()
    )
    return f"the postprocessor's statistics are {listed} over {next(iter(kept.values())).numel()} numbers"

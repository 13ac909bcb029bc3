"""Processors of the policy type `pi0_small`."""

from typing import Any

from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import make_default_policy_processor_steps

from pi_rl.policies.small.configuration_pi0_small import PI0SmallConfig
from pi_rl.policies.small.processing import make_pipelines, relative_actions_step, tokenizer_step


def make_pi0_small_pre_post_processors(
    config: PI0SmallConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Builds the pipelines with LeRobot's steps in π0's order.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics by feature key; a feature without statistics is not normalised.

    Returns:
        (preprocessor, postprocessor).
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    relative = relative_actions_step(config)
    prompt = (Pi0NewLineProcessor(), tokenizer_step(config))
    order = (steps.rename_observations, steps.add_batch_dim, *prompt, steps.to_device, relative, steps.normalize)
    return make_pipelines(config, steps, relative, order)

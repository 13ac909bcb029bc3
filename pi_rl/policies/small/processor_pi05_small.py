"""Processors of the policy type `pi05_small`."""

from typing import Any

from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import NewLineTaskProcessorStep, ProcessorStep, make_default_policy_processor_steps

from pi_rl.policies.small.configuration_pi05_small import PI05SmallConfig
from pi_rl.policies.small.processing import make_pipelines, relative_actions_step, tokenizer_step


def make_pi05_small_pre_post_processors(
    config: PI05SmallConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Builds the pipelines with LeRobot's steps in π0.5's order: the normalised state may become part of the prompt.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics by feature key; a feature without statistics is not normalised.

    Returns:
        (preprocessor, postprocessor).
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    relative = relative_actions_step(config)
    prompt: ProcessorStep = NewLineTaskProcessorStep()
    if config.state_in_prompt:
        prompt = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim)
    words = (prompt, tokenizer_step(config))
    order = (steps.rename_observations, steps.add_batch_dim, relative, steps.normalize, *words, steps.to_device)
    return make_pipelines(config, steps, relative, order)

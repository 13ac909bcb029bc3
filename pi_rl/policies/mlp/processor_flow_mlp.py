"""Processors of the policy type `flow_mlp`."""

from typing import Any

from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines

from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig


def make_flow_mlp_pre_post_processors(
    config: FlowMLPConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Builds the pipelines with LeRobot's default steps.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics by feature key; a feature without statistics is not normalised.

    Returns:
        (preprocessor, postprocessor).
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    inputs = [steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize]
    return make_policy_processor_pipelines(input_steps=inputs, output_steps=[steps.unnormalize, steps.to_cpu])

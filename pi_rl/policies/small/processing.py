"""The processor steps that differ from LeRobot's π0 and π0.5: the tokenizer is the policy's own."""

from collections.abc import Sequence
from typing import Any

from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    ProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_policy_processor_pipelines,
)


def tokenizer_step(config: Any) -> TokenizerProcessorStep:
    """Tokenizer step that reads `config.tokenizer_name`.

    Raises:
        ValueError: If the configuration names no tokenizer, or the tokenizer has more tokens than the model.
    """
    if not config.tokenizer_name:
        raise ValueError(
            f"A {config.type} policy has no tokenizer: tokenizer_name is empty. Set it to a folder or Hub id with "
            "tokenizer files; pi_rl.policies.small.create.create_small_policy writes one."
        )
    step = TokenizerProcessorStep(
        tokenizer_name=config.tokenizer_name,
        max_length=config.tokenizer_max_length,
        padding_side="right",
        padding="max_length",
    )
    if len(step.input_tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer at {config.tokenizer_name!r} has {len(step.input_tokenizer)} tokens, the model only "
            f"vocab_size={config.vocab_size}; raise vocab_size or use a smaller tokenizer."
        )
    return step


def relative_actions_step(config: Any) -> RelativeActionsProcessorStep:
    """Step that makes actions relative to the state when the configuration says so."""
    return RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )


def make_pipelines(
    config: Any, steps: Any, relative_step: RelativeActionsProcessorStep, input_steps: Sequence[ProcessorStep]
) -> tuple[Any, Any]:
    """Wraps the input steps and LeRobot's usual output steps into (preprocessor, postprocessor)."""
    absolute_step = AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative_step)
    return make_policy_processor_pipelines(
        input_steps=list(input_steps), output_steps=[steps.unnormalize, absolute_step, steps.to_cpu]
    )

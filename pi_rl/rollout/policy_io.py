"""Between an environment's arrays and a policy's tensors: LeRobot's processors around the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
)
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from pi_rl.envs.vector_env import STATE_KEY, TASK_KEY, EnvSpec, Observation
from pi_rl.policies.flow_policy import FlowPolicy
from pi_rl.policies.pi import PiFlowPolicy

_TOKEN_MULTIPLE = 8  # rows of keys and masks then lie where fused kernels want them
_STATE_BINS = 256  # of π0.5's prompt: bin b holds normalised states from -1 + b/128 on, bin -1 what is below


@dataclass(frozen=True)
class PolicyIO:
    """Turns observations into policy batches and predicted chunks into environment actions.

    Attributes:
        preprocessor: LeRobot's policy preprocessor pipeline (normalise, tokenise, move to the device).
        postprocessor: LeRobot's policy postprocessor pipeline (unnormalise, move to the CPU).
        spec: The environment's specification; actions are clipped to its bounds.
        n_action_steps: C, how many of the predicted actions are executed.

    Raises:
        ValueError: If actions are relative to a state that has fewer numbers than they have.
    """

    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    postprocessor: Callable[[Tensor], Tensor]
    spec: EnvSpec
    n_action_steps: int

    def __post_init__(self) -> None:
        """Checks that relative actions have a state to be relative to."""
        if self._relative_steps and self.spec.state_dim < self.spec.action_dim:
            raise ValueError(
                f"The policy's actions are relative to the state, but {self.spec.name} has state_dim="
                f"{self.spec.state_dim}, fewer than its action_dim={self.spec.action_dim}. Use the environment that "
                "the policy was trained for."
            )

    @property
    def _relative_steps(self) -> list[RelativeActionsProcessorStep]:
        """The steps whose state the postprocessor adds to actions; none where actions are absolute."""
        steps = getattr(self.postprocessor, "steps", ())
        adding = [step for step in steps if isinstance(step, AbsoluteActionsProcessorStep) and step.enabled]
        return [step.relative_step for step in adding if step.relative_step is not None]

    def batch(self, observation: Observation, rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The policy's input for some rows of an observation.

        Args:
            observation: Images uint8 (B, height, width, 3), state float32 (B, S), task texts.
            rows: n indices into the B rows.

        Returns:
            What the preprocessor makes of images float (n, 3, height, width) in [0, 1], state and texts.
        """
        raw = observation_tensors(observation, rows, self.spec.cameras)
        return self.preprocessor(raw)

    def actions(self, chunk: Tensor, observation: Observation, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The executed part of predicted chunks in the environment's units.

        Relative actions are added to the state that their chunk begins with. LeRobot's postprocessor takes that of
        whatever was preprocessed last, so it is told these rows' states first.

        Args:
            chunk: (n, H, D) denoised, normalised and padded actions.
            observation: The observation of all environments that the chunks were predicted from.
            rows: (n,) the rows that the chunks belong to.

        Returns:
            (n, C, A) float32 within the environment's bounds.
        """
        for step in self._relative_steps:
            step(create_transition(observation={OBS_STATE: _state(observation, rows)}))
        executed = chunk[:, : self.n_action_steps, : self.spec.action_dim]
        actions = self.postprocessor(executed).numpy().astype(np.float32)
        return np.clip(actions, self.spec.action_low, self.spec.action_high)


def blank_observation(spec: EnvSpec) -> Observation:
    """One row that looks like an observation of the environment and shows nothing."""
    return {
        **{camera: np.zeros((1, height, width, 3), np.uint8) for camera, (height, width) in spec.cameras.items()},
        STATE_KEY: np.zeros((1, spec.state_dim), np.float32),
        TASK_KEY: [spec.instruction(0, 0)],
    }


def observation_tensors(
    observation: Observation, rows: Sequence[int] | np.ndarray, cameras: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """LeRobot's form of some rows of an observation: float images (n, 3, h, w) in [0, 1], state (n, S), texts."""
    rows = np.asarray(rows)
    raw: dict[str, Any] = {"task": [observation["task"][row] for row in rows]}
    for camera in cameras:
        images = torch.from_numpy(np.ascontiguousarray(observation[camera][rows]))
        raw[camera] = images.permute(0, 3, 1, 2).float() / 255.0
    raw[OBS_STATE] = _state(observation, rows)
    return raw


def _state(observation: Observation, rows: Sequence[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(observation[OBS_STATE][np.asarray(rows)]))


def fit_prompt(policy: FlowPolicy, preprocessor: PolicyProcessorPipeline, spec: EnvSpec) -> None:
    """Has a policy encode no more language tokens than the environment's longest prompt takes, in blocks of eight.

    The number is the same for all observations of a run, so that every pass of the network has the same shape.
    """
    if isinstance(policy, PiFlowPolicy):
        rounded = -(-longest_prompt_tokens(preprocessor, spec) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
        policy.language_tokens = min(rounded, policy.policy.config.tokenizer_max_length)


def longest_prompt_tokens(preprocessor: PolicyProcessorPipeline, spec: EnvSpec) -> int:
    """How many tokens a prompt has at most over the environment's sentences and all states.

    The preprocessor's own steps write the prompts. Where they write the state, every number is the one that takes the
    most tokens; numbers are words of their own, so no other state makes a longer prompt.

    Args:
        preprocessor: LeRobot's policy preprocessor pipeline.
        spec: Of the environment; `spec.sentences()` are looked at.

    Returns:
        The number, at most the tokenizer's `max_length`, where prompts are cut; 0 for a policy without a tokenizer.
    """
    steps = list(preprocessor.steps)
    position = next((i for i, step in enumerate(steps) if isinstance(step, TokenizerProcessorStep)), None)
    if position is None:
        return 0
    tokenizer = steps[position]
    others = (NormalizerProcessorStep, RelativeActionsProcessorStep, DeviceProcessorStep)
    writing = [step for step in steps[:position] if not isinstance(step, others)]

    def lengths(sentences: Sequence[str], state: Tensor) -> list[int]:
        transition = create_transition(observation={OBS_STATE: state}, complementary_data={"task": list(sentences)})
        for step in writing:
            transition = step(transition)
        prompts = transition[TransitionKey.COMPLEMENTARY_DATA]["task"]
        return [len(tokens) for tokens in tokenizer.input_tokenizer(prompts)["input_ids"]]

    sentences = spec.sentences()
    values = (torch.arange(-1, _STATE_BINS) + 0.5) / (_STATE_BINS / 2) - 1
    per_value = lengths(sentences[:1] * len(values), values[:, None].repeat(1, spec.state_dim))
    longest = values[per_value.index(max(per_value))]
    found = max(lengths(sentences, longest.expand(len(sentences), spec.state_dim)))
    return min(found, tokenizer.max_length)

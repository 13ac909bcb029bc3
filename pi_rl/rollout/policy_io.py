"""Between an environment's arrays and a policy's tensors: LeRobot's processors around the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi_rl.envs.vector_env import STATE_KEY, TASK_KEY, EnvSpec, Observation


@dataclass(frozen=True)
class PolicyIO:
    """Turns observations into policy batches and predicted chunks into environment actions.

    Attributes:
        preprocessor: LeRobot's policy preprocessor pipeline (normalise, tokenise, move to the device).
        postprocessor: LeRobot's policy postprocessor pipeline (unnormalise, move to the CPU).
        spec: The environment's specification; actions are clipped to its bounds.
        n_action_steps: C, how many of the predicted actions are executed.
    """

    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    postprocessor: Callable[[Tensor], Tensor]
    spec: EnvSpec
    n_action_steps: int

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

        Args:
            chunk: (n, H, D) denoised, normalised and padded actions.
            observation: What the policy acted on, all B rows.
            rows: n indices into the B rows.

        Returns:
            (n, C, A) float32 within the environment's bounds.
        """
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
    raw["observation.state"] = torch.from_numpy(np.ascontiguousarray(observation["observation.state"][rows]))
    return raw

"""Rewards that pi_rl computes itself, for one environment or for a batch of them; numpy only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

REWARDS = ("success", "structured")
SUCCESS_REWARD = 1.0
ATTACHED_REWARD = 0.1


def check_reward(reward: str) -> None:
    """Checks the `reward` option of a simulator.

    Raises:
        ValueError: It is not one of `REWARDS`.
    """
    if reward not in REWARDS:
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {reward!r}")


class TaskReward:
    """Sparse or structured reward of B episodes (paper section 5.2.2: ManiSkill).

    A state is worth Φ = 1[solved] for "success" and Φ = 0.1 · 1[object attached to the gripper] + 1[solved] for
    "structured". A step pays the difference Φ_t − Φ_{t−1}, so an episode's rewards add up to the Φ of its last state:
    holding an object longer, or dropping it and taking it up again, earns nothing more, and throwing it away costs
    the 0.1 again. What is solved once stays solved: a success that flips off keeps its reward.

    Args:
        reward: One of `REWARDS`.
        shape: (B,), or () for a single environment.

    Raises:
        ValueError: If the reward is unknown.
    """

    def __init__(self, reward: str, shape: tuple[int, ...] = ()):
        check_reward(reward)
        self.uses_attachment = reward == "structured"
        self._potential = np.zeros(shape)
        self._solved = np.zeros(shape, bool)

    def reset(self, attached: Any = False, rows: Any = ...) -> None:
        """Begins episodes.

        Args:
            attached: Whether an object is attached to the gripper at the start; that is not paid.
            rows: Which of the B; all by default.
        """
        self._solved[rows] = False
        self._potential[rows] = self._value(attached, self._solved[rows])

    def step(self, solved: Any, attached: Any = False) -> NDArray[np.floating]:
        """Rewards of one step of all B episodes.

        Args:
            solved: bool (B,), whether the task is solved now.
            attached: bool (B,), whether an object is attached to the gripper now; no matter for "success".

        Returns:
            float64 (B,); a number for a single environment.
        """
        self._solved[...] |= np.asarray(solved, bool)
        before = self._potential.copy()
        self._potential[...] = self._value(attached, self._solved)
        return self._potential - before

    def _value(self, attached: Any, solved: NDArray[np.bool_]) -> NDArray[np.floating]:
        held = ATTACHED_REWARD * np.asarray(attached, float) if self.uses_attachment else 0.0
        return SUCCESS_REWARD * solved + held

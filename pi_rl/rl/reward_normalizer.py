"""Rewards on a scale that the critic and the value clip are made for. Shapes: T chunks, B environments."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class RewardNormalizer:
    """Running standard deviation of the discounted returns; rewards are divided by it, and not shifted.

    ``G_t = r_t + gamma * (1 - done_{t-1}) * G_{t-1}`` is the discounted sum of the rewards up to step t of an episode.
    The std of all G so far brings returns, and with them values and advantages, to the order of 1 whatever the units
    of the reward. Division by a positive number leaves the best policy the best; a shift would not, since it rewards
    or punishes the length of an episode.

    Args:
        gamma: Discount per chunk, in [0, 1], the one of the advantages.

    Raises:
        ValueError: If ``gamma`` is outside [0, 1].
    """

    def __init__(self, gamma: float) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"`gamma={gamma}` is outside [0, 1]; pass the discount of the advantages, such as 0.99")
        self.gamma = gamma
        self._count, self._mean, self._squares = 0.0, 0.0, 0.0

    def update(
        self,
        rewards: Tensor,
        done: Tensor,
        valid: Tensor,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Count a rollout, whose first chunks begin episodes.

        Args:
            rewards: (T, B) not normalised. Ignored, NaN included, where not valid.
            done: (T, B) bool, the episode ended inside the chunk.
            valid: (T, B) bool, the chunk belongs to an episode.
            reduce: Sums a (3,) float64 vector (count, sum, sum of squares) over the processes and returns it; must be
                called by every process. None for a single process.

        Raises:
            ValueError: If shapes disagree or a mask is not bool.
        """
        for name, mask in (("done", done), ("valid", valid)):
            if rewards.ndim != 2 or mask.shape != rewards.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"`rewards` has shape {tuple(rewards.shape)} and `{name}` is {mask.dtype} of shape "
                    f"{tuple(mask.shape)}; they must be (T, B) and bool (T, B)"
                )
        exact = torch.where(valid, rewards.double(), torch.zeros((), dtype=torch.float64, device=rewards.device))
        total, totals = torch.zeros_like(exact.sum(dim=0)), torch.zeros_like(exact)
        for step in range(len(exact)):
            total = exact[step] + self.gamma * total
            totals[step] = total
            total = torch.where(done[step], torch.zeros_like(total), total)
        counted = totals[valid]
        statistics = torch.stack([valid.sum().double(), counted.sum(), counted.square().sum()])
        if reduce is not None:
            statistics = reduce(statistics)
        self._merge(*statistics.tolist())

    def _merge(self, count: float, total: float, squares: float) -> None:
        """Chan's update, which keeps the digits that a difference of two large sums of squares loses."""
        if count == 0:
            return
        mean = total / count
        both = self._count + count
        shift = mean - self._mean
        self._squares += max(squares - count * mean**2, 0.0) + shift**2 * self._count * count / both
        self._mean += shift * count / both
        self._count = both

    @property
    def scale(self) -> float:
        """What to divide rewards by: the population std of all returns counted; 1 while they were all equal."""
        if self._count == 0:
            return 1.0
        std = math.sqrt(self._squares / self._count)
        # a spread this small beside the mean is rounding, and no measure of anything
        return std if std > 1e-8 * max(1.0, abs(self._mean)) else 1.0

    def state_dict(self) -> dict[str, float]:
        """The statistics as plain numbers, for a checkpoint."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from saved statistics.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If a number is missing or unknown.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the state holds {sorted(state)}; it must hold {sorted(self.state_dict())}")
        self._count, self._mean, self._squares = (float(state[name]) for name in ("count", "mean", "squares"))

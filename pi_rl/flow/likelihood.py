"""Gaussian densities and reductions over the scored elements of an action chunk, in float32."""

import math

import torch
from torch import Tensor

LIKELIHOOD_LEVELS = ("chunk", "action", "element")

_LOG_2PI = math.log(2.0 * math.pi)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of independent Gaussians, element by element.

    Args:
        x: Points, any shape.
        mean: Means, broadcastable to ``x``.
        std: Standard deviations, positive, broadcastable to ``x``.

    Returns:
        float32, with the broadcast shape.
    """
    x, mean, std = x.float(), mean.float(), std.float()
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * _LOG_2PI


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """Log-density of N(0, 1), element by element, in float32."""
    return -0.5 * x.float().square() - 0.5 * _LOG_2PI


def gaussian_entropy(std: Tensor) -> Tensor:
    """Differential entropy ``log(std) + (1 + log(2 pi)) / 2`` in nats, element by element, in float32."""
    return std.float().log() + 0.5 * (1.0 + _LOG_2PI)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the elements that a mask selects.

    Args:
        values: Broadcastable to (B, H, D) with B leading.
        mask: (H, D) bool.

    Returns:
        (B,) sums. Whatever stands outside of the mask, NaN included, has no effect.
    """
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum(dim=(1, 2))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the elements that a mask selects.

    Args:
        values: Broadcastable to (B, H, D) with B leading.
        mask: (H, D) bool with at least one True.

    Returns:
        (B,) means.
    """
    return masked_sum(values, mask) / mask.sum()


def reduce_to_units(values: Tensor, scored: Tensor, level: str) -> Tensor:
    """Sums over the scored elements of each unit, the part of a chunk that one probability ratio covers.

    Args:
        values: Broadcastable to (B, H, D) with B leading, such as log-probs.
        scored: (H, D) bool. Whatever stands outside of it, NaN included, has no effect.
        level: ``chunk`` sums everything into one unit (U = 1); ``action`` gives every horizon step with a scored
            element a unit of its own; ``element`` every scored element, row by row, without any sum.

    Returns:
        (B, U). The units of each level add up to the ``chunk`` unit.

    Raises:
        ValueError: If the level is unknown.
    """
    if level == "chunk":
        return masked_sum(values, scored)[:, None]
    if level == "action":
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        return torch.where(scored, values, zero).sum(dim=2)[:, scored.any(dim=1)]
    if level == "element":
        return values.expand(-1, *scored.shape)[:, scored]
    raise ValueError(f"`likelihood_level={level!r}` is unknown; choose one of {', '.join(LIKELIHOOD_LEVELS)}")


def unit_count(scored: Tensor, level: str) -> int:
    """Number of units U that `reduce_to_units` makes of a chunk.

    Args:
        scored: (H, D) bool.
        level: One of `LIKELIHOOD_LEVELS`.
    """
    return reduce_to_units(torch.zeros(1, *scored.shape, device=scored.device), scored, level).shape[1]

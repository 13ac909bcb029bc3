"""Gaussian densities and reductions over the scored elements of an action chunk, in float32."""

import math

import torch
from torch import Tensor

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

"""Advantages of action chunks (paper section 4.3.1, Eq. 13). Shapes: T chunks, B environments, N valid samples."""

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-8


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with one action chunk as the step.

    ``delta_t = r_t + gamma * next_v_t * (1 - terminated_t) - v_t`` and
    ``A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}``. Termination (success) cuts the value; truncation (time
    limit) bootstraps from ``next_values``, and both cut the recursion. Computed in float32, or float64 where
    ``values`` is.

    Args:
        rewards: (T, B) sum of the rewards inside each chunk.
        values: (T, B) V of the observation that the chunk started from.
        next_values: (T, B) V of the observation after the chunk; of the final observation, not of the reset one, where
            an episode was truncated. Ignored, NaN included, where ``terminated``.
        terminated: (T, B) bool, the episode reached a terminal state inside the chunk.
        done: (T, B) bool, ``terminated`` or truncated.
        gamma: Discount per chunk, in [0, 1].
        gae_lambda: Lambda, in [0, 1].
        valid: (T, B) bool, False for steps that do not belong to any episode (after its end in masked rollouts). They
            get 0, and nothing of them, NaN included, reaches the other steps. None means that all are valid.

    Returns:
        Advantages and returns (advantage + value), both (T, B), 0 where not valid.

    Raises:
        ValueError: If shapes disagree, a coefficient is out of range or a terminated step is not done.
    """
    masks = {"terminated": terminated, "done": done} | ({} if valid is None else {"valid": valid})
    _check_gae({"rewards": rewards, "values": values, "next_values": next_values}, masks, gamma, gae_lambda)
    dtype = torch.promote_types(values.dtype, torch.float32)
    if valid is None:
        valid = torch.ones_like(done)
    zero = torch.zeros((), dtype=dtype, device=values.device)
    # `where` instead of a product: 0 * NaN of a stale row is NaN
    values = torch.where(valid, values.to(dtype), zero)
    bootstrap = torch.where(terminated, zero, next_values.to(dtype))
    deltas = torch.where(valid, rewards.to(dtype) + gamma * bootstrap - values, zero)
    decay = torch.where(done, zero, torch.full_like(zero, gamma * gae_lambda))
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[0])
    for step in reversed(range(len(values))):
        following = torch.where(valid[step], deltas[step] + decay[step] * following, zero)
        advantages[step] = following
    return advantages, advantages + values


def normalize_advantages(advantages: Tensor, *, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Shift and scale advantages to mean 0 and std 1 over the valid samples of all processes.

    Args:
        advantages: (N,) valid samples of this process; N may be 0.
        reduce: Sums a (3,) float64 vector (count, sum, sum of squares) over the processes and returns it; must be
            called by every process. None for a single process.

    Returns:
        (N,) in the input's type: ``(A - mean) / (std + 1e-8)`` with the population std. Equal advantages give zeros.

    Raises:
        ValueError: If ``advantages`` is not a vector.
    """
    if advantages.ndim != 1:
        raise ValueError(f"`advantages` has shape {tuple(advantages.shape)}; it must be (N,), valid samples only")
    exact = advantages.double()
    statistics = torch.stack([torch.full_like(exact.sum(), len(exact)), exact.sum(), exact.square().sum()])
    if reduce is not None:
        statistics = reduce(statistics)
    count, total, squares = statistics.unbind()
    count = count.clamp(min=1.0)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0.0).sqrt()
    return ((exact - mean) / (std + _EPS)).to(advantages.dtype)


def _check_gae(values: dict[str, Tensor], masks: dict[str, Tensor], gamma: float, gae_lambda: float) -> None:
    shape = values["values"].shape
    for name, tensor in (values | masks).items():
        if tensor.ndim != 2 or tensor.shape != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)} and `values` {tuple(shape)}; both must be (T, B)"
            )
    for name, tensor in masks.items():
        if tensor.dtype != torch.bool:
            raise ValueError(f"`{name}` is {tensor.dtype}; it must be bool")
    if shape[0] < 1:
        raise ValueError(f"the rollout has shape {tuple(shape)}; it must hold at least one chunk")
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}={value}` is outside [0, 1]; the published settings are 0.99 and 0.95")
    if (masks["terminated"] & ~masks["done"]).any():
        raise ValueError("some steps are terminated but not done; pass done = terminated | truncated")

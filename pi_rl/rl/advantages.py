"""Advantages of action chunks: GAE (paper section 4.3.1, Eq. 13) and groups (Eq. 17).

Shapes: T chunks, B environments, S transitions of a chunk (`FlowSampler.transitions`), N valid samples, E episodes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-8
_RETURN_EPS = 1e-6
# of group-relative advantages, as published
_GROUP_EPS = 1e-6


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
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
        gamma: Discount per step, in [0, 1]; a tensor, broadcastable to (T, B), where steps differ.
        gae_lambda: Lambda, in [0, 1], likewise.
        valid: (T, B) bool, False for steps that do not belong to any episode (after its end in masked rollouts). They
            get 0, and nothing of them, NaN included, reaches the other steps. None means that all are valid.

    Returns:
        Advantages and returns (advantage + value), both (T, B), 0 where not valid.

    Raises:
        ValueError: If shapes disagree, a coefficient is out of range or a terminated step is not done.
    """
    masks = {"terminated": terminated, "done": done} | ({} if valid is None else {"valid": valid})
    _check_gae({"rewards": rewards, "values": values, "next_values": next_values}, masks)
    discount = _coefficient("gamma", gamma, values)
    decay = discount * _coefficient("gae_lambda", gae_lambda, values)
    dtype = torch.promote_types(values.dtype, torch.float32)
    if valid is None:
        valid = torch.ones_like(done)
    zero = torch.zeros((), dtype=dtype, device=values.device)
    # `where` instead of a product: 0 * NaN of a stale row is NaN
    values = torch.where(valid, values.to(dtype), zero)
    bootstrap = torch.where(terminated, zero, next_values.to(dtype))
    deltas = torch.where(valid, rewards.to(dtype) + discount.to(dtype) * bootstrap - values, zero)
    decay = torch.where(done, zero, decay.to(dtype))
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[0])
    for step in reversed(range(len(values))):
        following = torch.where(valid[step], deltas[step] + decay[step] * following, zero)
        advantages[step] = following
    return advantages, advantages + values


def two_layer_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    denoising_gamma: float = 1.0,
    denoising_lambda: float = 1.0,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the T * S transitions of the two-layer MDP (section 4.2.2).

    Every denoising step is a step of `gae`. The last one of a chunk receives the chunk's reward, ends the episode if
    the chunk does, and is followed, with ``gamma`` and ``gae_lambda``, by the first one of the next chunk. The steps
    before it receive nothing and are followed by the chunk's next one with ``denoising_gamma`` and
    ``denoising_lambda``. At their default of 1, and with values that are equal within a chunk, every transition gets
    the advantage that `gae` gives to its chunk.

    Args:
        rewards: (T, B) sum of the rewards inside each chunk.
        values: (T, S, B) V of the observation and the denoising state that each transition started from.
        next_values: (T, B) V of the first transition of the observation after the chunk; see `gae`.
        terminated: (T, B) bool, the episode reached a terminal state inside the chunk.
        done: (T, B) bool, ``terminated`` or truncated.
        gamma: Discount per chunk, in [0, 1]; a tensor, broadcastable to (T, B), where chunks differ.
        gae_lambda: Lambda between chunks, in [0, 1], likewise.
        denoising_gamma: Discount between the transitions of a chunk, in [0, 1].
        denoising_lambda: Lambda between the transitions of a chunk, in [0, 1].
        valid: (T, B) bool, False for chunks that do not belong to any episode; see `gae`. None means all.

    Returns:
        Advantages and returns (advantage + value), both (T, S, B), 0 where not valid.

    Raises:
        ValueError: If shapes disagree, a coefficient is out of range or a terminated chunk is not done.
    """
    if values.ndim != 3 or min(values.shape[:2]) < 1:
        raise ValueError(f"`values` has shape {tuple(values.shape)}; it must be (T, S, B) with T and S at least 1")
    chunks, transitions, envs = values.shape
    first = values[:, 0]
    masks = {"terminated": terminated, "done": done} | ({} if valid is None else {"valid": valid})
    _check_gae({"rewards": rewards, "values": first, "next_values": next_values}, masks)

    def flat(inner: Tensor, last: Tensor) -> Tensor:
        """(T * S, B) from what belongs to the transitions before the last, (T, S - 1, B), and to the last, (T, B)."""
        return torch.cat([inner, last[:, None]], dim=1).reshape(chunks * transitions, envs)

    inner = (chunks, transitions - 1, envs)
    never = done.new_zeros(inner)
    advantages, returns = gae(
        flat(rewards.new_zeros(inner), rewards),
        values.reshape(chunks * transitions, envs),
        flat(values[:, 1:], next_values.to(values.dtype)),
        flat(never, terminated),
        flat(never, done),
        gamma=flat(
            _coefficient("denoising_gamma", denoising_gamma, values[:, 1:]),
            _coefficient("gamma", gamma, first),
        ),
        gae_lambda=flat(
            _coefficient("denoising_lambda", denoising_lambda, values[:, 1:]),
            _coefficient("gae_lambda", gae_lambda, first),
        ),
        valid=None if valid is None else valid.repeat_interleave(transitions, dim=0),
    )
    return advantages.reshape(values.shape), returns.reshape(values.shape)


def group_advantages(returns: Tensor, groups: Tensor) -> Tensor:
    """Group-relative advantages of GRPO, ``(R - mean) / (std + 1e-6)`` within each group (Eq. 17).

    Args:
        returns: (E,) sum of the rewards of each episode.
        groups: (E,) int64, equal for episodes that began in the same initial state.

    Returns:
        (E,) in float32, or float64 where ``returns`` is; the std is the unbiased one. Exactly 0 in groups of equal
        returns, which say nothing about what was better, and in groups of one.

    Raises:
        ValueError: If the arguments are not vectors of equal length or ``groups`` is not int64.
    """
    informative = informative_groups(returns, groups)
    _, group = groups.unique(return_inverse=True)
    exact = returns.double()
    count = group.bincount().double()
    deviation = exact - (torch.zeros_like(count).index_add(0, group, exact) / count)[group]
    squares = torch.zeros_like(count).index_add(0, group, deviation.square())
    std = (squares / (count - 1.0).clamp(min=1.0)).sqrt()[group]
    advantages = torch.where(informative, deviation / (std + _GROUP_EPS), torch.zeros_like(deviation))
    return advantages.to(torch.promote_types(returns.dtype, torch.float32))


def informative_groups(returns: Tensor, groups: Tensor) -> Tensor:
    """Which episodes belong to a group that a policy can learn from: its returns are not all equal.

    Args:
        returns: (E,) sum of the rewards of each episode.
        groups: (E,) int64, equal for episodes that began in the same initial state.

    Returns:
        (E,) bool, False for every episode of a group in which all succeeded, all failed, or there is only one.

    Raises:
        ValueError: If the arguments are not vectors of equal length or ``groups`` is not int64.
    """
    if returns.ndim != 1 or groups.shape != returns.shape or groups.dtype != torch.int64:
        raise ValueError(
            f"`returns` has shape {tuple(returns.shape)} and `groups` is {groups.dtype} of shape "
            f"{tuple(groups.shape)}; they must be (E,) and int64 (E,)"
        )
    numbers, group = groups.unique(return_inverse=True)
    blank = returns.new_zeros(len(numbers))
    highest = blank.scatter_reduce(0, group, returns, "amax", include_self=False)
    lowest = blank.scatter_reduce(0, group, returns, "amin", include_self=False)
    # sums of equal rewards in another order differ by rounding
    tolerance = _RETURN_EPS * torch.maximum(highest.abs(), lowest.abs()).clamp(min=1.0)
    return (highest - lowest > tolerance)[group]


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


def _coefficient(name: str, value: float | Tensor, values: Tensor) -> Tensor:
    """float64 in the shape of ``values``, so that a product of coefficients is rounded once."""
    coefficient = torch.as_tensor(value, dtype=torch.float64, device=values.device)
    if not ((coefficient >= 0.0) & (coefficient <= 1.0)).all():
        raise ValueError(f"`{name}={value}` is outside [0, 1]; the published settings are 0.99 and 0.95")
    try:
        return coefficient.broadcast_to(values.shape)
    except RuntimeError:
        raise ValueError(
            f"`{name}` has shape {tuple(coefficient.shape)}; it must broadcast to {tuple(values.shape)}"
        ) from None


def _check_gae(values: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
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
    if (masks["terminated"] & ~masks["done"]).any():
        raise ValueError("some steps are terminated but not done; pass done = terminated | truncated")

"""PPO losses and their diagnostics (paper section 4.3.1, Eq. 14-15).

Shapes: N samples of a minibatch, U ratio units of a sample (`FlowSampler.likelihood_level`; 1 at chunk level).
"""

import torch
from torch import Tensor
from torch.nn import functional

# exp(20) = 4.9e8 is far outside of every clip range and its square still fits in float32
_MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss ``-mean_N sum_U min(r A, clip(r, 1 - clip_range, 1 + clip_range_high) A)``.

    The units of a sample share its advantage. Their sum, not their mean, leaves the gradient at r = 1 the same at
    every level: that of the sample's log-prob times A. The log-ratio is limited to +-20 so that neither the loss nor
    its gradient overflows; beyond that limit the gradient is 0.

    Args:
        log_prob: (N, U) under the present policy.
        old_log_prob: (N, U) under the policy that acted.
        advantages: (N,).
        clip_range: Distance of the lower clip from 1, in (0, 1).
        clip_range_high: Distance of the upper clip from 1, positive; None means ``clip_range``.

    Returns:
        The () loss to minimise and detached () diagnostics: ``approx_kl`` (the k3 estimate
        ``mean_N sum_U (r - 1 - log r)`` of KL(old || new) of a sample, never negative), ``clip_fraction`` (share of
        the N * U ratios outside of the clip range), ``ratio_mean`` and ``ratio_max``.

    Raises:
        ValueError: If shapes disagree, are empty or a clip range is out of range.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    if not 0.0 < clip_range < 1.0 or high <= 0.0:
        raise ValueError(
            f"got clip_range={clip_range}, clip_range_high={clip_range_high}; the first must lie in (0, 1), the "
            "second must be positive; try 0.2"
        )
    _check_ratios(log_prob, old_log_prob, advantages)
    log_ratio = (log_prob - old_log_prob).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + high)
    weights = advantages[:, None]
    loss = -torch.minimum(ratio * weights, clipped * weights).sum(dim=1).mean()
    with torch.no_grad():
        diagnostics = {
            # expm1 keeps the digits that r - 1 loses near r = 1
            "approx_kl": (log_ratio.expm1() - log_ratio).sum(dim=1).mean(),
            "clip_fraction": ((ratio < 1.0 - clip_range) | (ratio > 1.0 + high)).float().mean(),
            "ratio_mean": ratio.mean(),
            "ratio_max": ratio.max(),
        }
    return loss, diagnostics


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip_range: float | None,
    huber_delta: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped value loss ``mean(max(h(v - R), h(v_clip - R)))``.

    ``v_clip`` is the value held within ``clip_range`` of the old one.

    Args:
        values: (N,) under the present critic.
        old_values: (N,) at rollout time.
        returns: (N,) regression targets R.
        clip_range: Largest counted change of a value, positive; None for no clip.
        huber_delta: ``h(e)`` is ``e^2 / 2`` up to this ``|e|`` and linear beyond; None for ``e^2 / 2`` everywhere.

    Returns:
        The () loss to minimise and the detached () diagnostic ``value_clip_fraction``.

    Raises:
        ValueError: If shapes disagree, are empty or a parameter is not positive.
    """
    for name, parameter in (("clip_range", clip_range), ("huber_delta", huber_delta)):
        if parameter is not None and parameter <= 0.0:
            raise ValueError(f"`{name}={parameter}` must be positive, or None to switch it off")
    _check_vectors(values=values, old_values=old_values, returns=returns)
    errors = _huber(values - returns, huber_delta)
    clip_fraction = torch.zeros_like(errors.detach()).mean()
    if clip_range is not None:
        change = values - old_values
        clipped = old_values + change.clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, _huber(clipped - returns, huber_delta))
        clip_fraction = (change.detach().abs() > clip_range).to(errors.dtype).mean()
    return errors.mean(), {"value_clip_fraction": clip_fraction}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the returns' variance that the values explain, ``1 - Var(R - V) / Var(R)``.

    Args:
        values: (N,) predictions.
        returns: (N,) targets.

    Returns:
        At most 1: 1 is perfect, 0 no better than a constant (also where all returns are equal).

    Raises:
        ValueError: If shapes disagree or are empty.
    """
    return explained_variance_from_moments(explained_variance_moments(values, returns))


def explained_variance_moments(values: Tensor, returns: Tensor) -> Tensor:
    """What explained variance needs, as sums that add up over processes.

    Args:
        values: (N,) predictions.
        returns: (N,) targets.

    Returns:
        (5,) float64: N, sum and sum of squares of the returns, and of returns minus values.

    Raises:
        ValueError: If shapes disagree or are empty.
    """
    _check_vectors(values=values, returns=returns)
    returns = returns.detach().double()
    errors = returns - values.detach().double()
    count = torch.tensor(float(len(returns)), dtype=torch.float64, device=returns.device)
    return torch.stack([count, returns.sum(), returns.square().sum(), errors.sum(), errors.square().sum()])


def explained_variance_from_moments(moments: Tensor) -> float:
    """Explained variance of all samples behind the (summed) moments; 0 where all returns are equal.

    Args:
        moments: (5,) from :func:`explained_variance_moments`.
    """
    count, *sums = moments.tolist()
    variance = sums[1] / count - (sums[0] / count) ** 2
    unexplained = sums[3] / count - (sums[2] / count) ** 2
    # a difference of float64 squares this small is rounding
    if variance <= 1e-12 * max(1.0, sums[1] / count):
        return 0.0
    return 1.0 - unexplained / variance


def _huber(errors: Tensor, delta: float | None) -> Tensor:
    if delta is None:
        return 0.5 * errors.square()
    return functional.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=delta)


def _check_ratios(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> None:
    shape = tuple(log_prob.shape)
    if len(shape) != 2 or min(shape) < 1 or old_log_prob.shape != shape or advantages.shape != shape[:1]:
        raise ValueError(
            f"`log_prob` has shape {shape}, `old_log_prob` {tuple(old_log_prob.shape)} and `advantages` "
            f"{tuple(advantages.shape)}; they must be (N, U), (N, U) and (N,) with N and U at least 1"
        )


def _check_vectors(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or first[0] < 1 or set(shapes.values()) != {first}:
        raise ValueError(f"got shapes {shapes}; all must be the same (N,) with N at least 1")

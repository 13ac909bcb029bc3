"""One denoising step as a Gaussian transition (paper sections 4.1 and 4.2).

Time runs as in the models: ``t = 1`` is noise and ``t = 0`` is the action, so ``x_t = t * noise + (1 - t) * action``
and the velocity is ``u = noise - action``. The paper's ``tau`` is ``1 - t``. With ``delta = t - t_next`` and the two
predictions

    x0_hat = x - t * u            (action)
    x1_hat = x + (1 - t) * u      (noise)

every step is Gaussian with mean ``(1 - t_next) * x0_hat + w1 * x1_hat``:

    noise        w1                                       std
    ode          t_next                                   0
    flow_sde     t_next - sigma^2 * delta / (2 * t)       sigma * sqrt(delta), sigma = a * sqrt(t / (1 - t))
    flow_noise   t_next                                   noise network
    flow_cps     t_next * cos(pi * a / 2)                 t_next * sin(pi * a / 2)

Equations 7 to 9 of the paper print the ``flow_sde`` row with ``t`` renamed to ``tau``, which does not preserve the
marginals; the row above does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NOISES = ("ode", "flow_sde", "flow_noise", "flow_cps")


@dataclass(frozen=True)
class Transition:
    """Gaussian of the next state.

    Attributes:
        mean: (B, H, D) float32.
        std: float32, broadcastable to ``mean``: (B, 1, 1) for ``ode``, ``flow_sde`` and ``flow_cps``, (B, H, D) for
            ``flow_noise``. Zero where the step is deterministic.
    """

    mean: Tensor
    std: Tensor


def time_grid(denoising_steps: int, device: torch.device | str | None = None) -> Tensor:
    """Times visited by the sampler, ``t_i = 1 - i / K``.

    Args:
        denoising_steps: K, at least 1.
        device: Device of the result.

    Returns:
        (K + 1,) float32, from exactly 1 to exactly 0.

    Raises:
        ValueError: If ``denoising_steps`` is smaller than 1.
    """
    if denoising_steps < 1:
        raise ValueError(f"`denoising_steps={denoising_steps}` must be at least 1; the published settings use 4 to 10")
    times = [(denoising_steps - i) / denoising_steps for i in range(denoising_steps + 1)]
    return torch.tensor(times, dtype=torch.float32, device=device)


def validate_noise_level(noise: str, noise_level: float | None) -> float:
    """Check that a noise level fits a kind of noise.

    Args:
        noise: One of `NOISES`.
        noise_level: The paper's ``a``: at least 0 for ``flow_sde``, in [0, 1] for ``flow_cps``, None for the others.

    Returns:
        The level, 0 for the kinds of noise that have none.

    Raises:
        ValueError: If the noise is unknown, or the level is missing, superfluous or out of range.
    """
    if noise not in NOISES:
        raise ValueError(f"unknown noise {noise!r}; choose one of {', '.join(NOISES)}")
    if noise in ("ode", "flow_noise"):
        if noise_level is not None:
            raise ValueError(f"`noise_level={noise_level}` has no effect with noise {noise!r}; set it to None")
        return 0.0
    if noise_level is None:
        raise ValueError(f"noise {noise!r} needs a `noise_level`; the published settings use 0.3 to 0.5")
    upper = 1.0 if noise == "flow_cps" else math.inf
    if not 0.0 <= noise_level <= upper or math.isinf(noise_level):
        raise ValueError(f"`noise_level={noise_level}` is outside [0, {upper}] for noise {noise!r}; try 0.5")
    return noise_level


def transition(
    noise: str,
    x: Tensor,
    velocity: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    noise_level: float | None = None,
    learned_std: Tensor | None = None,
) -> Transition:
    """Gaussian of the state at ``t_next`` given the state at ``t`` (table in the module's docstring; Eq. 4, 9).

    At ``t = 1`` the noise schedule of ``flow_sde`` is infinite. There, ``1 - t`` in its denominator is replaced by
    ``1 - t_next``, so that the first of K steps has a std of exactly ``a``.

    Args:
        noise: One of `NOISES`.
        x: (B, H, D) state at ``t``. Converted to float32.
        velocity: (B, H, D) the model's ``noise - action`` at ``x`` and ``t``. Converted to float32.
        t: (B,) current times in (0, 1].
        t_next: (B,) next times in [0, t).
        noise_level: ``a``, required by ``flow_sde`` and ``flow_cps`` and by nothing else.
        learned_std: (B, H, D) std from the noise network, required by ``flow_noise`` and by nothing else.

    Returns:
        The transition, in float32. With a noise level of 0 its mean is the ``ode`` mean, bit for bit.

    Raises:
        ValueError: If shapes disagree or the arguments do not fit the kind of noise.
    """
    level = validate_noise_level(noise, noise_level)
    _check_shapes(x, velocity, t, t_next)
    if (learned_std is not None) != (noise == "flow_noise"):
        state = "missing" if learned_std is None else "given"
        raise ValueError(f"`learned_std` is {state} for noise {noise!r}; only 'flow_noise' takes one, and needs it")
    x, velocity = x.float(), velocity.float()
    t, t_next = t.float()[:, None, None], t_next.float()[:, None, None]
    delta = t - t_next
    euler = x - delta * velocity
    if noise == "ode":
        return Transition(euler, torch.zeros_like(t))
    if learned_std is not None:
        if learned_std.shape != x.shape:
            raise ValueError(f"`learned_std` has shape {tuple(learned_std.shape)}; it must be {tuple(x.shape)}")
        return Transition(euler, learned_std.float())
    predicted_noise = x + (1.0 - t) * velocity
    if noise == "flow_sde":
        denominator = torch.where(t >= 1.0, 1.0 - t_next, 1.0 - t)
        # sigma^2 / t, free of the division by t that the equation shows
        variance_over_t = level**2 / denominator
        mean = euler - 0.5 * delta * variance_over_t * predicted_noise
        return Transition(mean, (variance_over_t * t * delta).sqrt())
    angle = 0.5 * math.pi * level
    return Transition(euler - (1.0 - math.cos(angle)) * t_next * predicted_noise, math.sin(angle) * t_next)


def _check_shapes(x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor) -> None:
    if x.ndim != 3 or velocity.shape != x.shape:
        raise ValueError(
            f"the state has shape {tuple(x.shape)} and the velocity {tuple(velocity.shape)}; both must be (B, H, D)"
        )
    if t.shape != x.shape[:1] or t_next.shape != x.shape[:1]:
        raise ValueError(
            f"`t` has shape {tuple(t.shape)} and `t_next` {tuple(t_next.shape)}; both must be ({x.shape[0]},), "
            "one time per sample"
        )

"""Gaussian actions N(.7, .35^2) have an analytic velocity: what each sampler does to their moments.

The velocity is affine in x, so means and variances propagate exactly. `moments` does that in float64 from the
equations; `package_moments` reads the affine maps off the package's own transition.
"""

import math

import pytest
import torch

from pi_rl.flow.chain import sample_chain
from pi_rl.flow.sampler import FlowSampler
from pi_rl.flow.transition import time_grid, transition

MEAN, STD, LEVEL = 0.7, 0.35, 0.5
STEPS = (4, 10, 100, 1000)
# std of the actions at a = .5, as quoted in the documentation
STDS = {
    "ode": (0.219, 0.293, 0.344, 0.349),
    "flow_sde": (0.281, 0.319, 0.348, 0.351),
    "flow_cps": (0.211, 0.272, 0.316, 0.322),
}
HYBRID_STDS = {"flow_sde": (0.243, 0.297, 0.344), "flow_cps": (0.216, 0.290, 0.342)}
PRINTED = ((0.84, 0.54), (0.94, 0.79), (1.25, 1.42), (1.67, 2.10))


def coefficients(t: float) -> tuple[float, float]:
    """The velocity ``E[noise - action | x_t]`` is affine in ``x_t``: offset and slope."""
    slope = (t - (1 - t) * STD**2) / (t**2 + (1 - t) ** 2 * STD**2)
    return -MEAN - slope * (1 - t) * MEAN, slope


def velocity(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    offset, slope = coefficients(t[0].item())
    return offset + slope * x, x


def affine_step(noise: str, steps: int, k: int, level: float) -> tuple[float, float, float]:
    """Gain, offset and std of one step, ``x <- gain * x + offset + std * eps``."""
    t, s, delta = 1 - k / steps, 1 - (k + 1) / steps, 1 / steps
    # the mean is x_part * x + u_part * u
    x_part, u_part, std = 1.0, -delta, 0.0
    if noise == "flow_sde":
        sigma = level * math.sqrt(t / ((1 - s) if k == 0 else (1 - t)))
        pull = delta * sigma**2 / (2 * t)
        x_part, u_part, std = 1 - pull, -delta - pull * (1 - t), sigma * math.sqrt(delta)
    elif noise == "flow_cps":
        kept, std = s * math.cos(math.pi * level / 2), s * math.sin(math.pi * level / 2)
        x_part, u_part = 1 - s + kept, -(1 - s) * t + kept * (1 - t)
    offset, slope = coefficients(t)
    return x_part + u_part * slope, u_part * offset, std


def moments(noise: str, steps: int, level: float = LEVEL, only: int | None = None) -> tuple[float, float]:
    """Mean and std of the actions; with ``only``, all steps but that one follow the ODE."""
    mean, variance = 0.0, 1.0
    for k in range(steps):
        gain, offset, std = affine_step(noise if only in (None, k) else "ode", steps, k, level)
        mean, variance = gain * mean + offset, gain**2 * variance + std**2
    return mean, math.sqrt(variance)


def hybrid_moments(noise: str, steps: int) -> tuple[float, float]:
    """Of the mixture over the stochastic step, drawn uniformly."""
    drawn = range(steps - 1 if noise == "flow_cps" else steps)
    parts = [moments(noise, steps, only=k) for k in drawn]
    mean = sum(mean for mean, _ in parts) / len(parts)
    return mean, math.sqrt(sum(std**2 + m**2 for m, std in parts) / len(parts) - mean**2)


def package_moments(noise: str, steps: int) -> tuple[float, float]:
    level = None if noise == "ode" else LEVEL
    mean, variance, grid = 0.0, 1.0, time_grid(steps)
    points = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    for k in range(steps):
        t, t_next = grid[k].expand(2), grid[k + 1].expand(2)
        got = transition(noise, points, velocity(points, t)[0], t, t_next, noise_level=level)
        low, high = got.mean.flatten().double().tolist()
        mean = low + (high - low) * mean
        variance = (high - low) ** 2 * variance + got.std[0].item() ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("noise", STDS)
def test_transitions_have_the_moments_of_the_equations(noise: str) -> None:
    for steps, std in zip(STEPS, STDS[noise], strict=True):
        expected = moments(noise, steps)
        assert package_moments(noise, steps) == pytest.approx(expected, abs=2e-5)
        assert expected == pytest.approx((MEAN, std), abs=6e-4)


@pytest.mark.parametrize("mdp", ["one_layer", "hybrid"])
@pytest.mark.parametrize("noise", ["flow_sde", "flow_cps"])
@pytest.mark.parametrize(("steps", "samples"), [(4, 100_000), (10, 60_000), (100, 20_000)])
def test_samples_have_these_moments(noise: str, mdp: str, steps: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(samples, 1, 1, generator=generator)
    eps = torch.randn(samples, steps, 1, 1, generator=generator)
    sampler = FlowSampler(noise, mdp, steps, LEVEL)
    index = sampler.draw_step_index(torch.rand(samples, generator=generator))
    chain, _ = sample_chain(velocity, x, eps, sampler, torch.ones(1, 1, dtype=torch.bool), step_index=index)
    actions = chain.x[:, -1].double()
    mean, std = moments(noise, steps) if mdp == "one_layer" else hybrid_moments(noise, steps)
    # five standard errors of a mean and of a standard deviation; mixtures have heavier tails
    assert actions.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(samples))
    assert actions.std().item() == pytest.approx(std, abs=6 * std / math.sqrt(2 * samples))


def test_the_ode_and_the_sde_converge_to_the_data() -> None:
    errors = [abs(moments("ode", steps)[1] - STD) for steps in (10, 100, 1000)]
    assert errors[0] > 9 * errors[1] > 80 * errors[2]
    for level in (0.2, 0.5, 1.0):
        errors = [abs(moments("flow_sde", steps, level)[1] - STD) for steps in (10, 100, 100_000)]
        assert errors[0] > 6 * errors[1] > 12 * errors[2]
        # at the t = 1 boundary the first step's std is a for every K, which fades like K^(-a^2)
        assert errors[2] < 4e-4
    for noise, steps in ((noise, steps) for noise in STDS for steps in STEPS):
        assert moments(noise, steps)[0] == pytest.approx(MEAN, abs=1e-12)


def test_hybrid_chains_converge_for_every_noise_that_vanishes() -> None:
    """One stochastic step among K: what it does to the moments goes to zero, with flow_cps too."""
    for noise, stds in HYBRID_STDS.items():
        for steps, std in zip(STEPS[:3], stds, strict=True):
            assert hybrid_moments(noise, steps) == pytest.approx((MEAN, std), abs=6e-4)


def test_flow_cps_keeps_the_mean_and_loses_spread_at_every_number_of_steps() -> None:
    """It draws anew a fixed share of the noise in every step and so forgets which action the noise belonged to."""
    stds = [moments("flow_cps", steps)[1] for steps in (1000, 10_000, 100_000)]
    assert stds == pytest.approx([0.3219, 0.3231, 0.3233], abs=1e-4)
    assert moments("flow_cps", 10_000, 1.0)[1] == pytest.approx(0.247, abs=1e-3)


def test_the_paper_equations_as_printed_do_not_converge() -> None:
    """Eq. 8-9 with their tau from 0 to 1: A <- A + delta [v + s^2 (A + (1 - tau) v) / (2 tau)] + s sqrt(delta) eps."""
    found = []
    for steps in STEPS:
        mean, variance, delta = 0.0, 1.0, 1 / steps
        for k in range(steps):
            tau = k / steps
            offset, slope = (-c for c in coefficients(1 - tau))
            # s^2 / (2 tau) with s = a sqrt(tau / (1 - tau))
            pull = LEVEL**2 / (2 * (1 - tau))
            gain = 1 + delta * (slope + pull * (1 + (1 - tau) * slope))
            mean = gain * mean + delta * offset * (1 + pull * (1 - tau))
            variance = gain**2 * variance + delta * LEVEL**2 * tau / (1 - tau)
        found.append((mean, math.sqrt(variance)))
    for got, expected in zip(found, PRINTED, strict=True):
        assert got == pytest.approx(expected, abs=0.01)
    distances = [abs(mean - MEAN) + abs(std - STD) for mean, std in found]
    assert sorted(distances) == distances

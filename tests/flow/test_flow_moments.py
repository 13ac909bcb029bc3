"""Gaussian actions N(.7, .35^2) have an analytic velocity: the sampler must reproduce their moments."""

import math

import pytest
import torch

from pi_rl.flow.chain import sample_chain
from pi_rl.flow.sampler import FlowSampler
from pi_rl.flow.transition import time_grid, transition

MEAN, STD, LEVEL = 0.7, 0.35, 0.5
SDE_STD = {4: 0.281, 10: 0.319, 100: 0.348, 1000: 0.351}


def coefficients(t: float) -> tuple[float, float]:
    """The velocity ``E[noise - action | x_t]`` is affine in ``x_t``: offset and slope."""
    slope = (t - (1 - t) * STD**2) / (t**2 + (1 - t) ** 2 * STD**2)
    return -MEAN - slope * (1 - t) * MEAN, slope


def velocity(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    offset, slope = coefficients(t[0].item())
    return offset + slope * x, x


def exact_moments(noise: str, steps: int) -> tuple[float, float]:
    """Propagates mean and variance through the transition, which is affine in x here."""
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


@pytest.mark.parametrize("steps", SDE_STD)
def test_flow_sde_keeps_the_marginals(steps: int) -> None:
    mean, std = exact_moments("flow_sde", steps)
    assert mean == pytest.approx(MEAN, abs=1e-4)
    assert std == pytest.approx(SDE_STD[steps], abs=6e-4)


@pytest.mark.parametrize(("steps", "samples"), [(4, 200_000), (10, 100_000), (100, 40_000), (1000, 4_000)])
def test_flow_sde_samples_have_these_moments(steps: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(samples, 1, 1, generator=generator)
    eps = torch.randn(samples, steps, 1, 1, generator=generator)
    sampler = FlowSampler("flow_sde", "one_layer", steps, LEVEL)
    chain, _ = sample_chain(velocity, x, eps, sampler, torch.ones(1, 1, dtype=torch.bool))
    actions = chain.x[:, -1].double()
    std = SDE_STD[steps]
    # five standard errors of a mean and of a standard deviation
    assert actions.mean().item() == pytest.approx(MEAN, abs=5 * std / math.sqrt(samples))
    assert actions.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * samples) + 5e-4)


def test_the_ode_converges_and_flow_cps_keeps_the_mean() -> None:
    errors = [abs(exact_moments("ode", steps)[1] - STD) for steps in (10, 100, 1000)]
    assert errors[0] > 9 * errors[1] > 80 * errors[2]
    for noise in ("ode", "flow_cps"):
        for steps in SDE_STD:
            assert exact_moments(noise, steps)[0] == pytest.approx(MEAN, abs=1e-5)


def test_the_paper_equations_as_printed_do_not_converge() -> None:
    """Eq. 8-9 with their tau from 0 to 1: A <- A + delta [v + s^2 (A + (1 - tau) v) / (2 tau)] + s sqrt(delta) eps."""
    moments = []
    for steps in (10, 100, 1000):
        mean, variance, delta = 0.0, 1.0, 1 / steps
        for k in range(steps):
            tau = k / steps
            offset, slope = (-c for c in coefficients(1 - tau))
            # s^2 / (2 tau) with s = a sqrt(tau / (1 - tau))
            pull = LEVEL**2 / (2 * (1 - tau))
            gain = 1 + delta * (slope + pull * (1 + (1 - tau) * slope))
            mean = gain * mean + delta * offset * (1 + pull * (1 - tau))
            variance = gain**2 * variance + delta * LEVEL**2 * tau / (1 - tau)
        moments.append((mean, math.sqrt(variance)))
    assert moments[-1] == pytest.approx((1.67, 2.10), abs=0.01)
    distances = [abs(mean - MEAN) + abs(std - STD) for mean, std in moments]
    assert distances[0] < distances[1] < distances[2]

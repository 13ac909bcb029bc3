import math

import numpy as np
import pytest
import torch

from pi_rl.flow.transition import NOISES, Transition, time_grid, transition

SHAPE = (6, 5, 3)


def draws(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE), rng.normal(size=SHAPE), rng.uniform(0.05, 0.2, size=SHAPE)


def step(noise: str, x, u, steps: int, k: int, level: float, std: np.ndarray) -> Transition:
    grid = time_grid(steps)
    size = len(x)
    return transition(
        noise,
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(u, dtype=torch.float32),
        grid[k].expand(size),
        grid[k + 1].expand(size),
        noise_level=level if noise in ("flow_sde", "flow_cps") else None,
        learned_std=torch.tensor(std, dtype=torch.float32) if noise == "flow_noise" else None,
    )


def prediction_form(noise: str, x, u, steps: int, k: int, level: float, std: np.ndarray):
    """The table's rows: weights of the predicted action and the predicted noise, in float64."""
    t, t_next, delta = 1 - k / steps, 1 - (k + 1) / steps, 1 / steps
    action, noise_hat = x - t * u, x + (1 - t) * u
    w1, scale = t_next, np.zeros_like(x)
    if noise == "flow_sde":
        sigma = level * math.sqrt(t / ((1 - t_next) if k == 0 else (1 - t)))
        w1, scale = t_next - sigma**2 * delta / (2 * t), np.full_like(x, sigma * math.sqrt(delta))
    elif noise == "flow_noise":
        scale = std
    elif noise == "flow_cps":
        w1 = t_next * math.cos(math.pi * level / 2)
        scale = np.full_like(x, t_next * math.sin(math.pi * level / 2))
    return (1 - t_next) * action + w1 * noise_hat, scale


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("level", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("noise", NOISES)
def test_every_row_of_the_table(noise: str, level: float, steps: int) -> None:
    for k in range(steps):
        x, u, std = draws(k)
        got = step(noise, x, u, steps, k, level, std)
        mean, scale = prediction_form(noise, x, u, steps, k, level, std)
        assert got.mean.dtype == got.std.dtype == torch.float32
        assert got.mean.shape == SHAPE
        np.testing.assert_allclose(got.mean.numpy(), mean, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(got.std.expand(SHAPE).numpy(), scale, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_flow_sde_is_the_discretised_stochastic_differential_equation(steps: int) -> None:
    level = 0.5
    for k in range(steps):
        x, u, std = draws(k)
        t, t_next, delta = 1 - k / steps, 1 - (k + 1) / steps, 1 / steps
        sigma = level * math.sqrt(t / ((1 - t_next) if k == 0 else (1 - t)))
        mean = x - delta * (u + sigma**2 / (2 * t) * (x + (1 - t) * u))
        got = step("flow_sde", x, u, steps, k, level, std)
        np.testing.assert_allclose(got.mean.numpy(), mean, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(got.std.numpy(), sigma * math.sqrt(delta), rtol=2e-6)


def test_flow_sde_stds_of_four_steps_at_level_one_half() -> None:
    x, u, std = draws(0)
    stds = [step("flow_sde", x, u, 4, k, 0.5, std).std[0].item() for k in range(4)]
    np.testing.assert_allclose(stds, [0.5, 0.25 * math.sqrt(3), 0.25, 0.25 / math.sqrt(3)], rtol=1e-6)
    np.testing.assert_allclose(stds, [0.5, 0.433, 0.25, 0.144], atol=5e-4)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_to_zero_is_the_ode(noise: str) -> None:
    for k in range(4):
        x, u, std = draws(k)
        ode = step("ode", x, u, 4, k, 0.0, std)
        quiet = step(noise, x, u, 4, k, 0.0, 0 * std)
        torch.testing.assert_close(quiet.mean, ode.mean, rtol=0, atol=0)
        assert not quiet.std.any()
        np.testing.assert_allclose(ode.mean.numpy(), x - u / 4, rtol=1e-6, atol=1e-6)
        nearly = step(noise, x, u, 4, k, 1e-4, 1e-4 * std)
        torch.testing.assert_close(nearly.mean, ode.mean, rtol=0, atol=1e-6)
        assert nearly.std.max() < 2e-4


def test_flow_cps_last_step_is_deterministic_and_keeps_the_coefficients() -> None:
    x, u, std = draws(1)
    last = step("flow_cps", x, u, 4, 3, 0.5, std)
    assert last.std.max() == 0
    np.testing.assert_allclose(last.mean.numpy(), x - u / 4, rtol=1e-6, atol=1e-6)
    # noise of unit variance keeps the variance t_next^2 when part of it is drawn anew
    for k in range(3):
        t_next = 1 - (k + 1) / 4
        weight = (step("flow_cps", np.ones(SHAPE), np.zeros(SHAPE), 4, k, 0.5, std).mean - (1 - t_next)).max().item()
        drawn = step("flow_cps", x, u, 4, k, 0.5, std).std.max().item()
        assert weight**2 + drawn**2 == pytest.approx(t_next**2, rel=1e-5)


def test_times_are_per_sample() -> None:
    x, u, std = draws(2)
    grid, index = time_grid(4), torch.tensor([0, 1, 2, 3, 0, 2])
    mixed = transition(
        "flow_sde",
        torch.tensor(x).float(),
        torch.tensor(u).float(),
        grid[index],
        grid[index + 1],
        noise_level=0.5,
    )
    for row, k in enumerate(index.tolist()):
        single = step("flow_sde", x, u, 4, k, 0.5, std)
        assert torch.equal(mixed.mean[row], single.mean[row])
        assert torch.equal(mixed.std[row], single.std[row])


def test_bfloat16_velocity_is_computed_in_float32() -> None:
    x, u, _ = draws(3)
    coarse = torch.tensor(u).bfloat16()
    ones = torch.ones(len(x))
    low = transition("ode", torch.tensor(x).float(), coarse, ones, 0.75 * ones)
    assert low.mean.dtype == torch.float32
    assert torch.equal(low.mean, torch.tensor(x).float() - 0.25 * coarse.float())


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 10, 1000])
def test_time_grid(steps: int) -> None:
    grid = time_grid(steps)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    assert torch.all(grid.diff() < 0)
    np.testing.assert_allclose(grid.numpy(), 1 - np.arange(steps + 1) / steps, atol=1e-7)


def test_errors_name_the_problem() -> None:
    x, t = torch.zeros(2, 3, 4), torch.ones(2)
    with pytest.raises(ValueError, match="denoising_steps=0"):
        time_grid(0)
    with pytest.raises(ValueError, match="unknown noise 'sde'"):
        transition("sde", x, x, t, t / 2)
    with pytest.raises(ValueError, match="needs a `noise_level`"):
        transition("flow_sde", x, x, t, t / 2)
    with pytest.raises(ValueError, match=r"outside \[0, 1.0\]"):
        transition("flow_cps", x, x, t, t / 2, noise_level=1.5)
    with pytest.raises(ValueError, match="has no effect"):
        transition("ode", x, x, t, t / 2, noise_level=0.5)
    with pytest.raises(ValueError, match="`learned_std` is missing"):
        transition("flow_noise", x, x, t, t / 2)
    with pytest.raises(ValueError, match="`learned_std` is given"):
        transition("flow_sde", x, x, t, t / 2, noise_level=0.5, learned_std=x)
    with pytest.raises(ValueError, match="`learned_std` has shape"):
        transition("flow_noise", x, x, t, t / 2, learned_std=x[:, :1])
    with pytest.raises(ValueError, match="one time per sample"):
        transition("ode", x, x, t[:1], t / 2)
    with pytest.raises(ValueError, match="velocity"):
        transition("ode", x, x[:, :2], t, t / 2)

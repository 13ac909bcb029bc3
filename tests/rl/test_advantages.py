import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_rl.rl.advantages import gae, normalize_advantages


def column(*numbers: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)[:, None]


def flags(*numbers: int) -> torch.Tensor:
    return column(*numbers, dtype=torch.bool)


def reference(rewards, values, next_values, terminated, done, valid, gamma, lam):
    """Eq. of GAE as a double sum over the steps that follow within the same stretch, in float64."""
    steps, envs = rewards.shape
    advantages = np.zeros((steps, envs))
    for env in range(envs):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                if not valid[t, env]:
                    break
                bootstrap = 0.0 if terminated[t, env] else next_values[t, env]
                advantages[start, env] += weight * (rewards[t, env] + gamma * bootstrap - values[t, env])
                if done[t, env]:
                    break
                weight *= gamma * lam
    return advantages, np.where(valid, advantages + values, 0.0)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_constant_reward_for_ever_is_worth_one_over_one_minus_gamma(gae_lambda: float) -> None:
    gamma, steps = 0.9, 40
    worth = 1 / (1 - gamma)
    ones, never = torch.ones(steps, 2, dtype=torch.float64), torch.zeros(steps, 2, dtype=torch.bool)
    exact = torch.full((steps, 2), worth, dtype=torch.float64)
    advantages, returns = gae(ones, exact, exact, never, never, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(returns, exact)
    torch.testing.assert_close(advantages, torch.zeros_like(exact))
    # from an ignorant critic, only the long sum with lambda = 1 finds that value
    zeros = torch.zeros(1000, 2, dtype=torch.float64)
    long = torch.zeros(1000, 2, dtype=torch.bool)
    _, found = gae(zeros + 1, zeros, zeros, long, long, gamma=gamma, gae_lambda=gae_lambda)
    closed_form = 1 / (1 - gamma * gae_lambda)
    torch.testing.assert_close(found[0], torch.full((2,), closed_form, dtype=torch.float64))


def test_termination_cuts_and_truncation_bootstraps() -> None:
    rewards, values, next_values = column(0, 1), column(0.5, 0.25), column(0.25, 8.0)
    ends, never = flags(0, 1), flags(0, 0)
    gamma, lam = 0.9, 0.8
    terminated, _ = gae(rewards, values, next_values, ends, ends, gamma=gamma, gae_lambda=lam)
    truncated, _ = gae(rewards, values, next_values, never, ends, gamma=gamma, gae_lambda=lam)
    first = 0.9 * 0.25 - 0.5
    torch.testing.assert_close(terminated, column(first + 0.72 * 0.75, 0.75))
    torch.testing.assert_close(truncated, column(first + 0.72 * (0.75 + 7.2), 0.75 + 7.2))


def test_nothing_crosses_an_episode_end() -> None:
    rewards, values, next_values = column(0, 0, 1), column(1, 2, 3), column(2, 5, 0)
    done, terminated = flags(0, 1, 1), flags(0, 0, 1)
    options = {"gamma": 0.99, "gae_lambda": 0.95}
    base, _ = gae(rewards, values, next_values, terminated, done, **options)
    changed, _ = gae(column(0, 0, 100), values, next_values, terminated, done, **options)
    assert torch.equal(base[:2], changed[:2])
    assert not torch.equal(base[2], changed[2])


def test_masked_steps_are_zero_and_do_not_leak() -> None:
    valid, nan = flags(1, 1, 0, 0), math.nan
    rewards, values, next_values = column(0, 1, nan, nan), column(0.5, 0.5, nan, 3), column(0.5, nan, nan, 4)
    ends = flags(0, 1, 0, 0)
    advantages, returns = gae(rewards, values, next_values, ends, ends, gamma=1.0, gae_lambda=1.0, valid=valid)
    torch.testing.assert_close(advantages, column(0.5, 0.5, 0, 0))
    torch.testing.assert_close(returns, column(1, 1, 0, 0))


def test_a_masked_step_ends_the_recursion_even_without_done() -> None:
    never = flags(0, 0)
    advantages, _ = gae(
        column(1, 50), column(0, 0), column(2, 9), never, never, gamma=0.5, gae_lambda=1.0, valid=flags(1, 0)
    )
    torch.testing.assert_close(advantages, column(2, 0))


@st.composite
def trajectories(draw):
    steps, envs = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rewards, values, next_values = rng.normal(size=(3, steps, envs))
    done = rng.random((steps, envs)) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    terminated = done & (rng.random((steps, envs)) < 0.5)
    kind = draw(st.sampled_from(["all", "prefix", "random"]))
    valid = np.ones((steps, envs), dtype=bool)
    if kind == "prefix":
        valid = np.arange(steps)[:, None] < rng.integers(0, steps + 1, size=envs)
    elif kind == "random":
        valid = rng.random((steps, envs)) < 0.7
    coefficient = st.floats(0, 1)
    return rewards, values, next_values, terminated, done, valid, draw(coefficient), draw(coefficient)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(trajectories())
def test_against_the_double_sum(trajectory) -> None:
    *arrays, valid, gamma, lam = trajectory
    expected = reference(*arrays, valid, gamma, lam)
    tensors = [torch.from_numpy(array) for array in arrays]
    got = gae(*tensors, gamma=gamma, gae_lambda=lam, valid=torch.from_numpy(valid))
    for tensor, array in zip(got, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-10, atol=1e-10)
    # what stands in masked rows is of no consequence
    poisoned = [t.clone().masked_fill(torch.from_numpy(~valid), torch.nan) for t in tensors[:3]] + tensors[3:]
    again = gae(*poisoned, gamma=gamma, gae_lambda=lam, valid=torch.from_numpy(valid))
    assert torch.equal(again[0], got[0])
    assert torch.equal(again[1], got[1])
    if valid.all():
        plain = gae(*tensors, gamma=gamma, gae_lambda=lam)
        assert torch.equal(plain[0], got[0])


def test_result_is_float32_for_half_precision_values() -> None:
    values, never = torch.ones(2, 1, dtype=torch.bfloat16), flags(0, 0)
    advantages, returns = gae(values, values, values, never, never, gamma=0.99, gae_lambda=0.95)
    assert advantages.dtype == returns.dtype == torch.float32


def test_gae_rejects() -> None:
    x, never, ever = torch.zeros(2, 1), flags(0, 0), flags(1, 1)
    options = {"gamma": 0.99, "gae_lambda": 0.95}
    with pytest.raises(ValueError, match="not done"):
        gae(x, x, x, ever, never, **options)
    with pytest.raises(ValueError, match=r"`rewards` has shape \(1, 1\)"):
        gae(x[:1], x, x, never, never, **options)
    with pytest.raises(ValueError, match="must be bool"):
        gae(x, x, x, never, x, **options)
    with pytest.raises(ValueError, match="`gamma=1.5`"):
        gae(x, x, x, never, never, gamma=1.5, gae_lambda=0.95)
    with pytest.raises(ValueError, match="at least one chunk"):
        gae(x[:0], x[:0], x[:0], never[:0], never[:0], **options)


def test_normalised_advantages_have_zero_mean_and_unit_std() -> None:
    advantages = 50 + 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    got = normalize_advantages(advantages, reduce=None)
    assert got.dtype == torch.float32
    assert got.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert got.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("split", [0, 1, 17, 99, 100])
def test_two_processes_normalise_like_one(split: int) -> None:
    advantages = 5 + torch.randn(100, generator=torch.Generator().manual_seed(1))
    parts = [advantages[:split], advantages[split:]]
    sent: list[torch.Tensor] = []

    def record(statistics: torch.Tensor) -> torch.Tensor:
        assert statistics.dtype == torch.float64
        assert statistics.shape == (3,)
        sent.append(statistics)
        return statistics

    for part in parts:
        normalize_advantages(part, reduce=record)
    together = [normalize_advantages(part, reduce=lambda _: sent[0] + sent[1]) for part in parts]
    torch.testing.assert_close(
        torch.cat(together), normalize_advantages(advantages, reduce=None), rtol=1e-6, atol=1e-6
    )


def test_equal_advantages_become_zero() -> None:
    for number in (0.0, 0.1, -7.3):
        got = normalize_advantages(torch.full((13,), number), reduce=None)
        assert got.abs().max() < 1e-5
    assert len(normalize_advantages(torch.zeros(0), reduce=None)) == 0
    with pytest.raises(ValueError, match=r"\(N,\)"):
        normalize_advantages(torch.zeros(2, 3), reduce=None)

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_rl.rl.advantages import gae, group_advantages, informative_groups, normalize_advantages, two_layer_gae


def column(*numbers: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)[:, None]


def flags(*numbers: int) -> torch.Tensor:
    return column(*numbers, dtype=torch.bool)


def reference(rewards, values, next_values, terminated, done, valid, gamma, lam):
    """Eq. of GAE as a double sum over the steps that follow within the same stretch, in float64."""
    steps, envs = rewards.shape
    gamma, lam = np.broadcast_to(gamma, rewards.shape), np.broadcast_to(lam, rewards.shape)
    advantages = np.zeros((steps, envs))
    for env in range(envs):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                if not valid[t, env]:
                    break
                bootstrap = 0.0 if terminated[t, env] else next_values[t, env]
                advantages[start, env] += weight * (rewards[t, env] + gamma[t, env] * bootstrap - values[t, env])
                if done[t, env]:
                    break
                weight *= gamma[t, env] * lam[t, env]
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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trajectories(), st.sampled_from(["scalar", "chunk", "environment", "both"]))
def test_coefficients_may_differ_by_step(trajectory, kind: str) -> None:
    rewards, values, next_values, terminated, done, valid, _, _ = trajectory
    steps, envs = rewards.shape
    shape = {"scalar": (), "chunk": (steps, 1), "environment": (envs,), "both": (steps, envs)}[kind]
    gamma, lam = np.random.default_rng(steps).random((2, *shape))
    got = gae(
        *(torch.from_numpy(array) for array in (rewards, values, next_values, terminated, done)),
        gamma=torch.tensor(gamma),
        gae_lambda=torch.tensor(lam),
        valid=torch.from_numpy(valid),
    )
    expected = reference(rewards, values, next_values, terminated, done, valid, gamma, lam)
    for tensor, array in zip(got, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-10, atol=1e-10)


def two_layer_reference(rewards, values, next_values, terminated, done, valid, gamma, lam, inner_gamma, inner_lam):
    """Walks through every later transition of every transition, in float64; arrays as of `two_layer_gae`."""
    chunks, transitions, envs = values.shape
    advantages = np.zeros(values.shape)
    for env in range(envs):
        for start in range(chunks * transitions):
            weight = 1.0
            for position in range(start, chunks * transitions):
                t, s = divmod(position, transitions)
                if not valid[t, env]:
                    break
                if s < transitions - 1:
                    delta = inner_gamma * values[t, s + 1, env] - values[t, s, env]
                    weight, used = weight * inner_gamma * inner_lam, weight
                else:
                    bootstrap = 0.0 if terminated[t, env] else gamma * next_values[t, env]
                    delta = rewards[t, env] + bootstrap - values[t, s, env]
                    weight, used = (0.0 if done[t, env] else weight * gamma * lam), weight
                advantages[start // transitions, start % transitions, env] += used * delta
    return advantages, np.where(valid[:, None], advantages + values, 0.0)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(trajectories(), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_two_layers_against_the_walk(trajectory, transitions: int, inner_gamma: float, inner_lam: float) -> None:
    rewards, first, next_values, terminated, done, valid, gamma, lam = trajectory
    steps, envs = rewards.shape
    values = np.random.default_rng(transitions).normal(size=(steps, transitions, envs))
    values[:, 0] = first
    arrays = (rewards, values, next_values, terminated, done, valid)
    expected = two_layer_reference(*arrays, gamma, lam, inner_gamma, inner_lam)
    options = {"gamma": gamma, "gae_lambda": lam, "denoising_gamma": inner_gamma, "denoising_lambda": inner_lam}
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    got = two_layer_gae(*tensors[:5], valid=tensors[5], **options)
    for tensor, array in zip(got, expected, strict=True):
        assert tensor.shape == (steps, transitions, envs)
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-10, atol=1e-10)
    for tensor in tensors[:3]:  # what stands in masked chunks is of no consequence
        hidden = ~tensors[5] if tensor.ndim == 2 else ~tensors[5][:, None].expand(tensor.shape)
        tensor.masked_fill_(hidden, torch.nan)
    again = two_layer_gae(*tensors[:5], valid=tensors[5], **options)
    assert torch.equal(again[0], got[0])
    assert torch.equal(again[1], got[1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trajectories(), st.integers(1, 5))
def test_two_layers_of_equal_values_give_the_chunks_advantage(trajectory, transitions: int) -> None:
    *arrays, valid, gamma, lam = trajectory
    rewards, values, next_values, terminated, done = (torch.from_numpy(array) for array in arrays)
    options = {"gamma": gamma, "gae_lambda": lam, "valid": torch.from_numpy(valid)}
    per_chunk = gae(rewards, values, next_values, terminated, done, **options)
    copies = values[:, None].expand(-1, transitions, -1)
    per_step = two_layer_gae(rewards, copies, next_values, terminated, done, **options)
    for chunk, step in zip(per_chunk, per_step, strict=True):
        # the same operations in the same order: not a bit differs
        assert torch.equal(step, chunk[:, None].expand(-1, transitions, -1))


def test_two_layers_by_hand() -> None:
    """Two chunks of two transitions; the second chunk ends the episode with reward 1."""
    values = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)[..., None]
    rewards, next_values, ends = column(0, 1), column(0.3, 9), flags(0, 1)
    advantages, returns = two_layer_gae(
        rewards,
        values,
        next_values,
        ends,
        ends,
        gamma=0.9,
        gae_lambda=0.8,
        denoising_gamma=0.5,
        denoising_lambda=0.6,
    )
    last = 1 - 0.4
    third = 0.5 * 0.4 - 0.3 + 0.5 * 0.6 * last
    second = 0.9 * 0.3 - 0.2 + 0.9 * 0.8 * third
    first = 0.5 * 0.2 - 0.1 + 0.5 * 0.6 * second
    expected = torch.tensor([[first, second], [third, last]], dtype=torch.float64)[..., None]
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


@pytest.mark.parametrize("transitions", [1, 3])
def test_constant_reward_for_ever_in_two_layers(transitions: int) -> None:
    gamma, steps = 0.9, 600
    ones, never = torch.ones(steps, 2, dtype=torch.float64), torch.zeros(steps, 2, dtype=torch.bool)
    exact = torch.full((steps, transitions, 2), 1 / (1 - gamma), dtype=torch.float64)
    advantages, _ = two_layer_gae(ones, exact, exact[:, 0], never, never, gamma=gamma, gae_lambda=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(exact))
    zeros = torch.zeros_like(exact)
    _, returns = two_layer_gae(ones, zeros, zeros[:, 0], never, never, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(returns[0], exact[0])
    # a denoising discount is paid once for every transition before the last
    _, discounted = two_layer_gae(
        ones[:1], zeros[:1], zeros[:1, 0], never[:1], never[:1], gamma=gamma, gae_lambda=1.0, denoising_gamma=0.5
    )
    expected = 0.5 ** torch.arange(transitions - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(discounted[0, :, 0], expected)


def test_two_layer_gae_rejects() -> None:
    x, values, never = torch.zeros(2, 1), torch.zeros(2, 3, 1), flags(0, 0)
    options = {"gamma": 0.99, "gae_lambda": 0.95}
    with pytest.raises(ValueError, match=r"must be \(T, S, B\)"):
        two_layer_gae(x, x, x, never, never, **options)
    with pytest.raises(ValueError, match=r"`rewards` has shape \(2, 3, 1\)"):
        two_layer_gae(values, values, x, never, never, **options)
    with pytest.raises(ValueError, match="not done"):
        two_layer_gae(x, values, x, ~never, never, **options)
    with pytest.raises(ValueError, match="`denoising_gamma=2.0` is outside"):
        two_layer_gae(x, values, x, never, never, **options, denoising_gamma=2.0)
    with pytest.raises(ValueError, match="`denoising_lambda=-1.0` is outside"):
        two_layer_gae(x, values, x, never, never, **options, denoising_lambda=-1.0)


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
    with pytest.raises(ValueError, match="is outside"):
        gae(x, x, x, never, never, gamma=0.9, gae_lambda=torch.tensor([[0.5], [math.nan]]))
    with pytest.raises(ValueError, match=r"must broadcast to \(2, 1\)"):
        gae(x, x, x, never, never, gamma=torch.ones(3, 1), gae_lambda=0.95)
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


def test_group_advantages_by_hand() -> None:
    """Groups in any order: {1, 0, 0} has mean 1/3 and unbiased std sqrt(1/3), {2, 4} mean 3 and std sqrt(2)."""
    returns, groups = torch.tensor([1.0, 2.0, 0.0, 5.0, 0.0, 5.0, 4.0, 7.0]), torch.tensor([9, -3, 9, 4, 9, 4, -3, 0])
    third, half = math.sqrt(1 / 3) + 1e-6, math.sqrt(2) + 1e-6
    expected = [2 / 3 / third, -1 / half, -1 / 3 / third, 0, -1 / 3 / third, 0, 1 / half, 0]
    got = group_advantages(returns, groups)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected))
    assert informative_groups(returns, groups).tolist() == [True, True, True, False, True, False, True, False]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_group_advantages_against_numpy(episodes: int, names: int, seed: int, sparse: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(-5, -5 + names, size=episodes)
    returns = rng.integers(0, 2, size=episodes).astype(float) if sparse else 1e4 + rng.normal(size=episodes)
    expected, informative = np.zeros(episodes), np.zeros(episodes, bool)
    for name in set(groups):
        rows = groups == name
        if len(set(returns[rows])) > 1:
            informative[rows] = True
            expected[rows] = (returns[rows] - returns[rows].mean()) / (returns[rows].std(ddof=1) + 1e-6)
    tensors = torch.from_numpy(returns), torch.from_numpy(groups)
    np.testing.assert_allclose(group_advantages(*tensors).numpy(), expected, rtol=1e-7, atol=1e-7)
    assert informative_groups(*tensors).tolist() == informative.tolist()


def test_groups_of_equal_returns_say_nothing_at_all() -> None:
    # 0.1 has no exact binary form: the mean of equal returns may differ from them by rounding
    returns, groups = torch.full((12,), 0.1), torch.arange(12) % 2
    assert not group_advantages(returns, groups).any()
    assert not informative_groups(returns, groups).any()


def test_group_functions_reject() -> None:
    for function in (group_advantages, informative_groups):
        for groups in (torch.zeros(3), torch.zeros(2, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"must be \(E,\) and int64 \(E,\)"):
                function(torch.zeros(3), groups)

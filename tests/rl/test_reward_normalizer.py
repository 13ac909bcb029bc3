import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_rl.rl.reward_normalizer import RewardNormalizer


def discounted_returns(rewards: np.ndarray, done: np.ndarray, valid: np.ndarray, gamma: float) -> list[float]:
    """Discounted sum of the rewards of an episode up to each of its valid chunks."""
    returns = []
    for env in range(rewards.shape[1]):
        begin = 0
        for t in range(len(rewards)):
            if valid[t, env]:
                steps = range(begin, t + 1)
                returns.append(sum(gamma ** (t - s) * rewards[s, env] for s in steps if valid[s, env]))
            if done[t, env]:
                begin = t + 1
    return returns


def rollout(seed: int, chunks: int = 7, envs: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    valid = np.arange(chunks)[:, None] < rng.integers(0, chunks + 1, size=envs)
    return rng.normal(3, 2, size=(chunks, envs)), rng.random((chunks, envs)) < 0.2, valid


def tensors(arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0, 1))
def test_scale_is_the_std_of_all_discounted_returns(seed: int, rollouts: int, gamma: float) -> None:
    normalizer, returns = RewardNormalizer(gamma), []
    for number in range(rollouts):
        rewards, done, valid = rollout(seed + number)
        returns += discounted_returns(rewards, done, valid, gamma)
        rewards[~valid] = np.nan  # of no consequence
        normalizer.update(*tensors((rewards, done, valid)))
    expected = np.std(returns) if len(set(returns)) > 1 else 1.0
    assert normalizer.scale == pytest.approx(expected, rel=1e-9)


def test_returns_of_normalised_rewards_have_unit_std_in_any_units() -> None:
    rewards, done, valid = rollout(0, 200, 4)
    valid[:] = True
    for unit in (1e-3, 1.0, 1e3):
        normalizer = RewardNormalizer(0.99)
        normalizer.update(*tensors((unit * rewards, done, valid)))
        normalised = unit * rewards / normalizer.scale
        assert np.std(discounted_returns(normalised, done, valid, 0.99)) == pytest.approx(1, rel=1e-9)


def test_the_first_rewards_seen_count_at_once_and_none_leaves_rewards_alone() -> None:
    normalizer = RewardNormalizer(0.99)
    assert normalizer.scale == 1.0
    nothing, mask = torch.zeros(5, 4), torch.ones(5, 4, dtype=torch.bool)
    normalizer.update(nothing, ~mask, mask)
    assert normalizer.scale == 1.0
    normalizer.update(nothing + 0.1, mask, mask)
    normalizer.update(nothing, ~mask, ~mask)
    assert 0.04 < normalizer.scale < 0.06
    equal = RewardNormalizer(0.0)
    equal.update(nothing + 0.1, ~mask, mask)
    assert equal.scale == 1.0


def test_two_processes_count_like_one() -> None:
    rewards, done, valid = tensors(rollout(1, envs=4))
    whole = RewardNormalizer(0.9)
    whole.update(rewards, done, valid)
    sent: list[torch.Tensor] = []

    def record(statistics: torch.Tensor) -> torch.Tensor:
        assert statistics.dtype == torch.float64
        assert statistics.shape == (3,)
        sent.append(statistics)
        return statistics

    parts = [(rewards[:, part], done[:, part], valid[:, part]) for part in (slice(0, 1), slice(1, 4))]
    for part in parts:
        RewardNormalizer(0.9).update(*part, reduce=record)
    for part in parts:
        normalizer = RewardNormalizer(0.9)
        normalizer.update(*part, reduce=lambda _: sent[0] + sent[1])
        assert normalizer.scale == pytest.approx(whole.scale, rel=1e-12)


def test_continues_exactly_from_json() -> None:
    normalizer, resumed = RewardNormalizer(0.9), RewardNormalizer(0.9)
    normalizer.update(*tensors(rollout(2)))
    resumed.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    assert resumed.scale == normalizer.scale
    for each in (normalizer, resumed):
        each.update(*tensors(rollout(3)))
    assert resumed.state_dict() == normalizer.state_dict()


def test_large_mean_keeps_its_digits() -> None:
    normalizer, mask = RewardNormalizer(0.0), torch.ones(500, 2, dtype=torch.bool)
    rng = np.random.default_rng(0)
    parts = [1e5 + rng.normal(size=(500, 2)) for _ in range(20)]
    for part in parts:
        normalizer.update(torch.from_numpy(part), ~mask, mask)
    assert normalizer.scale == pytest.approx(np.std(parts), rel=1e-4)


def test_rejects() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`gamma=1.1` is outside"):
        RewardNormalizer(1.1)
    with pytest.raises(ValueError, match=r"`done` is torch.bool of shape \(1, 3\)"):
        RewardNormalizer(0.9).update(x, mask[:1], mask)
    with pytest.raises(ValueError, match=r"`valid` is torch.float32"):
        RewardNormalizer(0.9).update(x, mask, x)
    with pytest.raises(ValueError, match="must hold"):
        RewardNormalizer(0.9).load_state_dict({"count": 1.0})

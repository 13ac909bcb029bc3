"""The toy tasks against their equations."""

import numpy as np
import pytest

from pi_rl.envs.registry import check_name_and_options, make_env
from pi_rl.envs.toy import CLOSEST, FARTHEST

STATE = "observation.state"


def ids(*states):
    return np.array([[0, state] for state in states])


def test_identity_pays_the_distance_and_ends():
    with make_env("toy:identity", 3, dimensions=4) as env:
        target = env.reset(ids(0, 1, 2))[STATE]
        assert target.shape == (3, 4)
        assert np.abs(target).max() <= 1
        actions = target + np.array([0.0, 0.15, 0.3], np.float32)[:, None]
        result = env.step_chunk(actions[:, None])
        error = np.clip(actions, -1, 1) - target
    np.testing.assert_allclose(result.rewards[:, 0], -(error**2).mean(1), atol=1e-6)
    assert result.success.tolist() == [True, True, False]
    assert result.terminated.all()  # failed or not: nothing comes after it
    assert not result.truncated.any()


def test_identity_can_pay_success_alone():
    with make_env("toy:identity", 2, reward="success") as env:
        target = env.reset(ids(0, 1))[STATE]
        result = env.step_chunk(np.stack([target[0], -target[1]])[:, None])
    assert result.rewards.tolist() == [[1.0], [0.0]]


def test_the_point_mass_follows_its_equations():
    actions = np.random.default_rng(0).uniform(-2, 2, (2, 6, 2)).astype(np.float32)
    with make_env("toy:point-mass", 2, max_episode_steps=6, reward="distance", tolerance=0.01) as env:
        state = env.reset(ids(5, 6))[STATE].astype(np.float64)
        result = env.step_chunk(actions)
    x, v, goal = np.split(state, 3, axis=1)
    assert (v == 0).all()
    first = np.sqrt(((goal - x) ** 2).mean(1))
    assert ((first >= CLOSEST - 1e-6) & (first <= FARTHEST + 1e-6)).all()
    distance = []
    for step in range(6):
        v = v + 0.1 * (4.0 * np.clip(actions[:, step], -1, 1) - 2.0 * v)
        x = x + 0.1 * v
        distance.append(np.sqrt(((goal - x) ** 2).mean(1)))
    np.testing.assert_allclose(result.observation[STATE], np.concatenate([x, v, goal], axis=1), atol=1e-6)
    np.testing.assert_allclose(result.rewards, -0.1 * np.stack(distance, 1), atol=1e-6)
    assert result.truncated.all()
    assert not result.terminated.any()


def test_the_point_mass_can_be_brought_to_its_goal():
    with make_env("toy:point-mass", 50) as env:
        observation = env.reset(ids(*range(50)))
        going, returns = np.ones(50, bool), np.zeros(50)
        while going.any():
            x, v, goal = np.split(observation[STATE], 3, axis=1)
            result = env.step_chunk((3 * (goal - x) - v)[:, None], going)
            observation, going = result.observation, going & ~result.done
            returns += result.rewards.sum(1)
            assert (result.terminated == result.success).all()
    assert returns.mean() > 0.95
    assert set(returns.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("task", ["identity", "point-mass"])
def test_a_state_id_names_one_state(task):
    with make_env(f"toy:{task}", 1) as lone, make_env(f"toy:{task}", 4) as env:
        expected = lone.reset(ids(9))[STATE][0]
        env.reset(ids(1, 2, 3, 4))
        env.step_chunk(np.ones((4, 1, 2), np.float32))
        observation = env.reset(ids(9, 9), [3, 1])
    np.testing.assert_array_equal(observation[STATE][[3, 1]], [expected, expected])
    assert not np.array_equal(observation[STATE][0], expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("toy:identity,point-mass", {}, "names 2 toy tasks"),
        ("toy:identiti", {}, "unknown task 'identiti' of toy; nearest: identity"),
        ("toy:identity", {"dimensions": 0}, "dimensions must be at least 1, got 0"),
        ("toy:point-mass", {"tolerance": 1}, "tolerance must be above 0 and below"),
        ("toy:point-mass", {"reward": "dense"}, "success, distance or left out, got 'dense'"),
        ("toy:point-mass", {"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
    ],
)
def test_bad_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_name_and_options(name, options)

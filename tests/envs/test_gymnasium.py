"""Gymnasium environments behind the vector interface: determinism, endings, limits, refusals."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from pi_rl.envs.registry import check_name_and_options, make_env

STATE = "observation.state"


class Counter(gymnasium.Env):
    """Counts its steps: solved at 3, ends at 5, or is cut at 4 by itself if told so."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, cut=False, key="is_success"):
        self.cut, self.key = cut, key

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.start = 0, self.np_random.random()
        return np.array([self.count, self.start]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count += 1
        observation = np.array([self.count, self.start])
        return (
            observation,
            float(action[0]),
            self.count == 5,
            self.cut and self.count == 4,
            {self.key: self.count == 3},
        )


class Unbounded(Counter):
    action_space = Box(-np.inf, np.inf, (1,), np.float32)


def not_installed():
    raise gymnasium.error.DependencyNotInstalled("Box3D is not installed, run `pip install box3d`.")


@pytest.fixture(scope="module", autouse=True)
def _registered(metaworld):  # that fixture chooses a renderer before MuJoCo is imported
    made = (
        ("Counter-v0", Counter, 10),
        ("Limitless-v0", Counter, None),
        ("Unbounded-v0", Unbounded, 10),
        ("Missing-v0", not_installed, 10),
    )
    for name, entry_point, limit in made:
        gymnasium.register(f"PiRlTest/{name}", entry_point=entry_point, max_episode_steps=limit)
    yield
    for name, *_ in made:
        del gymnasium.registry[f"PiRlTest/{name}"]


def counter(num_envs=1, **options):
    return make_env("gymnasium:PiRlTest/Counter-v0", num_envs, **options)


def ids(*states):
    return np.array([[0, state] for state in states])


@pytest.mark.parametrize("task", ["Pendulum-v1", "InvertedPendulum-v5", "Hopper-v5"])
def test_an_episode_is_a_function_of_its_state_id_alone(task):
    with make_env(f"gymnasium:{task}", 1) as lone, make_env(f"gymnasium:{task}", 3) as env:
        actions = np.random.default_rng(0).uniform(-1, 1, (3, 6, env.spec.action_dim)).astype(np.float32)

        def episode(env, row, rows):
            observation = env.reset(ids(*[7] * rows)[:1], [row])[STATE][row]
            chunk = np.repeat(actions[:1], env.num_envs, 0)
            result = env.step_chunk(chunk, np.arange(env.num_envs) == row)
            return [observation, result.observation[STATE][row], result.rewards[row]]

        expected = episode(lone, 0, 1)
        env.reset(ids(1, 2, 3))
        env.step_chunk(10 * actions)
        for row in (2, 0, 2):
            for one, other in zip(episode(env, row, 3), expected, strict=True):
                np.testing.assert_array_equal(one, other)
        assert not np.array_equal(env.reset(ids(8), [0])[STATE][0], expected[0])


def test_rewards_and_observations_are_the_environments_own():
    plain = gymnasium.make("Pendulum-v1")
    expected, _ = plain.reset(seed=11)
    with make_env("gymnasium:Pendulum-v1", 1) as env:
        np.testing.assert_array_equal(env.reset(ids(11))[STATE][0], expected)
        assert (env.spec.state_dim, env.spec.action_dim, env.spec.max_episode_steps, env.spec.fps) == (3, 1, 200, 30)
        assert (env.spec.action_low, env.spec.action_high, env.spec.cameras) == ((-2.0,), (2.0,), {})
        result = env.step_chunk(np.array([[[0.5], [9.0]]], np.float32))
    first, reward_1, *_ = plain.step(np.array([0.5], np.float32))
    second, reward_2, *_ = plain.step(np.array([2.0], np.float32))  # clipped to the bounds
    np.testing.assert_array_equal(result.observation[STATE][0], second)
    np.testing.assert_allclose(result.rewards[0], [reward_1, reward_2], rtol=1e-6)
    assert not result.success.any()


def test_the_time_limit_truncates_and_terminates_nothing():
    with make_env("gymnasium:Pendulum-v1", 2, max_episode_steps=7) as env:
        env.reset(ids(0, 1))
        actions = np.zeros((2, 5, 1), np.float32)
        assert not env.step_chunk(actions).done.any()
        result = env.step_chunk(actions)
        assert result.truncated.all()
        assert not result.terminated.any()
        assert result.steps.tolist() == [2, 2]
        assert (result.rewards[:, 2:] == 0).all()
        with pytest.raises(ValueError, match="no running episode"):
            env.step_chunk(actions)


def test_a_fall_terminates_without_success():
    with make_env("gymnasium:InvertedPendulum-v5", 1) as env:
        env.reset(ids(0))
        result = env.step_chunk(np.full((1, 60, 1), 3.0, np.float32))
    assert result.terminated.all()
    assert not result.success.any()
    assert not result.truncated.any()
    n = int(result.steps[0])
    assert n < 60
    assert result.rewards[0, : n - 1].tolist() == [1.0] * (n - 1)  # MuJoCo's: 0 for the step that falls
    assert (result.rewards[0, n:] == 0).all()


@pytest.mark.parametrize("key", ["is_success", "success"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_success_is_remembered_until_the_episode_ends(key, chunk):
    """The environment says success at step 3 alone and terminates at 5."""
    with counter(make_kwargs={"key": key}) as env:
        env.reset(ids(0))
        seen, steps = [], 0
        while True:
            result = env.step_chunk(np.full((1, chunk, 1), 0.5, np.float32))
            steps += int(result.steps[0])
            seen.append((steps, bool(result.success[0])))
            if result.done[0]:
                break
        assert steps == 5
        assert result.terminated[0]
        assert seen == [(n, n >= 3) for n, _ in seen]
        env.reset(ids(0))
        assert not env.step_chunk(np.zeros((1, 1, 1), np.float32)).success.any()


def test_a_cut_of_the_environments_own_is_a_truncation():
    with counter(make_kwargs={"cut": True}) as env:
        env.reset(ids(0))
        result = env.step_chunk(np.zeros((1, 8, 1), np.float32))
    assert result.truncated.all()
    assert not result.terminated.any()
    assert result.steps.tolist() == [4]
    with counter(max_episode_steps=5) as env:  # both at once: it ended by itself
        env.reset(ids(0))
        result = env.step_chunk(np.zeros((1, 5, 1), np.float32))
    assert result.terminated.all()
    assert not result.truncated.any()


def test_inactive_environments_stand_still():
    with counter(3) as env:
        env.reset(ids(0, 1, 2))
        result = env.step_chunk(np.ones((3, 2, 1), np.float32), [True, False, True])
        assert result.steps.tolist() == [2, 0, 2]
        assert result.observation[STATE][:, 0].tolist() == [2, 0, 2]
        assert result.rewards.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_tasks_of_one_kind_go_together():
    with make_env("gymnasium:Hopper-v4,Hopper-v5", 2, max_episode_steps=5) as env:
        assert env.reset(np.array([[1, 3], [0, 3]]))["task"] == ["Hopper-v5", "Hopper-v4"]
        env.reset(np.array([[0, 3]]), [0])
        assert env.step_chunk(np.zeros((2, 5, 3), np.float32)).steps.sum() == 10


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "Pendulum-v1,InvertedPendulum-v5",
            {},
            "differ in state_dim, max_episode_steps, fps, action_low, act",
        ),
        ("CartPole-v1", {}, r"action space of CartPole-v1 is Discrete\(2\)"),
        ("PiRlTest/Limitless-v0", {}, "no time limit of its own; set the option max_episode_steps"),
        ("PiRlTest/Unbounded-v0", {}, "bounds are needed, .*TransformAction with a bounded Box"),
        (
            "PiRlTest/Missing-v0",
            {},
            "cannot make PiRlTest/Missing-v0: Box3D is not installed, run `pip install box3d`",
        ),
        ("Pendulum", {}, "unknown task 'Pendulum' .*nearest: Pendulum-v1"),
        ("no_such_module:Thing-v0", {}, "unknown task 'no_such_module:Thing-v0'"),
        ("Pendulum-v1", {"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ("Pendulum-v1", {"make_kwargs": {"id": "x"}}, "make_kwargs must not hold id"),
        ("Pendulum-v1", {"image_size": 64}, "unknown option 'image_size' of gymnasium; there are make_kwargs, max"),
    ],
)
def test_what_cannot_work_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_name_and_options(f"gymnasium:{name}", options)


def test_a_module_can_register_its_environment(tmp_path, monkeypatch):
    code = "import gymnasium\ngymnasium.register({!r}, entry_point='{}:PendulumEnv', max_episode_steps={})\n"
    place = "gymnasium.envs.classic_control"
    module = tmp_path / "pi_rl_test_module.py"
    module.write_text(code.format("Mine-v0", place, 3) + code.format("Endless-v0", place, None))
    monkeypatch.syspath_prepend(tmp_path)
    with make_env("gymnasium:pi_rl_test_module:Mine-v0", 1) as env:
        assert env.spec.max_episode_steps == 3
        assert env.reset(ids(0))[STATE].shape == (1, 3)
    with make_env("gymnasium:pi_rl_test_module:Endless-v0", 1, max_episode_steps=2) as env:
        assert env.spec.max_episode_steps == 2
    with pytest.raises(ValueError, match="pi_rl_test_module:Endless-v0 has no time limit"):
        check_name_and_options("gymnasium:pi_rl_test_module:Endless-v0", {})
    for name in ("Mine-v0", "Endless-v0"):
        del gymnasium.registry[name]


def test_there_is_nothing_to_film_and_closing_is_final():
    env = counter()
    with pytest.raises(RuntimeError, match="draws no frames"):
        env.render([0], 8, 8)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="was closed"):
        env.reset(ids(0))


def test_an_environment_that_raises_fails_alone_and_is_made_anew(tmp_path, monkeypatch, caplog):
    (tmp_path / "pi_rl_raising_module.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Raising(PendulumEnv):\n"
        "    def step(self, action):\n"
        "        if action[0] > 1.9:\n"
        "            raise OverflowError('too strong')\n"
        "        return super().step(action)\n"
        "gymnasium.register('Raising-v0', entry_point=Raising, max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    actions = np.array([[[0.5], [0.5]], [[0.5], [2.0]]], np.float32)
    with make_env("gymnasium:pi_rl_raising_module:Raising-v0", 2) as env:
        env.reset(ids(0, 1))
        result = env.step_chunk(actions)
        assert result.failed.tolist() == [False, True]
        assert result.rewards[0].all()
        assert not result.rewards[1].any()
        assert "state 1) broke down: OverflowError: too strong" in caplog.text
        env.reset(ids(1), [1])
        assert not env.step_chunk(actions[[0, 0]]).failed.any()
    del gymnasium.registry["Raising-v0"]

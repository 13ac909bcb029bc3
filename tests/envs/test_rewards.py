"""Sparse and structured rewards: what is paid, what is not paid twice, and where a chunk stops."""

import types

import numpy as np
import pytest

from pi_rl.envs.registry import make_env
from pi_rl.envs.rewards import TaskReward
from pi_rl.envs.worker import Layout, Worker


def paid(reward, solved, attached):
    task_reward = TaskReward(reward)
    task_reward.reset()
    return [round(float(task_reward.step(s, a)), 12) for s, a in zip(solved, attached, strict=True)]


def test_success_is_paid_once_and_kept():
    assert paid("success", [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]) == [0, 1, 0, 0, 0]


def test_an_object_lost_and_taken_up_again_is_not_paid_again():
    assert paid("structured", [0] * 6, [0, 1, 1, 0, 1, 1]) == [0, 0.1, 0, -0.1, 0.1, 0]


def test_the_structured_rewards_of_an_episode_add_up_to_its_last_state():
    generator = np.random.default_rng(0)
    solved, attached = generator.random((2, 50, 7)) < 0.1
    task_reward = TaskReward("structured", (7,))
    task_reward.reset()
    total = sum(task_reward.step(s, a) for s, a in zip(solved, attached, strict=True))
    np.testing.assert_allclose(total, 0.1 * attached[-1] + solved.any(axis=0), atol=1e-12)


def test_what_is_held_at_the_start_is_not_paid_and_rows_are_reset_alone():
    task_reward = TaskReward("structured", (2,))
    task_reward.reset(attached=[True, False])
    np.testing.assert_allclose(task_reward.step([False, True], [True, True]), [0, 1.1])
    task_reward.reset(rows=np.array([1]))
    np.testing.assert_allclose(task_reward.step([True, False], [True, False]), [1, 0])


def test_an_unknown_reward_is_named():
    with pytest.raises(ValueError, match="success, structured, got 'dense'"):
        make_env("metaworld:reach-v3", 1, reward="dense")


class FlickeringSim:
    """Solved at the third step, and not at the others."""

    state = np.zeros(1, np.float32)

    def reset(self, state_id):
        self.steps, self.reward = 0, 0.0
        self._task_reward = TaskReward("structured")
        self._task_reward.reset()

    def step(self, action):
        self.steps += 1
        solved = self.steps == 3
        self.reward = float(self._task_reward.step(solved, self.steps != 4))
        return solved

    def draw(self, images):
        for image in images.values():
            image[...] = self.steps


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_nothing_is_simulated_or_paid_after_the_end(chunk):
    layout = Layout(num_envs=2, max_chunk=6, action_dim=1, state_dim=1, cameras={"observation.image": (1, 1)})
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.fields().items()}
    sims = []
    backend = types.SimpleNamespace(make=lambda task: sims.append(FlickeringSim()) or sims[-1], max_idle=0)
    worker = Worker(backend, layout, arrays, max_episode_steps=6, index=0)
    worker.reset([0, 1])
    rewards, steps = [], 0
    while not arrays["terminated"][0]:
        worker.step_chunk([0], chunk)
        rewards += arrays["rewards"][0, :chunk].tolist()
        steps += arrays["steps"][0]
    assert steps == sims[0].steps == 3
    assert sims[1].steps == 0
    np.testing.assert_allclose(rewards, [0.1, 0, 1, *[0] * (len(rewards) - 3)], atol=1e-7)


def test_holding_is_both_pads_on_something_that_moves(metaworld):
    backend = metaworld.MetaWorldBackend(["pick-place-v3"], {"image_size": 32, "reward": "structured"})
    sim = backend.make(0)
    sim.reset(1)
    rewards, holding, solved = [], [], False
    while not solved:
        solved = sim.step(metaworld.expert_action(sim))
        rewards.append(sim.reward)
        holding.append(metaworld.is_holding(sim.env.model, sim.data))
    taken = holding.index(True)
    assert 0 < taken < len(holding) - 1
    assert all(holding[taken:])
    np.testing.assert_allclose(rewards, [0.1 * (t == taken) + (t == len(rewards) - 1) for t in range(len(rewards))])
    sim.reset(1)
    for _ in range(15):  # fingers closed on nothing, then on each other: not holding
        sim.step(np.array([0, 0, 1, 1], np.float32))
    assert not metaworld.is_holding(sim.env.model, sim.data)


def test_worker_environments_pay_the_structured_reward():
    with make_env("metaworld:pick-place-v3", 1, 1, blind=True, reward="structured") as env:
        (episode,) = env.rollout_experts([{"task": 0, "state_id": 1, "frames": False}])
        env.reset(np.array([[0, 1]]))
        result = env.step_chunk(episode["actions"][None])
    assert result.success.all()
    assert np.unique(result.rewards).tolist() == pytest.approx([0.0, 0.1, 1.0])
    assert result.rewards.sum() == pytest.approx(1.1)

"""A worker process that is killed in a rollout, an evaluation or while demonstrations are made: real MetaWorld."""

import os
import signal

import numpy as np
import pytest
import torch

from pi_rl import FlowPPOConfig, FlowPPOTrainer

LIMIT, CHUNKS, NUM_ENVS = 12, 5, 4


@pytest.fixture
def trainer(small_pi0_folder, metaworld_env, tmp_path):
    def make(**options):
        args = FlowPPOConfig(
            output_dir=str(tmp_path), num_envs=NUM_ENVS, rollout_chunks=CHUNKS, num_iterations=1, update_epochs=1,
            per_device_train_batch_size=20, noise_std_min=0.4, noise_std_max=1.0, critic_hidden_sizes=[16],
            eval_episodes=4, save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        return FlowPPOTrainer(str(small_pi0_folder), args, metaworld_env(max_episode_steps=LIMIT, num_workers=2))

    return make


def kill_worker(env, monkeypatch, method, call):
    """Has worker 1 killed right after a call of a method, while it simulates what that call has begun."""
    original, calls = getattr(env, method), []

    def killing(*arguments):
        result = original(*arguments)
        calls.append(None)
        if len(calls) == call:
            os.kill(env.worker_pids[1], signal.SIGKILL)
        return result

    monkeypatch.setattr(env, method, killing)


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_iteration_goes_on_without_the_samples_of_a_killed_worker(trainer, monkeypatch, stages):
    """With one stage, environments 1 and 3 are in worker 1; with two it serves the second, environments 2 and 3."""
    broken = trainer(pipeline_stages=stages, inference_batch_size=NUM_ENVS // 2)
    expected = broken.collector.collect(0)
    kill_worker(broken.env, monkeypatch, "start_chunk", 2 * stages)
    rollout = broken.collector.collect(0)
    lost = [1, 3] if stages == 1 else [2, 3]
    kept = [row for row in range(NUM_ENVS) if row not in lost]
    assert rollout.valid[1].tolist() == [row not in lost for row in range(NUM_ENVS)]
    assert rollout.valid[[0, 2, 3, 4]].all()
    assert len(rollout.x) == len(rollout.inputs) == NUM_ENVS * CHUNKS - 2
    assert rollout.truncated[0, lost].all()
    for name in ("rewards", "terminated", "truncated", "values"):
        one, other = getattr(rollout, name), getattr(expected, name)
        assert torch.equal(one[..., kept], other[..., kept]), name
    # final observations are valued in passes of those that are truncated together, of whom there are fewer now
    torch.testing.assert_close(rollout.next_values[:, kept], expected.next_values[:, kept])
    metrics = rollout.statistics.metrics(rollout.statistics.as_tensor())
    assert (metrics["rollout/failed_episodes"], metrics["rollout/worker_restarts"]) == (2, 1)
    assert expected.statistics.failed == expected.statistics.restarts == 0


@pytest.mark.slow
def test_training_and_evaluation_go_on(trainer, monkeypatch, caplog):
    broken = trainer()
    before = broken.evaluation_results()
    with monkeypatch.context() as patch:
        kill_worker(broken.env, patch, "start_chunk", 2)
        after = broken.evaluation_results()
    assert broken.env.worker_restarts == 1
    for name in ("success", "length", "returns", "failed"):  # lost episodes were run once more
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    kill_worker(broken.env, monkeypatch, "start_chunk", 5)  # the first evaluation of the run takes 3
    broken.train()
    (logged,) = (entry for entry in broken.state.log_history if "loss" in entry)
    assert (logged["rollout/failed_episodes"], logged["rollout/worker_restarts"]) == (2, 1)
    assert all(parameter.isfinite().all() for parameter in broken.actor_critic.parameters())
    assert "killed by signal 9" in caplog.text


@pytest.mark.slow
def test_demonstrations_go_on(metaworld_env):
    env = metaworld_env(num_workers=2)
    requests = [{"task": "handle-press-v3", "state_id": state, "max_steps": 70} for state in range(6)]
    expected = list(env.rollout_experts(requests))
    episodes = []
    for episode in env.rollout_experts(requests):
        if not episodes:
            os.kill(env.worker_pids[1], signal.SIGKILL)
        episodes.append(episode)
    assert env.worker_restarts == 1
    for one, other in zip(episodes, expected, strict=True):
        assert one["success"] == other["success"]
        np.testing.assert_array_equal(one["actions"], other["actions"])
        np.testing.assert_array_equal(one["states"], other["states"])

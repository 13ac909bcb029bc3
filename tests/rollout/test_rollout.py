"""Collector and evaluator with a real small π0 in real MuJoCo."""

import numpy as np
import pytest
import torch

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.flow.chain import Chain
from pi_rl.policies.critic import ValueHead
from pi_rl.rl.advantages import two_layer_gae
from pi_rl.rollout.collector import RolloutCollector
from pi_rl.rollout.evaluator import evaluate_policy, evaluation_ids, record_episode
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.trainer.build import build_actor_critic
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

LIMIT = 22  # not a multiple of the chunk size 5: the last chunk of an episode is cut short


@pytest.fixture
def actor_critic(small_policy, tmp_path):
    torch.manual_seed(0)
    args = FlowPPOConfig(output_dir=str(tmp_path), num_envs=4, rollout_chunks=6, per_device_train_batch_size=8,
                         noise_std_min=0.4, noise_std_max=1.0, use_cpu=True)  # fmt: skip
    return build_actor_critic(small_policy(), args, make_critic=lambda policy: ValueHead(policy, [16]))


def io_of(actor_critic, loaded, env):
    return PolicyIO(loaded.preprocessor, loaded.postprocessor, env.spec, actor_critic.policy.n_action_steps)


def collector(actor_critic, loaded, env, chunks=6, **kwargs):
    io = io_of(actor_critic, loaded, env)
    return RolloutCollector(env, actor_critic, io, chunks=chunks, seed=1, **kwargs)


def buffer_of(rollout):
    """The samples with GAE."""
    advantages, returns = two_layer_gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.done,
        gamma=0.99,
        gae_lambda=0.95,
        valid=rollout.valid,
    )
    return rollout.buffer(advantages, returns)


def test_the_rollout_scores_to_a_ratio_of_one_and_repeats(actor_critic, small_policy, metaworld_env):
    env = metaworld_env(max_episode_steps=LIMIT)
    loaded = small_policy()
    buffer = buffer_of(collector(actor_critic, loaded, env).collect(0))
    assert len(buffer) == 4 * 6
    batch = buffer.minibatch(torch.randperm(len(buffer)))
    actor_critic.train()
    chain = Chain(batch.x, batch.step_index)
    score, values = actor_critic("score", inputs=batch.inputs, chain=chain, critic_input=batch.critic_input)
    torch.testing.assert_close((score.log_prob - batch.log_prob).exp(), torch.ones(24, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(values, batch.values, rtol=0, atol=1e-5)
    again = buffer_of(collector(actor_critic, loaded, env).collect(0))
    assert torch.equal(again.x, buffer.x)
    assert torch.equal(again.advantages, buffer.advantages)
    other = collector(actor_critic, loaded, env).collect(1)
    assert not torch.equal(other.x, buffer.x)


def test_episodes_are_counted_and_truncation_bootstraps(actor_critic, small_policy, metaworld_env):
    env = metaworld_env(max_episode_steps=LIMIT)
    rollout = collector(actor_critic, small_policy(), env, chunks=6).collect(0)
    table = rollout.statistics.per_task
    # 22 steps are 5 chunks of 5, the last of 2 steps: one episode per environment ends, the sixth chunk is the next's
    assert table[:, 0].sum() == 4
    assert table[:, 2].sum() == 4 * LIMIT
    assert rollout.statistics.env_steps == 4 * (LIMIT + 5)
    assert rollout.statistics.episodes == 4


def test_truncation_bootstraps_from_the_final_observation(actor_critic, small_policy, metaworld_env):
    """With a critic that says c everywhere and no reward, a truncated chunk's return is γc; termination gives 0."""
    head = actor_critic.value_head.layers[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 0.7)
    env = metaworld_env(max_episode_steps=LIMIT)
    rollout = collector(actor_critic, small_policy(), env, chunks=6).collect(0)
    assert not rollout.statistics.per_task[:, 1].any()
    returns = buffer_of(rollout).returns.view(6, 4)
    torch.testing.assert_close(returns[4], torch.full((4,), 0.99 * 0.7), rtol=0, atol=1e-6)
    torch.testing.assert_close(returns[5], torch.full((4,), 0.99 * 0.7), rtol=0, atol=1e-6)


def test_success_counts_only_first_episodes(actor_critic, small_policy, metaworld_env):
    """Later episodes end within a rollout mostly when they are short, so counting them would favour successes."""
    env = metaworld_env(max_episode_steps=10)
    rollout = collector(actor_critic, small_policy(), env, chunks=6).collect(0)
    assert rollout.statistics.episodes == 12
    assert rollout.statistics.per_task[:, 0].sum() == 4
    assert rollout.statistics.env_steps == 4 * 6 * 5


def test_tasks_take_turns_where_they_do_not_share_the_environments_equally(actor_critic, small_policy, metaworld_env):
    env = metaworld_env("metaworld:handle-press-v3,button-press-topdown-v3", num_envs=3, max_episode_steps=5)
    collecting = collector(actor_critic, small_policy(), env, chunks=1, epochs=2)
    seen = [collecting.collect(iteration).statistics.per_task[:, 0].tolist() for iteration in range(2)]
    assert seen == [[3, 3], [3, 3]]  # 2 + 1 episodes in one epoch, 1 + 2 in the other
    assert collecting.task.tolist() == [1, 0, 1]


def test_tasks_that_share_the_environments_keep_them(actor_critic, small_policy, metaworld_env):
    env = metaworld_env("metaworld:handle-press-v3,button-press-topdown-v3", num_envs=4, max_episode_steps=5)
    collecting = collector(actor_critic, small_policy(), env, chunks=1, rank=1, processes=2)
    for iteration in range(2):
        collecting.collect(iteration)
        assert collecting.task.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="groups of 3; use 3 or 6"):
        collector(actor_critic, small_policy(), env, group_size=3, auto_reset=False)


def test_without_auto_reset_an_environment_runs_one_episode(actor_critic, small_policy, metaworld_env):
    env = metaworld_env(max_episode_steps=12)
    rollout = collector(actor_critic, small_policy(), env, chunks=6, auto_reset=False).collect(0)
    assert rollout.statistics.env_steps == 4 * 12
    assert len(buffer_of(rollout)) == 4 * 3
    assert rollout.statistics.per_task[:, 0].sum() == 4


@pytest.mark.slow
def test_evaluation_does_not_depend_on_workers_history_or_training(actor_critic, small_policy, metaworld_env):
    loaded = small_policy()
    ids = evaluation_ids(metaworld_env(num_envs=1).spec, 7)
    outcomes = []
    for workers in (1, 2):
        env = metaworld_env(max_episode_steps=LIMIT, num_workers=workers)
        io = io_of(actor_critic, loaded, env)
        first = evaluate_policy(actor_critic, env, io, ids)
        collector(actor_critic, loaded, env).collect(0)
        second = evaluate_policy(actor_critic, env, io, ids)
        np.testing.assert_array_equal(first.success, second.success)
        np.testing.assert_array_equal(first.length, second.length)
        frames, success = record_episode(actor_critic, env, io, ids[3])
        assert success == first.success[3]
        assert len(frames) == first.length[3] + 1
        outcomes.append((first.success, first.length))
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


def test_every_initial_state_of_every_task_is_evaluated_once(actor_critic, small_policy, metaworld_env):
    env = metaworld_env("metaworld:handle-press-v3,button-press-topdown-v3", max_episode_steps=5, num_envs=3)
    ids = evaluation_ids(env.spec, 10)
    results = evaluate_policy(actor_critic, env, io_of(actor_critic, small_policy(), env), ids)
    assert (results.length == 5).all()
    summary = results.summary()
    assert {task: part.n_episodes for task, part in summary.per_task.items()} == {
        "handle-press-v3": 5,
        "button-press-topdown-v3": 5,
    }


def test_an_evaluation_reports_after_every_chunk_also_without_episodes(actor_critic, small_policy, metaworld_env):
    """So that it can end there, on all processes of a sharded model together."""
    env = metaworld_env(max_episode_steps=LIMIT, num_envs=2)
    io, real, chunks, reports = io_of(actor_critic, small_policy(), env), env.step_chunk, [], []
    env.step_chunk = lambda *args: (chunks.append(args), real(*args))[1]

    def report(*progress):
        reports.append(progress)

    evaluate_policy(actor_critic, env, io, evaluation_ids(env.spec, 2), progress=report)
    assert len(reports) == len(chunks) > 1
    assert [done for done, _, _ in reports] == [0] * (len(chunks) - 1) + [2]
    others = iter([*[True] * len(chunks), False])
    reports.clear()
    evaluate_policy(
        actor_critic, env, io, np.zeros((0, 2), np.int64), progress=report, agree=lambda mine: next(others)
    )
    assert reports == [(0, 0, "")] * len(chunks)


def test_more_tasks_than_environments_are_all_evaluated(actor_critic, small_policy, metaworld_env):
    env = metaworld_env("metaworld:handle-press-v3,button-press-topdown-v3", max_episode_steps=5, num_envs=1)
    ids = evaluation_ids(env.spec, 4)
    results = evaluate_policy(actor_critic, env, io_of(actor_critic, small_policy(), env), ids)
    assert (results.length == 5).all()


@pytest.mark.parametrize(
    ("tasks", "episodes", "hint"),
    [(3, 10, "9 or 12"), (2, 0, "2 or 4"), (2, 102, "51 of each .*only 50 .*most 100")],
)
def test_shares_that_cannot_be_are_refused_with_values_that_fit(tasks, episodes, hint):
    names = ("a", "b", "c")[:tasks]
    spec = EnvSpec("x:y", names, names, {}, 1, 1, 5, 10, (-1.0,), (1.0,), eval_states=50)
    with pytest.raises(ValueError, match=hint):
        evaluation_ids(spec, episodes)

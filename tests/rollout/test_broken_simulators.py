"""A simulator that returns NaN costs its own samples and nothing else: rollouts, updates and evaluations go on."""

import numpy as np
import pytest
import torch

from pi_rl import FlowGRPOConfig, FlowGRPOTrainer, FlowPPOConfig, FlowPPOTrainer
from pi_rl.envs.toy import PointMassEnv, ToyOptions, make_spec
from pi_rl.flow.chain import Chain
from pi_rl.rollout.evaluator import record_episode

OPTIONS = ToyOptions(tolerance=0.29, reward="distance", max_episode_steps=12)
NUM_ENVS, CHUNKS = 4, 6


class Breaking(PointMassEnv):
    """Returns NaN where `breaks(environment, state id, steps of the episode)` says so."""

    def __init__(self, breaks):
        super().__init__(make_spec("toy:point-mass", ("point-mass",), OPTIONS), OPTIONS, NUM_ENVS)
        self.breaks = breaks

    def _advance(self, slots, actions):
        result = super()._advance(slots, actions)
        for slot in slots.tolist():
            if self.breaks(slot, int(self._ids[slot, 1]), int(self._steps[slot]) + 1):
                self.states[slot, 0] = np.nan
        return result


def never(*_):
    return False


class Once:
    """Breaks in one environment at one step of an episode, the first time only."""

    def __init__(self, environment, step):
        self.where, self.done = (environment, step), False

    def __call__(self, environment, state_id, step):
        now = not self.done and (environment, step) == self.where
        self.done |= now
        return now


@pytest.fixture
def make(mlp_folder, tmp_path):
    def make(breaks, trainer=FlowPPOTrainer, config=FlowPPOConfig, **options):
        args = config(
            output_dir=str(tmp_path / str(len(list(tmp_path.iterdir())))), num_envs=NUM_ENVS, rollout_chunks=CHUNKS,
            num_iterations=2, per_device_train_batch_size=12, update_epochs=1, use_cpu=True, eval_episodes=0,
            save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        return trainer(str(mlp_folder), args, Breaking(breaks))

    return make


@pytest.mark.parametrize("mdp", ["hybrid", "two_layer"])
def test_only_the_broken_chunk_is_lost_and_what_led_there_is_bootstrapped(make, mdp):
    sound = make(never, noise="flow_sde", mdp=mdp).collector.collect(0)
    trainer = make(Once(1, 6), noise="flow_sde", mdp=mdp)
    broken = trainer.collector.collect(0)
    assert broken.statistics.failed == 1
    assert broken.valid[:, 1].tolist() == [True, True, False, True, True, True]
    assert broken.valid[:, [0, 2, 3]].all()
    assert torch.equal(broken.rewards[:, [0, 2, 3]], sound.rewards[:, [0, 2, 3]])
    assert broken.truncated[1, 1]
    assert not sound.done[1, 1]
    assert broken.next_values[1, 1] == sound.values[2, 0, 1] != 0
    assert len(broken.x) == len(broken.inputs) == len(broken.log_prob) == NUM_ENVS * CHUNKS - 1
    chain = Chain(broken.x, broken.step_index)
    rows = torch.arange(len(broken.x))
    if mdp == "hybrid":
        chain = Chain(broken.x, broken.step_index[:, 0])
        score, _ = trainer.actor_critic(
            "score", inputs=broken.inputs[rows], chain=chain, critic_input=broken.critic_input
        )
        torch.testing.assert_close(score.log_prob, broken.log_prob[:, 0])


def test_training_goes_on_and_counts(make):
    trainer = make(Once(2, 3))
    trainer.train()
    logged = [entry["rollout/failed_episodes"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1, 0]
    assert all(parameter.isfinite().all() for parameter in trainer.actor_critic.parameters())


def test_the_chunk_of_a_first_step_leaves_nothing_behind(make):
    rollout = make(Once(0, 1)).collector.collect(0)
    assert not rollout.valid[0, 0]
    assert rollout.valid.sum() == NUM_ENVS * CHUNKS - 1
    assert not rollout.done[0, 0]


def test_a_broken_episode_leaves_its_group(make):
    options = {"trainer": FlowGRPOTrainer, "config": FlowGRPOConfig, "group_size": 2}
    sound = make(never, **options)
    broken = make(Once(1, 5), **options)
    before, after = sound.collector.collect(0), broken.collector.collect(0)
    assert not after.valid[:, 1].any()
    assert after.groups.tolist() == [0, 2, 1, 1]
    assert torch.equal(after.rewards[:, [0, 2, 3]], before.rewards[:, [0, 2, 3]])
    advantages = broken.estimate(after).advantages
    assert not advantages[:, :2].any()  # its partner has nobody left to be compared with
    assert torch.equal(advantages[:, 2:], sound.estimate(before).advantages[:, 2:])
    broken.train()


def test_an_evaluation_episode_is_tried_again(make):
    def evaluate(breaks):
        trainer = make(breaks)
        trainer.args.eval_episodes = 12
        return trainer.evaluation_results()

    sound, once = evaluate(never), evaluate(Once(2, 4))
    for name in ("success", "length", "returns", "failed"):
        np.testing.assert_array_equal(getattr(once, name), getattr(sound, name))
    always = evaluate(lambda environment, state_id, step: state_id == 5 and step == 4)
    assert always.failed.tolist() == [state == 5 for state in range(12)]
    assert not always.success[5]
    others = np.arange(12) != 5
    np.testing.assert_array_equal(always.length[others], sound.length[others])


@pytest.mark.parametrize("options", [{}, {"trainer": FlowGRPOTrainer, "config": FlowGRPOConfig, "group_size": 2}])
def test_a_process_that_lost_everything_still_has_a_sample_without_news(make, options):
    trainer = make(lambda environment, state_id, step: step == 1, **options)
    trainer.collector.env._failures.note = lambda *_: None  # else three failures in a row end the run
    rollout = trainer.collector.collect(0)
    assert rollout.valid.sum() == len(rollout.x) == len(rollout.inputs) == 1
    row = tuple(rollout.valid.nonzero()[0].tolist())
    assert rollout.rewards[row] == 0
    assert rollout.truncated[row]
    if rollout.values is not None:
        assert rollout.next_values[row] == rollout.values[row[0], 0, row[1]]
    trainer.train()


def test_filming_a_broken_episode_ends_the_film(make):
    trainer = make(lambda environment, state_id, step: step == 5)
    trainer.env.render = lambda rows, height, width: np.zeros((len(rows), height, width, 3), np.uint8)
    frames, success = record_episode(trainer.actor_critic, trainer.env, trainer.io, np.array([0, 3]), size=(4, 4))
    assert (len(frames), success) == (5, False)

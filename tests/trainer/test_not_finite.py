"""NaN and infinity: the update is refused, the state before it is kept, the first bad tensor is named."""

import pytest
import torch
from transformers import TrainerCallback

from pi_rl.envs.registry import check_name_and_options
from pi_rl.envs.toy import PointMassEnv, ToyOptions
from pi_rl.trainer.checkpoint_folders import checkpoints


class HugeRewards(PointMassEnv):
    """A simulator whose rewards are so large from some step on that float32 cannot hold their sum."""

    def __init__(self, steps):
        options = {"max_episode_steps": 8}
        super().__init__(check_name_and_options("toy:point-mass", options), ToyOptions(**options), 4)
        self.left = steps

    def _advance(self, slots, actions):
        self.left -= 1
        result = super()._advance(slots, actions)
        if self.left < 0:
            result.rewards[:] = 3e38
        return result


class Break(TrainerCallback):
    """Makes a gradient infinite before the optimiser's step ``at``, and keeps the weights as they were."""

    def __init__(self, at):
        self.at, self.weights = at, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        if state.global_step == self.at:
            name, parameter = [pair for pair in model.named_parameters() if pair[1].requires_grad][2]
            self.name = name
            parameter.register_hook(lambda gradient: gradient * torch.inf)


def assert_weights(trainer, expected):
    for name, value in trainer.actor_critic.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_rewards_that_are_not_finite_end_the_run_before_it_learns_from_them(toy_trainer, tmp_path):
    keep = Break(at=None)
    trainer = toy_trainer(env=HugeRewards(16), callbacks=[keep], save_every_iterations=None)
    with pytest.raises(
        FloatingPointError, match=r"iteration 2, tick 0; not finite: advantages.*Usual causes"
    ) as caught:
        trainer.train()
    folder = tmp_path / "run" / "checkpoint-8"
    assert f"The update was not made; {folder} holds the state before it" in str(caught.value)
    assert_weights(trainer, keep.weights)
    assert checkpoints(tmp_path / "run") == [folder]
    resumed = toy_trainer(learning_rate=1e-4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 16


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_an_infinite_gradient_is_refused_and_named(toy_trainer, tmp_path, clip):
    callback = Break(at=10)  # in the third of four iterations
    trainer = toy_trainer(callbacks=[callback], save_every_iterations=None, max_grad_norm=clip)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    assert f"iteration 2, first that of {callback.name} (1 of " in str(caught.value)
    assert_weights(trainer, callback.weights)
    assert checkpoints(tmp_path / "run") == [tmp_path / "run" / "checkpoint-8"]
    resumed = toy_trainer()
    resumed.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert steps == [4, 8, 12, 16]


def test_a_checkpoint_that_is_there_already_stays_as_it_is(toy_trainer, tmp_path):
    trainer = toy_trainer(callbacks=[Break(at=10)], save_every_iterations=2, save_total_limit=1)
    with pytest.raises(FloatingPointError, match="checkpoint-8 holds the state before it"):
        trainer.train()
    straight = toy_trainer(tmp_path / "straight", num_iterations=4, save_every_iterations=2)
    straight.train()
    first, second = (tmp_path / run / "checkpoint-8" / "model.safetensors" for run in ("run", "straight"))
    assert first.read_bytes() == second.read_bytes()


def test_parameters_that_are_not_finite_are_never_saved(toy_trainer, tmp_path):
    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, model=None, **kwargs):
            if state.global_step == 7:  # the last update of the second iteration
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].mul_(1e38).mul_(1e38)

    trainer = toy_trainer(callbacks=[Overflow()])
    with pytest.raises(FloatingPointError, match=r"The parameter \S+ is not finite after 8 optimiser steps") as caught:
        trainer.train()
    assert f"{tmp_path / 'run' / 'checkpoint-4'} is the newest checkpoint" in str(caught.value)
    assert checkpoints(tmp_path / "run") == [tmp_path / "run" / "checkpoint-4"]
    with pytest.raises(FloatingPointError, match="it is not saved"):
        trainer.save_model(str(tmp_path / "policy"))
    assert not (tmp_path / "policy").exists()


def test_what_is_wrong_on_one_process_ends_both_at_once(toy_trainer, fork_ranks, tmp_path):
    """The second process's returns alone are NaN; without agreement the first would wait for it."""

    def run():
        trainer = toy_trainer(num_envs=8, save_every_iterations=None)
        begin = trainer._begin_iteration

        def poisoned():
            begin()
            if trainer.args.process_index == 1 and trainer.iteration == 2:
                trainer._buffer.returns[:] = float("nan")

        trainer._begin_iteration = poisoned
        trainer.train()

    first, second = fork_ranks(run)
    assert (first.wait(), second.wait()) == (1, 1)
    assert "FloatingPointError: The loss is nan in iteration 2, tick 0; not finite: returns" in second.output
    assert "ValueError: Process 1 on " in first.output
    assert "The loss is nan in iteration 2" in first.output
    assert checkpoints(tmp_path / "run") == [tmp_path / "run" / "checkpoint-8"]

"""A policy that solves nothing before training is told why that may be."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.envs.registry import check_name_and_options
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.rollout.evaluator import EpisodeResults, evaluation_ids
from pi_rl.rollout.zero_success import warn_about_zero_success


@pytest.fixture
def evaluated():
    def make(episodes=10, solved=0, **changes):
        spec = dataclasses.replace(check_name_and_options("metaworld:reach-v3", {}), **changes)
        results = EpisodeResults.empty(spec, evaluation_ids(spec, episodes))
        results.success[:solved] = True
        return results

    return make


@pytest.fixture
def warned(small_policy, caplog):
    def text(results, loaded=None):
        loaded = loaded or small_policy()
        with caplog.at_level(logging.WARNING, logger="pi_rl"):
            warn_about_zero_success(results, loaded, PiFlowPolicy(loaded.policy))
        return "\n".join(record.getMessage() for record in caplog.records)

    return text


def test_the_causes_come_with_both_sides_names_and_numbers(warned, evaluated):
    text = warned(evaluated())
    for part in (
        "pi0 solved none of 10 evaluation episodes in metaworld:reach-v3",
        "wrong suite",
        "'Reach a goal position'",
        "observation.image (32 x 32), the environment draws observation.image (64 x 64)",
        "flipped or rotated",
        "no statistics",
        "-1 to 1",
        "n_action_steps: 5 of 5",
        "control mode",
        "actions have 4 numbers, observation.state has 4",
        "150 steps",
    ):
        assert part in text, part


def test_statistics_of_the_actions_are_shown(warned, evaluated, small_policy):
    loaded = small_policy()
    unnormalise = next(step for step in loaded.postprocessor.steps if hasattr(step, "stats"))
    unnormalise.load_state_dict(
        {"action.mean": torch.tensor([0.0, 0.5, -0.25, 0.0]), "action.std": torch.tensor([0.1, 0.2, 0.3, 2.0])}
    )
    assert "mean -0.25 to 0.5, std 0.1 to 2 over 4 numbers" in warned(evaluated(), loaded)


@pytest.mark.parametrize(
    ("episodes", "changes"), [(9, {}), (10, {"solved": 1}), (10, {"cameras": {}})], ids=["few", "solved", "blind"]
)
def test_there_is_no_warning(warned, evaluated, episodes, changes):
    assert not warned(evaluated(episodes, **changes))


def test_the_trainer_warns_before_training_only(small_policy, metaworld_env, tmp_path, caplog):
    args = FlowPPOConfig(output_dir=str(tmp_path), use_cpu=True, num_envs=2, rollout_chunks=2, eval_episodes=10,
                         per_device_train_batch_size=4)  # fmt: skip
    trainer = FlowPPOTrainer(small_policy(), args, metaworld_env(num_envs=2, max_episode_steps=5))
    with caplog.at_level(logging.WARNING, logger="pi_rl"):
        trainer.evaluate()
        assert caplog.text.count("solved none of 10") == 1
        assert np.isfinite(trainer.last_evaluation.returns).all()
        trainer.state.global_step = 1
        trainer.evaluate()
    assert caplog.text.count("solved none of 10") == 1


def test_sequences_that_solve_some_of_their_subtasks_are_no_reason(warned, evaluated):
    results = evaluated(subtasks=5)
    results.returns[:] = 3.0
    assert warned(results) == ""

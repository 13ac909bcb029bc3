"""The real Trainer loop with a real small π0 in real MuJoCo."""

import json

import pytest
import torch
from transformers import TrainerCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from tests.trainer.options import small_options


def config(tmp_path, **overrides):
    return FlowPPOConfig(**small_options(**{"output_dir": tmp_path / "run", **overrides}))


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.actor_critic.named_parameters()}


@pytest.fixture
def train(small_policy, metaworld_env, tmp_path):
    """Trains and returns the trainer; every call starts from the same checkpoint."""

    def run(resume=None, callbacks=None, kind="pi0", **overrides):
        args = config(tmp_path, **overrides)
        env = metaworld_env(max_episode_steps=15)
        trainer = FlowPPOTrainer(small_policy(kind), args, env, callbacks=callbacks)
        trainer.before = parameters(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.mark.parametrize(("kind", "noise"), [("pi0", "flow_noise"), ("pi0", "flow_sde"), ("pi05", "flow_sde")])
def test_an_iteration_is_an_epoch_and_only_expert_and_heads_learn(train, kind, noise):
    trainer = train(kind=kind, noise=noise, noise_level=1.0)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    assert trainer.state.global_step == 2 * 2 * 2
    for entry in history:
        assert entry["policy/ratio_error_first"] < 1e-4
        assert entry["rollout/env_steps"] > 0
        assert entry["time/rollout"] > 0
        assert entry["policy/approx_kl"] >= 0
    assert history[1]["env_steps"] == history[0]["rollout/env_steps"] + history[1]["rollout/env_steps"]
    changed = {name for name, value in parameters(trainer).items() if not torch.equal(value, trainer.before[name])}
    assert changed
    assert not [name for name in changed if ".paligemma." in name]
    for part in ("gemma_expert", "action_out_proj", "value_head"):
        assert any(part in name for name in changed), part
    assert any("noise_network" in name for name in changed) == (noise == "flow_noise")


def test_gradient_accumulation_changes_nothing_but_rounding(train):
    whole = train(per_device_train_batch_size=8)
    parts = train(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert whole.state.global_step == parts.state.global_step
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name], value, rtol=1e-3, atol=2e-5)


def test_resume_is_bitwise_equal_to_never_having_stopped(train, tmp_path):
    class StopAfterFirst(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    straight = train(output_dir=str(tmp_path / "straight"))
    folder = tmp_path / "stopped"
    stopped = train(output_dir=str(folder), save_every_iterations=1, callbacks=[StopAfterFirst()])
    assert stopped.state.global_step == 4
    resumed = train(output_dir=str(folder), save_every_iterations=1, resume=str(folder / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert resumed.env_steps == straight.env_steps
    for name, value in parameters(straight).items():
        assert torch.equal(parameters(resumed)[name], value), name
    histories = [
        [{k: v for k, v in entry.items() if not k.startswith("time/")} for entry in log if "loss" in entry]
        for log in (straight.state.log_history, resumed.state.log_history)
    ]
    assert histories[0] == histories[1]


def test_resume_with_other_batch_arithmetic_is_refused(train, tmp_path):
    folder = tmp_path / "run"
    train(num_iterations=1, save_every_iterations=1)
    with pytest.raises(ValueError, match="8 optimiser steps per iteration"):
        train(resume=str(folder / "checkpoint-4"), per_device_train_batch_size=4)


def test_a_bfloat16_policy_trains_in_float32(small_policy_folders, metaworld_env, tmp_path):
    from pi_rl import load_policy

    loaded = load_policy(small_policy_folders["pi0"])
    loaded.policy.to(torch.bfloat16)
    loaded.policy.config.dtype = "bfloat16"
    trainer = FlowPPOTrainer(loaded, config(tmp_path), metaworld_env(max_episode_steps=15))
    trained = [p.dtype for p in trainer.actor_critic.parameters() if p.requires_grad]
    assert set(trained) == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in trainer.actor_critic.parameters()}
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert max(entry["policy/ratio_error_first"] for entry in history) < 1e-3


def test_the_denoising_steps_of_training_are_saved(train, tmp_path):
    trainer = train(denoising_steps=3, num_iterations=1)
    trainer.save_model(str(tmp_path / "policy"))
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["num_inference_steps"] == 3


def test_a_checkpoint_is_a_lerobot_policy_and_leaves_nothing_half_written(train, tmp_path):
    trainer = train(num_iterations=3, save_every_iterations=1, save_total_limit=2, eval_every_iterations=1)
    run = tmp_path / "run"
    best = f"checkpoint-{trainer.state.best_global_step}"
    kept = {folder.name for folder in run.glob("checkpoint-*")}
    assert {best, "checkpoint-12"} <= kept
    assert len(kept) == 2
    assert not (run / ".incomplete").exists()
    names = {file.name for file in (run / "checkpoint-12").iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json",
            "critic.safetensors", "noise_network.safetensors", "rl_state.json",
            "optimizer.safetensors"} <= names  # fmt: skip
    state = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(run / best)
    reloaded = FlowPPOTrainer(str(run / "checkpoint-12"), trainer.args, trainer.env)
    for name, value in trainer.actor_critic.policy.state_dict().items():
        assert torch.equal(reloaded.actor_critic.policy.state_dict()[name], value), name


def test_evaluation_reports_rate_interval_and_tasks(train):
    trainer = train(eval_on_start=True, eval_every_iterations=1)
    evaluations = [entry for entry in trainer.state.log_history if "eval_success_rate" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4, 8]
    for entry in evaluations:
        assert entry["eval_ci95_low"] <= entry["eval_success_rate"] <= entry["eval_ci95_high"]
        assert entry["eval_n_episodes"] == 4
        assert "eval_success_rate/handle-press-v3" in entry


def test_target_kl_skips_updates_without_losing_steps(train):
    trainer = train(target_kl=1e-9)
    assert trainer.state.global_step == 8
    free = train()
    moved = sum((parameters(trainer)[n] - v).abs().sum() for n, v in trainer.before.items())
    moved_free = sum((parameters(free)[n] - v).abs().sum() for n, v in free.before.items())
    assert moved < moved_free


def test_nan_stops_the_run_with_a_diagnosis(small_policy, metaworld_env, tmp_path):
    trainer = FlowPPOTrainer(small_policy(), config(tmp_path), metaworld_env(max_episode_steps=15))
    begin = trainer._begin_iteration

    def poisoned():
        begin()
        trainer._buffer.returns[:] = float("nan")

    trainer._begin_iteration = poisoned
    with pytest.raises(FloatingPointError, match=r"iteration 0, tick 0; not finite: returns"):
        trainer.train()


def test_a_wrong_rollout_likelihood_is_refused(small_policy, metaworld_env, tmp_path):
    trainer = FlowPPOTrainer(small_policy(), config(tmp_path), metaworld_env(max_episode_steps=15))
    begin = trainer._begin_iteration

    def shifted():
        begin()
        trainer._buffer.log_prob += 0.5

    trainer._begin_iteration = shifted
    with pytest.raises(RuntimeError, match="Sampling and scoring disagree"):
        trainer.train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"per_device_train_batch_size": 6}, r"16 samples per process.*Use per_device_train_batch_size .*4 or .*8"),
        ({"noise": "flow_sd"}, "flow_sde"),
        ({"noise": "ode"}, "ode"),
        ({"clip_range": 1.5}, "clip_range=1.5"),
        ({"noise_std_max": 0.1}, "noise_std_min=0.4"),
        ({"eval_strategy": "steps", "eval_steps": 3}, "multiple of 4"),
        ({"logging_nan_inf_filter": True}, "NaN"),
        ({"num_train_epochs": 7}, "num_iterations"),
        ({"save_every_iterations": 0}, "save_every_iterations=0"),
        ({"save_only_model": True}, "save_model"),
        ({"eval_episodes": 0, "eval_strategy": "epoch"}, "eval_strategy"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **overrides)


def test_an_environment_of_another_size_is_refused(small_policy, metaworld_env, tmp_path):
    env = metaworld_env(num_envs=2)
    with pytest.raises(ValueError, match=r"has 2 slots, but num_envs=4 .* asks for 4"):
        FlowPPOTrainer(small_policy(), config(tmp_path), env)


def test_a_policy_that_executes_more_than_it_predicts_is_refused(small_pi0_folder, metaworld_env, tmp_path):
    with pytest.raises(ValueError, match=r"n_action_steps.*chunk"):
        FlowPPOTrainer(str(small_pi0_folder), config(tmp_path, n_action_steps=9), metaworld_env())


def test_an_unknown_environment_names_the_nearest(small_policy, tmp_path):
    with pytest.raises(ValueError, match="handle-press-v3"):
        FlowPPOTrainer(small_policy(), config(tmp_path), "metaworld:handel-press-v3")


def test_what_was_trained_in_float32_is_exported_in_float32(small_policy_folders, metaworld_env, tmp_path):
    """A configuration in bfloat16 would round the trained weights when the policy is loaded."""
    from pi_rl import load_policy

    args = config(tmp_path, vlm_dtype="bfloat16", num_iterations=1)
    trainer = FlowPPOTrainer(load_policy(small_policy_folders["pi0"]), args, metaworld_env(max_episode_steps=15))
    trainer._loaded.policy.config.dtype = "bfloat16"
    dtypes = {name: p.dtype for name, p in trainer.actor_critic.policy.named_parameters()}
    frozen = [
        dtype for name, dtype in dtypes.items() if ".paligemma." in name and "language_model.layers.0.mlp" in name
    ]
    assert set(frozen) == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "gemma_expert" in name} == {torch.float32}
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert max(entry["policy/ratio_error_first"] for entry in history) < 1e-3
    trainer.save_model(str(tmp_path / "policy"))
    loaded = load_policy(tmp_path / "policy").policy.state_dict()
    assert loaded
    for name, value in trainer._loaded.policy.state_dict().items():
        assert torch.equal(loaded[name], value.float()), name


def test_dropout_is_off(small_policy, metaworld_env, tmp_path):
    """Dropout in the update would multiply the ratio by the noise of its masks."""
    loaded = small_policy()
    layers = loaded.policy.model.paligemma_with_expert.gemma_expert.model.layers
    for layer in layers:
        layer.self_attn.attention_dropout = 0.5
    layers[0].mlp.act_fn = torch.nn.Sequential(layers[0].mlp.act_fn, torch.nn.Dropout(0.5))
    trainer = FlowPPOTrainer(loaded, config(tmp_path, num_iterations=1), metaworld_env(max_episode_steps=15))
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["policy/ratio_error_first"] < 1e-4

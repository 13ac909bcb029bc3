"""Training in bfloat16, with recomputed layers and with the whole VLM: the Trainer's loop, checkpoints and resume."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.policies.lora import vlm_lora_config


@pytest.fixture
def train(small_policy_folders, metaworld_env, tmp_path):
    def run(name="run", kind="pi0", resume=None, callbacks=None, peft_config=None, **overrides):
        options = {"output_dir": str(tmp_path / name), "use_cpu": True, "seed": 3, "num_iterations": 2, "num_envs": 4,
                   "rollout_chunks": 4, "per_device_train_batch_size": 8, "update_epochs": 2, "noise_std_min": 0.4,
                   "noise_std_max": 1.0, "critic_hidden_sizes": [16], "learning_rate": 1e-3, "eval_episodes": 4,
                   "eval_on_start": True, "disable_tqdm": True}  # fmt: skip
        trainer = FlowPPOTrainer(
            str(small_policy_folders[kind]),
            FlowPPOConfig(**{**options, **overrides}),
            metaworld_env(max_episode_steps=15),
            callbacks=callbacks,
            peft_config=peft_config,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


class StopAfterFirst(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def log_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer):
    return dict(trainer.actor_critic.named_parameters())


@pytest.mark.parametrize(("kind", "noise"), [("pi0", "flow_noise"), ("pi05", "flow_sde")])
def test_bfloat16_trains_float32_masters_on_policy(train, small_policy_folders, tmp_path, kind, noise):
    trainer = train(kind=kind, noise=noise, noise_level=1.0, bf16=True, gradient_checkpointing=True)
    for entry in log_of(trainer):
        assert entry["policy/ratio_error_first"] <= 1e-4
    assert trainer.accelerator.mixed_precision == "no"  # ours covers rollouts and evaluation too
    policy = trainer.actor_critic.policy
    assert policy.attention == "sdpa"
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    vlm = policy.policy.model.paligemma_with_expert.paligemma.model.language_model
    assert vlm.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    trainer.save_model(str(tmp_path / "policy"))
    saved, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "policy", small_policy_folders[kind])
    )
    assert saved.keys() == before.keys()
    heads = [name for name in saved if "lm_head" in name]
    assert len(heads) == 2
    assert all(torch.equal(saved[name], before[name]) for name in heads)


@pytest.mark.slow
def test_resume_in_bfloat16_is_bitwise(train, tmp_path):
    settings = {"bf16": True, "gradient_checkpointing": True, "eval_episodes": 0}
    straight = train("straight", **settings)
    stopped = train("stopped", save_every_iterations=1, callbacks=[StopAfterFirst()], **settings)
    checkpoint = str(tmp_path / "stopped" / f"checkpoint-{stopped.state.global_step}")
    resumed = train("stopped", save_every_iterations=1, resume=checkpoint, **settings)
    for name, value in parameters(straight).items():
        assert torch.equal(parameters(resumed)[name], value), name


def test_recomputed_layers_change_nothing(train):
    plain, recomputed = train("plain"), train("recomputed", gradient_checkpointing=True)
    for name, value in parameters(plain).items():
        assert torch.equal(parameters(recomputed)[name], value), name


def test_lora_in_bfloat16_with_recomputed_layers(train):
    trainer = train(peft_config=vlm_lora_config(4), bf16=True, gradient_checkpointing=True, num_iterations=1)
    assert log_of(trainer)[0]["policy/ratio_error_first"] <= 1e-4
    assert trainer.actor_critic.execution.encode_rows == 4


@pytest.mark.slow
def test_the_whole_vlm_trains_and_resumes(train, tmp_path):
    settings = {"train_vlm": True, "eval_episodes": 0}
    straight = train("straight", **settings)
    before = load_file(straight._loaded.path / "model.safetensors")
    changed = [
        name for name, value in straight._loaded.policy.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert any("vision_tower" in name for name in changed)
    assert any("language_model.layers.0.mlp" in name for name in changed)
    assert not [name for name in changed if "lm_head" in name]
    stopped = train("stopped", save_every_iterations=1, callbacks=[StopAfterFirst()], **settings)
    resumed = train(
        "stopped", resume=str(tmp_path / "stopped" / f"checkpoint-{stopped.state.global_step}"), **settings
    )
    for name, value in parameters(straight).items():
        assert torch.equal(parameters(resumed)[name], value), name


def test_full_fine_tuning_and_lora_exclude_each_other(train):
    with pytest.raises(ValueError, match="use one of them"):
        train(train_vlm=True, peft_config=vlm_lora_config(4))

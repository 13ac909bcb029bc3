"""PPO with LoRA on the VLM and a whole expert: live prefixes, merged export, resume."""

import pytest
import torch
from transformers import TrainerCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer, load_policy
from pi_rl.policies.lora import vlm_lora_config

RANK = 4


@pytest.fixture
def train(small_pi0_folder, metaworld_env, tmp_path):
    def run(name="run", resume=None, callbacks=None, rank=RANK, **overrides):
        options = {"output_dir": str(tmp_path / name), "use_cpu": True, "seed": 3, "num_iterations": 2, "num_envs": 4,
                   "rollout_chunks": 3, "per_device_train_batch_size": 6, "update_epochs": 1, "noise_std_min": 0.4,
                   "noise_std_max": 1.0, "critic_hidden_sizes": [16], "learning_rate": 1e-3, "eval_episodes": 0,
                   "disable_tqdm": True}  # fmt: skip
        trainer = FlowPPOTrainer(
            str(small_pi0_folder),
            FlowPPOConfig(**{**options, **overrides}),
            metaworld_env(max_episode_steps=15),
            callbacks=callbacks,
            peft_config=vlm_lora_config(rank) if rank else None,
        )
        trainer.before = {name: value.detach().clone() for name, value in trainer.actor_critic.named_parameters()}
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def parameters(trainer):
    return dict(trainer.actor_critic.named_parameters())


class StopAfterFirst(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_adapters_and_the_whole_expert_learn_on_policy_and_the_vlm_stays(train):
    trainer = train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["policy/ratio_error_first"] < 1e-4
    changed = {name for name, value in parameters(trainer).items() if not torch.equal(value, trainer.before[name])}
    adapters = {name for name in trainer.before if "lora_" in name}
    assert adapters
    assert adapters <= changed
    assert any("gemma_expert" in name for name in changed)
    assert not [name for name in changed - adapters if ".paligemma." in name]
    trained = {name for name, value in parameters(trainer).items() if value.requires_grad}
    assert trained == changed
    assert {parameters(trainer)[name].dtype for name in trained} == {torch.float32}


def test_the_saved_policy_is_merged_and_acts_the_same(train, tmp_path):
    trainer = train(num_iterations=1)
    trainer.save_model(str(tmp_path / "policy"))
    plain = load_policy(tmp_path / "policy")
    assert not [name for name in plain.policy.state_dict() if "lora" in name]
    trainer.actor_critic.eval()
    env, io = trainer.env, trainer.io
    observation = env.reset(torch.tensor([[0, 5], [0, 6], [0, 7], [0, 8]]).numpy())
    batch = io.batch(observation, [0, 1, 2, 3])
    noise = torch.randn(4, 5, plain.policy.config.max_action_dim)
    prefix = trainer.actor_critic("encode", batch=batch)
    live = trainer.actor_critic("ode", prefix=prefix, x_init=noise)[..., :4]
    with torch.no_grad():
        merged = plain.policy.predict_action_chunk(batch, noise=noise, num_steps=4)
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_resume_is_bitwise(train, tmp_path):
    straight = train("straight")
    stopped = train("stopped", save_every_iterations=1, callbacks=[StopAfterFirst()])
    checkpoint = str(tmp_path / "stopped" / f"checkpoint-{stopped.state.global_step}")
    resumed = train("stopped", save_every_iterations=1, resume=checkpoint)
    for name, value in parameters(straight).items():
        assert torch.equal(parameters(resumed)[name], value), name


def test_lora_on_a_policy_without_a_vlm_is_refused(mlp_folder, tmp_path):
    with pytest.raises(ValueError, match="has none; leave peft_config out"):
        FlowPPOTrainer(
            str(mlp_folder), FlowPPOConfig(output_dir=str(tmp_path), use_cpu=True, num_envs=4, rollout_chunks=2,
                                           per_device_train_batch_size=8),
            "toy:point-mass", peft_config=vlm_lora_config(RANK),
        )  # fmt: skip

"""A training run does not depend on where prefixes wait, nor on whether they are computed twice."""

import threading

import pytest
import torch

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.policies.input_storage import InputStorage
from pi_rl.policies.observation_store import ObservationStore
from pi_rl.policies.storage_budget import Budget

STORAGES = ("auto", "device", "host", "disk", "recompute")


class Recorded(FlowPPOTrainer):
    """Keeps every micro-batch's log-probs and every optimiser step's gradients."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        gradients = [p.grad.clone() for p in self.actor_critic.parameters() if p.grad is not None]
        self.recorded = [*getattr(self, "recorded", []), loss.clone(), *gradients]
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, score = super().compute_loss(model, inputs, return_outputs=True)
        self.recorded = [*getattr(self, "recorded", []), score.log_prob.detach().clone()]
        return loss


@pytest.fixture
def train(small_policy, metaworld_env, tmp_path):
    env = metaworld_env(max_episode_steps=15)

    def run(storage, *, kind="pi0", prepare=lambda loaded: None, **options):
        args = FlowPPOConfig(
            output_dir=str(tmp_path / storage), use_cpu=True, seed=3, num_iterations=2, num_envs=4, rollout_chunks=4,
            update_epochs=2, noise="flow_sde", noise_level=1.0, critic_hidden_sizes=[16], learning_rate=1e-3,
            eval_episodes=0, disable_tqdm=True, prefix_storage=storage,
            **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **options},
        )  # fmt: skip
        loaded = small_policy(kind)
        prepare(loaded)
        trainer = Recorded(loaded, args, env)
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("kind", ["pi0", pytest.param("pi05", marks=pytest.mark.slow)])
def test_log_probs_gradients_and_weights_are_the_same_to_the_bit(train, tmp_path, kind, capsys):
    """All tiers and a second encoding, over two iterations; 4 rows are encoded in both rollout and update."""
    runs = {storage: train(storage, kind=kind) for storage in STORAGES}
    reference = runs["device"]
    assert len(reference.recorded) > 100
    for storage, run in runs.items():
        assert len(run.recorded) == len(reference.recorded)
        assert all(map(torch.equal, run.recorded, reference.recorded)), storage
        for name, value in reference.actor_critic.state_dict().items():
            assert torch.equal(run.actor_critic.state_dict()[name], value), (storage, name)
        stored = run.collector._inputs
        assert isinstance(stored, ObservationStore) == (storage == "recompute")
        assert storage in ("auto", "recompute", stored.storage)
        run.close()
    assert list((tmp_path / "disk").rglob("tmp*")) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if line.startswith("prefix store: ")]
    assert [line.split(",")[0] for line in lines] == [
        "prefix store: device", "prefix store: recompute (observations: device)"
    ]  # fmt: skip
    assert "16 observations x" in lines[0]


def test_auto_without_room_encodes_again_and_trains(train, monkeypatch):
    monkeypatch.setattr(InputStorage, "_budget", lambda self, device: Budget(0.0, 0.0, 0.0))
    run = train("auto")
    assert isinstance(run.collector._inputs, ObservationStore)
    assert run.state.global_step == 8


@pytest.mark.slow
def test_a_bfloat16_vlm_that_encodes_again_stays_close(train):
    """docs/method.md gives the tolerance: a batch of another size rounds keys and values differently."""

    def to_bfloat16(loaded):
        loaded.policy.to(torch.bfloat16)
        loaded.policy.config.dtype = "bfloat16"

    for storage in ("device", "recompute"):
        run = train(storage, prepare=to_bfloat16, per_device_train_batch_size=8, gradient_accumulation_steps=1)
        errors = [entry["policy/ratio_error_first"] for entry in run.state.log_history if "loss" in entry]
        assert max(errors) < (1e-3 if storage == "device" else 0.05)


def test_lora_refuses_stored_prefixes(small_policy, metaworld_env, tmp_path):
    from peft import LoraConfig

    args = FlowPPOConfig(
        output_dir=str(tmp_path), use_cpu=True, num_envs=4, rollout_chunks=4, per_device_train_batch_size=4,
        eval_episodes=0, prefix_storage="host",
    )  # fmt: skip
    with pytest.raises(ValueError, match="prefix_storage='host' keeps prefixes, and with a trained VLM"):
        FlowPPOTrainer(small_policy(), args, metaworld_env(), peft_config=LoraConfig(r=2))


def test_options_are_checked(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "num_envs": 4, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="prefix_storage='shelf' is not allowed: it must be one of auto, device"):
        FlowPPOConfig(prefix_storage="shelf", **options)
    with pytest.raises(ValueError, match="prefix_storage_dir='/scratch' is not allowed"):
        FlowPPOConfig(prefix_storage="host", prefix_storage_dir="/scratch", **options)

"""Every noise, MDP, critic and option of the method through the real trainers, in a quick environment."""

import json

import pytest
import torch
from transformers import TrainerCallback

from pi_rl import FlowGRPOConfig, FlowGRPOTrainer, FlowPPOConfig, FlowPPOTrainer

ENV, ENV_OPTIONS = "toy:point-mass", {"max_episode_steps": 8, "tolerance": 0.29, "reward": "distance"}
COMMON = {
    "use_cpu": True,
    "seed": 3,
    "num_iterations": 2,
    "num_envs": 8,
    "rollout_chunks": 4,
    "update_epochs": 2,
    "per_device_train_batch_size": 16,
    "noise": "flow_sde",
    "noise_std_min": 0.4,
    "noise_std_max": 1.0,
    "learning_rate": 1e-3,
    "eval_episodes": 0,
    "disable_tqdm": True,
}
PPO, GRPO = (FlowPPOConfig, FlowPPOTrainer), (FlowGRPOConfig, FlowGRPOTrainer)


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.actor_critic.named_parameters()}


def log_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def make(mlp_folder, tmp_path):
    """Makes a trainer; its ``before`` holds the parameters it starts from."""
    made = []

    def build(algorithm=PPO, callbacks=None, env_options=None, **overrides):
        own = {"critic_hidden_sizes": [16]} if algorithm is PPO else {"group_size": 4}
        options = {"output_dir": str(tmp_path / f"run{len(made)}"), **COMMON, **own, **overrides}
        config, trainer_class = algorithm
        trainer = trainer_class(
            str(mlp_folder), config(**options), ENV, {**ENV_OPTIONS, **(env_options or {})}, callbacks=callbacks
        )
        trainer.before = parameters(trainer)
        made.append(trainer)
        return trainer

    yield build
    for trainer in made:
        trainer.close()


@pytest.fixture
def train(make):
    def run(*args, resume=None, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


class StopAfterFirst(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class StopAfterSecond(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= 2


@pytest.mark.parametrize("algorithm", [PPO, GRPO], ids=["ppo", "grpo"])
@pytest.mark.parametrize("mdp", ["one_layer", "two_layer", "hybrid"])
@pytest.mark.parametrize("noise", ["flow_sde", "flow_noise", "flow_cps"])
def test_every_noise_in_every_mdp_trains_on_policy(train, noise, mdp, algorithm):
    trainer = train(algorithm, noise=noise, mdp=mdp)
    steps = {"two_layer": 3 if noise == "flow_cps" else 4}.get(mdp, 1)
    assert trainer.args.samples_per_iteration == 8 * 4 * steps
    assert trainer.state.global_step == 2 * 2 * 2 * steps
    for entry in log_of(trainer):
        assert entry["policy/ratio_error_first"] < 1e-4
        assert all(value == value for value in entry.values() if isinstance(value, float))
    changed = {name for name, value in parameters(trainer).items() if not torch.equal(value, trainer.before[name])}
    assert any(name.startswith("policy.") for name in changed)
    assert any("noise_network" in name for name in changed) == (noise == "flow_noise")
    assert any("value_head" in name for name in trainer.before) == (algorithm is PPO)


@pytest.mark.parametrize("mdp", ["one_layer", "two_layer", "hybrid"])
@pytest.mark.parametrize("hidden", [[], [16, 16]], ids=["one-layer", "three-layer"])
def test_the_expert_critic_regresses_what_the_rollout_estimated(make, mdp, hidden):
    trainer = make(critic="expert", mdp=mdp, critic_hidden_sizes=hidden, update_epochs=1)
    trainer._begin_iteration()
    batch = trainer._buffer.minibatch(torch.arange(len(trainer._buffer)))
    values = trainer.actor_critic.value_head(batch.critic_input)
    torch.testing.assert_close(values, batch.values, rtol=0, atol=1e-6)
    trainer.train()
    assert all("critic/loss" in entry for entry in log_of(trainer))


def test_two_layer_samples_share_their_chunk_and_advantage(make):
    trainer = make(mdp="two_layer")
    trainer._begin_iteration()
    buffer, chunks = trainer._buffer, 8 * 4
    assert len(buffer) == 4 * chunks
    assert len(buffer.inputs) == len(buffer.x) == chunks
    # V_vlm values all denoising states of an observation alike, and nothing is discounted between them
    assert torch.equal(buffer.advantages, buffer.advantages[:, :1].expand(-1, 4))
    batch = buffer.minibatch(torch.tensor([9]))
    assert batch.step_index.tolist() == [1]
    assert torch.equal(batch.x[0], buffer.x[2])


@pytest.mark.parametrize(("level", "units"), [("chunk", 1), ("action", 2), ("element", 4)])
def test_ratios_by_chunk_action_or_element(make, level, units):
    trainer = make(likelihood_level=level)
    trainer._begin_iteration()
    assert trainer._buffer.log_prob.shape == (32, 1, units)
    trainer.train()
    assert log_of(trainer)[0]["policy/ratio_error_first"] < 1e-4


def test_the_stochastic_step_is_drawn_per_sample_or_shared(make):
    indices = {}
    for draw in ("sample", "batch"):
        trainer = make(step_draw=draw)
        rollout = trainer.collector.collect(0)
        indices[draw] = rollout.step_index.view(4, 8)
        assert torch.equal(trainer.collector.collect(0).step_index, rollout.step_index)
    assert all(len(set(row.tolist())) == 1 for row in indices["batch"])
    assert any(len(set(row.tolist())) > 1 for row in indices["sample"])


def test_rollout_epochs_collect_fresh_episodes(make):
    once, twice = make().collector.collect(0), make(rollout_epochs=2).collector.collect(0)
    assert len(twice.x) == 2 * len(once.x)
    assert torch.equal(twice.x[:32], once.x)
    assert not torch.equal(twice.x[32:], once.x)
    assert twice.rewards.shape == (4, 16)
    assert torch.equal(twice.values[..., :8], once.values)
    # executed chunks are ordered by epoch, and of_chunks follows
    marks = torch.arange(4 * 16, dtype=torch.float32).view(4, 16)
    assert twice.of_chunks(marks)[:, 0].tolist() == [
        *marks[:, :8].flatten().tolist(),
        *marks[:, 8:].flatten().tolist(),
    ]


def test_masked_chunks_are_neither_simulated_nor_trained_on(make):
    rollout = make(auto_reset=False, rollout_chunks=6, per_device_train_batch_size=8).collector.collect(0)
    assert not rollout.valid[4:].any()  # 8 steps are 4 chunks of 2
    assert rollout.valid.sum() == len(rollout.x) == len(rollout.inputs)
    assert rollout.statistics.env_steps <= 8 * 8


def test_the_critic_warms_up_alone(train):
    trainer = train(critic_warmup_iterations=2, weight_decay=0.1, noise="flow_noise", num_iterations=3,
                    callbacks=[StopAfterSecond()])  # fmt: skip
    for name, value in parameters(trainer).items():
        assert torch.equal(value, trainer.before[name]) != name.startswith("value_head"), name
    trainer = train(critic_warmup_iterations=1, noise="flow_noise")
    assert not torch.equal(
        parameters(trainer)["noise_network.layers.6.bias"], trainer.before["noise_network.layers.6.bias"]
    )
    assert log_of(trainer)[0]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)


def test_noise_is_annealed_linearly(train):
    trainer = train(num_iterations=3, noise_level=0.9, noise_level_end=0.3)
    assert [entry["policy/noise_level"] for entry in log_of(trainer)] == pytest.approx([0.9, 0.6, 0.3])
    stds = [entry["policy/noise_std"] for entry in log_of(trainer)]
    assert stds[0] > stds[1] > stds[2]


def test_rewards_are_divided_by_the_running_std_of_returns(train, make):
    trainer = train(normalize_rewards=True, num_iterations=3)
    scales = [entry["rollout/reward_scale"] for entry in log_of(trainer)]
    assert all(scale > 0 for scale in scales)
    assert len(set(scales)) == 3
    # the statistics of the environment stay in its own units
    plain = train(num_iterations=1)
    assert log_of(plain)[0]["rollout/return"] == log_of(trainer)[0]["rollout/return"]
    # a thousand times the rewards teach the same, up to the first guess of the critic
    estimates = []
    for factor in (1.0, 1000.0):
        normalised = make(normalize_rewards=True)
        rollout = normalised.collector.collect(0)
        rollout.rewards *= factor
        estimates.append(normalised.estimate(rollout).returns)
    torch.testing.assert_close(estimates[1], estimates[0], rtol=1e-4, atol=1e-4)
    assert estimates[0].abs().max() > 0.1


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (PPO, {"normalize_rewards": True, "mdp": "two_layer", "critic": "expert", "noise_level_end": 0.2}),
        (PPO, {"noise": "flow_noise", "rollout_epochs": 2, "critic_warmup_iterations": 1}),
        (GRPO, {"noise": "flow_noise", "mdp": "hybrid"}),
    ],
    ids=["two-layer", "flow-noise", "grpo"],
)
def test_resume_is_bitwise(train, tmp_path, algorithm, options):
    straight = train(algorithm, output_dir=str(tmp_path / "straight"), **options)
    folder = tmp_path / "stopped"
    kept = {"output_dir": str(folder), "save_every_iterations": 1, **options}
    stopped = train(algorithm, callbacks=[StopAfterFirst()], **kept)
    resumed = train(algorithm, resume=str(folder / f"checkpoint-{stopped.state.global_step}"), **kept)
    for name, value in parameters(straight).items():
        assert torch.equal(parameters(resumed)[name], value), name
    histories = [
        [{k: v for k, v in entry.items() if not k.startswith("time/")} for entry in log_of(trainer)]
        for trainer in (straight, resumed)
    ]
    assert histories[0] == histories[1]


def test_the_order_of_samples_does_not_matter_with_one_minibatch(train, monkeypatch):
    options = {"per_device_train_batch_size": 32, "noise": "flow_noise"}
    first = train(**options)
    monkeypatch.setattr("pi_rl.trainer.flow_trainer.shuffle_seed", lambda *key: 12345)
    other = train(**options)
    for name, value in parameters(first).items():
        torch.testing.assert_close(parameters(other)[name], value, rtol=1e-3, atol=2e-5)


def test_a_global_batch_size_sets_the_accumulation(train):
    whole = train(per_device_train_batch_size=16)
    parts = train(per_device_train_batch_size=4, global_batch_size=16)
    assert parts.args.gradient_accumulation_steps == 4
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name], value, rtol=1e-3, atol=2e-5)


def test_a_group_starts_from_one_state_with_different_noise(make):
    trainer = make(GRPO)
    rollout = trainer.collector.collect(0)
    first = rollout.inputs[torch.arange(8)].pooled  # the normalised states of the first chunk
    assert torch.equal(first[:4], first[:1].expand(4, -1))
    assert torch.equal(first[4:], first[4:5].expand(4, -1))
    assert not torch.equal(first[0], first[4])
    assert len({tuple(x.flatten().tolist()) for x in rollout.x[:8, 0]}) == 8
    assert rollout.groups.tolist() == [0] * 4 + [1] * 4


def test_group_relative_advantages_reach_all_chunks_of_an_episode(make):
    trainer = make(GRPO)
    rollout = trainer.collector.collect(0)
    estimates = trainer.estimate(rollout)
    returns = (rollout.rewards * rollout.valid).sum(0)
    for group in (returns[:4], returns[4:]):
        assert group.std() > 0
    expected = torch.cat([(g - g.mean()) / (g.std() + 1e-6) for g in (returns[:4], returns[4:])])
    torch.testing.assert_close(estimates.advantages, expected.expand(4, 8))
    assert not estimates.normalize
    assert estimates.metrics["groups/informative"] == 1.0


def test_uniform_groups_are_left_out_and_may_be_all_there_is(train, make):
    hopeless = {"tolerance": 0.01, "reward": "success"}  # nobody succeeds
    trainer = train(GRPO, env_options=hopeless)
    for name, value in parameters(trainer).items():
        assert torch.equal(value, trainer.before[name]), name
    assert [entry["groups/informative"] for entry in log_of(trainer)] == [0.0, 0.0]
    assert trainer.state.global_step == 8
    kept = make(GRPO, env_options=hopeless, filter_groups=False)
    kept._begin_iteration()
    assert sum(len(part) for part, _ in kept._micro_batches) == 2 * len(kept._buffer)


def test_a_grpo_checkpoint_has_no_critic(train, tmp_path):
    train(GRPO, num_iterations=1, save_every_iterations=1, output_dir=str(tmp_path / "run"))
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    names = {file.name for file in checkpoint.iterdir()}
    assert "model.safetensors" in names
    assert "critic.safetensors" not in names
    assert json.loads((checkpoint / "rl_state.json").read_text())["iteration"] == 1


def test_torch_compile_changes_nothing_but_rounding(train):
    plain = train()
    compiled = train(torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled.actor_critic.policy.is_compiled
    assert compiled.actor_critic.execution.expert_rows == compiled.args.per_device_train_batch_size
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(compiled)[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("algorithm", "overrides", "message"),
    [
        (PPO, {"mdp": "three_layer"}, "two_layer"),
        (PPO, {"noise": "ode"}, "deterministic, it has no log-prob"),
        (PPO, {"fp16": True}, "use bf16"),
        (PPO, {"noise": "flow_cps", "noise_level_end": 1.2}, "outside"),
        (PPO, {"noise_level_end": 0.2, "num_iterations": 1}, "num_iterations=1"),
        (PPO, {"critic_warmup_iterations": 2}, "below num_iterations=2"),
        (PPO, {"value_loss_coefficient": 0.0}, "trained critic"),
        (PPO, {"vlm_dtype": "bfloat16"}, "about a VLM"),
        (PPO, {"train_vlm": True}, "about a VLM"),
        (PPO, {"gradient_checkpointing": True}, "about a VLM"),
        (PPO, {"attn_implementation": "sdpa"}, "about a VLM"),
        (PPO, {"attn_implementation": "flash"}, "one of eager, sdpa"),
        (PPO, {"train_vlm": True, "vlm_dtype": "bfloat16"}, "float32 masters"),
        (PPO, {"mdp": "hybrid", "joint_reduction": "mean"}, "joint_reduction"),
        (PPO, {"denoising_lambda": 0.5}, "no effect with mdp 'hybrid'"),
        (PPO, {"critic": "image"}, "vlm or expert"),
        (PPO, {"global_batch_size": 24}, "not a multiple of 16"),
        (PPO, {"global_batch_size": 32, "gradient_accumulation_steps": 4}, "contradict"),
        (PPO, {"noise": "flow_noise", "noise_level_end": 0.1}, "noise_level_end"),
        (PPO, {"noise": "flow_cps", "denoising_steps": 1}, "leaves no stochastic step"),
        (PPO, {"likelihood_level": "token"}, "element"),
        (PPO, {"rollout_epochs": 0}, "rollout_epochs=0"),
        (GRPO, {"group_size": 1}, "group_size=1"),
        (GRPO, {"group_size": 3}, "use 6 or 9"),
        (GRPO, {"auto_reset": True}, "auto_reset"),
    ],
)
def test_options_that_mean_nothing_are_refused_with_the_reason(make, algorithm, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(algorithm, **overrides)


def test_a_dry_run_updates_with_the_runs_own_batch(make):
    shrunk = make(dry_run=True, per_device_train_batch_size=4, global_batch_size=16).args
    assert (shrunk.per_device_train_batch_size, shrunk.gradient_accumulation_steps) == (4, 2)
    grpo = make(GRPO, dry_run=True, env_options={"tolerance": 0.01, "reward": "success"})
    grpo.train()
    assert "policy/ratio_error_first" in log_of(grpo)[0]


def test_configuration_and_trainer_must_belong_together(mlp_folder, tmp_path):
    args = FlowPPOConfig(**{**COMMON, "output_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="FlowGRPOTrainer takes a FlowGRPOConfig, got a FlowPPOConfig"):
        FlowGRPOTrainer(str(mlp_folder), args, ENV, ENV_OPTIONS)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((PPO, {"normalize_rewards": True}), (PPO, {}), "had normalize_rewards=true"),
        ((PPO, {}), (PPO, {"normalize_rewards": True}), "had normalize_rewards=false"),
        ((PPO, {}), (GRPO, {}), "of a PPO run, this one is GRPO"),
    ],
)
def test_resume_with_another_method_is_refused(train, tmp_path, first, second, message):
    folder = {"output_dir": str(tmp_path / "run"), "save_every_iterations": 1}
    train(first[0], callbacks=[StopAfterFirst()], **folder, **first[1])
    with pytest.raises(ValueError, match=message):
        train(second[0], resume=str(tmp_path / "run" / "checkpoint-4"), **folder, **second[1])

"""Modes, ratio one, optimizer groups."""

import pytest
import torch

from pi_rl.flow.chain import Chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import load_heads, load_policy, save_heads, save_policy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.prefix_cache import PrefixStore

NOISES = ["flow_sde", "flow_noise", "flow_cps"]


@pytest.mark.parametrize("noise", NOISES)
def test_ratio_is_one_in_train_mode(policy, batch, toolbox, noise):
    actor_critic = toolbox.make_actor_critic(policy, noise)
    actor_critic.eval()
    prefix = actor_critic("encode", batch=batch)
    chain, log_prob = toolbox.draw(actor_critic, prefix)
    actor_critic.train()
    score, _ = actor_critic("score", inputs=actor_critic("encode", batch=batch), chain=chain)
    assert not log_prob.requires_grad
    assert score.log_prob.requires_grad
    torch.testing.assert_close((score.log_prob - log_prob).exp(), torch.ones(4, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", NOISES)
def test_ratio_is_one_after_save_and_load(loaded, policy, batch, toolbox, noise, tmp_path):
    actor_critic = toolbox.make_actor_critic(policy, noise)
    with torch.no_grad():
        for parameter in actor_critic.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # also the heads' zeros
    prefix = actor_critic("encode", batch=batch)
    chain, log_prob = toolbox.draw(actor_critic, prefix)
    values = actor_critic("value", prefix=prefix)
    save_policy(tmp_path / "p", loaded.policy, loaded.preprocessor, loaded.postprocessor)
    save_heads(tmp_path / "p", actor_critic)
    again = toolbox.make_actor_critic(PiFlowPolicy(load_policy(tmp_path / "p").policy), noise, seed=9)
    load_heads(tmp_path / "p", again)
    prefix = again("encode", batch=batch)
    score, new_values = again("score", inputs=prefix, chain=chain, critic_input=again.value_head.observe(prefix))
    torch.testing.assert_close((score.log_prob - log_prob).exp(), torch.ones(4, 1), rtol=0, atol=1e-4)
    assert torch.equal(new_values, values)


def test_a_shuffled_minibatch_from_the_store_scores_to_one(policy, batch, toolbox):
    actor_critic = toolbox.make_actor_critic(policy)
    store, prefix = PrefixStore(), actor_critic("encode", batch=batch)
    store.append(prefix)
    chain, log_prob = toolbox.draw(actor_critic, prefix)
    rows = torch.tensor([3, 1])
    part = type(chain)(chain.x[rows], chain.step_index[rows])
    score, _ = actor_critic("score", inputs=store[rows], chain=part)
    torch.testing.assert_close((score.log_prob - log_prob[rows]).exp(), torch.ones(2, 1), rtol=0, atol=1e-4)


def test_unscored_elements_follow_the_ode(policy, batch, toolbox):
    mask = policy.scored_mask()
    assert mask.shape == (toolbox.horizon, policy.max_action_dim)
    assert mask.sum() == toolbox.executed * toolbox.action_dim
    assert mask[: toolbox.executed, : toolbox.action_dim].all()


def test_values_are_float32_under_autocast(policy, batch, toolbox):
    actor_critic = toolbox.make_actor_critic(policy, "flow_noise")
    prefix = actor_critic("encode", batch=batch)
    plain = actor_critic("value", prefix=prefix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(actor_critic("value", prefix=prefix), plain)
        chain, log_prob = toolbox.draw(actor_critic, prefix)
        score, _ = actor_critic("score", inputs=prefix, chain=chain)
    assert plain.dtype == log_prob.dtype == score.log_prob.dtype == torch.float32
    assert plain.abs().max() < 0.5
    torch.testing.assert_close((score.log_prob - log_prob).exp(), torch.ones(4, 1), rtol=0, atol=1e-4)


def test_value_head_sizes(policy, batch, toolbox):
    head = ValueHead(policy)
    widths = [module.out_features for module in head.layers if hasattr(module, "out_features")]
    assert widths == [1024, 512, 256, 1]
    assert ValueHead(policy, ()).layers[0].in_features == policy.pooled_dim + policy.prefix_state_dim
    with pytest.raises(ValueError, match="hidden_sizes"):
        ValueHead(policy, (0,))
    prefix = policy.encode_prefix(batch)
    prefix.state = torch.zeros(4, 99)
    with pytest.raises(ValueError, match="built for a state"):
        head.observe(prefix)


def test_noise_network_must_fit_the_sampler(policy, toolbox):
    network = NoiseNetwork(policy.feature_dim, policy.max_action_dim, 0.1, 0.2)
    sde, learned = (toolbox.make_actor_critic(policy, noise).sampler for noise in ("flow_sde", "flow_noise"))
    with pytest.raises(ValueError, match="none was given"):
        FlowActorCritic(policy, ValueHead(policy), None, learned)
    with pytest.raises(ValueError, match="one was given"):
        FlowActorCritic(policy, ValueHead(policy), network, sde)


def test_unknown_mode_and_no_config(policy, toolbox):
    actor_critic = toolbox.make_actor_critic(policy)
    assert not hasattr(actor_critic, "config")
    with pytest.raises(ValueError, match="encode"):
        actor_critic("act")


def test_parameter_groups_cover_everything_trainable_once(policy, toolbox):
    actor_critic = toolbox.make_actor_critic(policy, "flow_noise")
    groups = {group["name"]: group for group in actor_critic.parameter_groups(1e-4, 1e-3, 0.1)}
    assert set(groups) == {"actor", "actor_no_decay", "critic", "critic_no_decay"}
    for name, group in groups.items():
        assert group["lr"] == (1e-3 if name.startswith("critic") else 1e-4)
        assert group["weight_decay"] == (0.0 if name.endswith("no_decay") else 0.1)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in actor_critic.parameters() if p.requires_grad}
    names = {id(p): name for name, p in actor_critic.named_parameters()}
    undecayed = [names[id(p)] for p in groups["actor_no_decay"]["params"]]
    assert all("norm" in name or name.endswith("bias") for name in undecayed)
    assert any("layernorm" in name for name in undecayed)
    decayed = [names[id(p)] for p in groups["actor"]["params"]]
    assert not any(name.endswith("bias") or "norm." in name for name in decayed)
    torch.optim.AdamW(groups.values())


@pytest.mark.parametrize("mdp", ["one_layer", "two_layer", "hybrid"])
@pytest.mark.parametrize("critic", ["vlm", "expert"])
def test_rollout_and_update_use_one_value_estimator(policy, batch, toolbox, critic, mdp):
    """Eq. 16 averages over the whole denoising trajectory, also when the update scores a single step of it."""
    torch.manual_seed(0)
    head = ValueHead(policy, (16,), critic)
    sampler = FlowSampler("flow_sde", mdp, toolbox.steps, 0.5)
    actor_critic = FlowActorCritic(policy, head, None, sampler)
    prefix = actor_critic("encode", batch=batch)
    noise = toolbox.noise(actor_critic, 4)
    sample = actor_critic("sample", prefix=prefix, **noise)
    assert sample.values.shape == (4, sampler.transitions)
    entries = head.per_entry(sample.critic_input)
    if critic == "expert":
        assert sample.critic_input.shape == (4, toolbox.steps, policy.feature_dim)
    if mdp == "two_layer" and critic == "expert":
        torch.testing.assert_close(sample.values, entries)
        assert sample.values.std(1).min() > 0
    else:
        torch.testing.assert_close(sample.values, entries.mean(1, keepdim=True).expand_as(sample.values))
    first = actor_critic("value", prefix=prefix, **noise)
    torch.testing.assert_close(first, sample.values[:, 0], rtol=0, atol=1e-6)
    _, values = actor_critic(
        "score",
        inputs=prefix,
        chain=Chain(sample.chain.x, torch.zeros(4, dtype=torch.int64) if mdp != "one_layer" else None),
        critic_input=sample.critic_input[:, :1] if actor_critic.critic_per_step else sample.critic_input,
    )
    torch.testing.assert_close(values, sample.values[:, 0], rtol=0, atol=1e-6)
    values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_without_a_critic_there_are_no_values(policy, batch, toolbox):
    actor_critic = FlowActorCritic(policy, None, None, FlowSampler("flow_sde", "hybrid", toolbox.steps, 0.5))
    prefix = actor_critic("encode", batch=batch)
    sample = actor_critic("sample", prefix=prefix, **toolbox.noise(actor_critic, 4))
    assert sample.values is None
    assert actor_critic("score", inputs=prefix, chain=sample.chain)[1] is None
    with pytest.raises(ValueError, match="no critic"):
        actor_critic("value", prefix=prefix)
    with pytest.raises(ValueError, match="choose one of vlm, expert"):
        ValueHead(policy, (16,), "image")

"""The adapter computes what LeRobot computes, and only the expert learns."""

import pytest
import torch
from accelerate import init_empty_weights
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.lora import add_lora, lora_parameters, vlm_lora_config
from pi_rl.policies.pi import PiFlowPolicy


def noise_and_time(policy, samples=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, policy.chunk_size, policy.max_action_dim, generator=generator)
    return x, torch.linspace(1.0, 0.1, samples)


def lerobot_velocity(policy, prefix, x, t):
    cache = DynamicCache([(layer[0], layer[1]) for layer in prefix.kv])
    state = {} if prefix.state is None else {"state": prefix.state}
    return policy.policy.model.denoise_step(
        prefix_pad_masks=prefix.pad_mask, past_key_values=cache, x_t=x, timestep=t, **state
    )


def test_velocity_is_lerobots_denoise_step(policy, batch):
    prefix = policy.encode_prefix(batch)
    x, t = noise_and_time(policy)
    u, features = policy.velocity(prefix, x, t)
    assert torch.equal(u, lerobot_velocity(policy, prefix, x, t))
    assert features.shape == (4, policy.chunk_size, policy.feature_dim)
    torch.testing.assert_close(policy.policy.model.action_out_proj(features), u)


def test_ode_is_lerobots_action_chunk(policy, batch, toolbox):
    x, _ = noise_and_time(policy)
    for steps in (1, toolbox.steps, 10):
        expected = policy.policy.predict_action_chunk(batch, noise=x, num_steps=steps)
        actor_critic = toolbox.make_actor_critic(policy)
        actions = actor_critic("ode", prefix=policy.encode_prefix(batch), x_init=x, denoising_steps=steps)
        torch.testing.assert_close(actions[..., : toolbox.action_dim], expected, atol=2e-5, rtol=1e-5)


def test_default_ode_steps_are_the_samplers(policy, batch, toolbox):
    x, _ = noise_and_time(policy)
    actor_critic = toolbox.make_actor_critic(policy)
    prefix = policy.encode_prefix(batch)
    default = actor_critic("ode", prefix=prefix, x_init=x)
    assert torch.equal(default, actor_critic("ode", prefix=prefix, x_init=x, denoising_steps=toolbox.steps))


def test_prefix_shapes_and_pooling(policy, batch, toolbox):
    prefix = policy.encode_prefix(batch)
    config = policy.policy.config
    tokens = 2 * (32 // 16) ** 2 + config.tokenizer_max_length
    assert prefix.kv.shape == (config.depth, 2, 4, 1, tokens, config.head_dim)
    assert prefix.pooled.shape == (4, policy.pooled_dim)
    assert prefix.pooled.dtype == torch.float32
    assert (prefix.state is None) == (policy.prefix_state_dim == 0)
    assert not prefix.pad_mask.all()
    shuffled = {**batch, "observation.language.tokens": batch["observation.language.tokens"].clone()}
    padding = ~batch["observation.language.attention_mask"]
    shuffled["observation.language.tokens"][padding] = 7
    torch.testing.assert_close(policy.encode_prefix(shuffled).pooled, prefix.pooled)


def test_one_sample_alone_is_the_same_as_in_a_batch(policy, batch):
    prefix = policy.encode_prefix(batch)
    x, t = noise_and_time(policy)
    u, _ = policy.velocity(prefix, x, t)
    for i in range(4):
        alone = prefix.index(torch.tensor([i]))
        torch.testing.assert_close(policy.velocity(alone, x[i : i + 1], t[i : i + 1])[0], u[i : i + 1])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(policy.velocity(prefix.index(order), x[order], t[order])[0], u[order])
    pieces = [prefix.index(torch.tensor([i])) for i in range(4)]
    assert torch.equal(policy.velocity(Prefix.cat(pieces), x, t)[0], u)


def test_recomputing_a_prefix_is_bitwise(policy, batch):
    first, policy_mode = policy.encode_prefix(batch), policy.train()
    second = policy_mode.encode_prefix(batch)
    for (_, a), (_, b) in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)
    assert not first.kv.requires_grad


def test_dropping_padding_and_empty_cameras_changes_nothing(policy, batch):
    x, t = noise_and_time(policy)
    full = policy.encode_prefix(batch)
    longest = int(batch["observation.language.attention_mask"].sum(1).max())
    policy.language_tokens = longest
    short = policy.encode_prefix(batch)
    assert short.kv.shape[4] < full.kv.shape[4]
    torch.testing.assert_close(policy.velocity(short, x, t)[0], policy.velocity(full, x, t)[0], atol=1e-5, rtol=1e-5)
    policy.language_tokens = longest - 1
    with pytest.raises(ValueError, match="more than language_tokens"):
        policy.encode_prefix(batch)


def test_an_empty_camera_is_left_out(policy, batch):
    x, t = noise_and_time(policy)
    before = policy.encode_prefix(batch)
    policy.policy.config.empty_cameras = 1
    policy.policy.config.validate_features()
    assert policy.encode_prefix(batch).kv.shape == before.kv.shape
    expected = policy.policy.predict_action_chunk(batch, noise=x, num_steps=1)
    euler = x - policy.velocity(before, x, torch.ones(4))[0]
    torch.testing.assert_close(euler[..., : expected.shape[-1]], expected, atol=1e-5, rtol=1e-5)


def test_missing_inputs_are_named(policy, batch, toolbox):
    for key in (toolbox.cameras[1], "observation.language.tokens"):
        with pytest.raises(ValueError, match=key.split(".")[-1]):
            policy.encode_prefix({name: value for name, value in batch.items() if name != key})


def test_time_matters_before_training(policy, batch):
    prefix = policy.encode_prefix(batch)
    x, _ = noise_and_time(policy)
    early, late = (policy.velocity(prefix, x, torch.full((4,), t))[0] for t in (0.9, 0.1))
    assert (early - late).abs().mean() > 0.05


def learning(name):
    return ".paligemma." not in name and "gemma_expert.lm_head" not in name


def test_freezing(policy):
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == learning(name), name
    policy.train()
    backbone = policy.policy.model.paligemma_with_expert
    assert not any(module.training for module in backbone.paligemma.modules())
    assert backbone.gemma_expert.training
    assert sum(p.numel() for p in policy.trainable_parameters()) == sum(
        p.numel() for n, p in policy.named_parameters() if learning(n)
    )


@pytest.mark.parametrize("noise", ["flow_sde", "flow_noise", "flow_cps"])
def test_gradients_reach_expert_and_heads_only(policy, batch, toolbox, noise):
    actor_critic = toolbox.make_actor_critic(policy, noise)
    prefix = actor_critic("encode", batch=batch)
    chain, _ = toolbox.draw(actor_critic, prefix)
    critic_input = actor_critic.value_head.observe(prefix)
    score, values = actor_critic("score", inputs=prefix, chain=chain, critic_input=critic_input)
    (score.log_prob.sum() + values.sum() + score.entropy.sum()).backward()
    with_gradient = {name for name, p in actor_critic.named_parameters() if p.grad is not None}
    expected = {name for name, _ in actor_critic.named_parameters() if learning(name)}
    # one learned-noise layer above a zero-initialised head still gets a gradient tensor, of zeros
    assert with_gradient == expected
    moving = {n for n, p in actor_critic.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"policy.policy.model.action_out_proj.weight", "policy.policy.model.action_in_proj.weight"} <= moving
    assert any("gemma_expert.model.layers.0" in name for name in moving)
    assert "value_head.layers.2.weight" in moving


def test_values_send_no_gradient_to_the_policy(policy, batch, toolbox):
    add_lora(policy, vlm_lora_config(rank=2))
    actor_critic = toolbox.make_actor_critic(policy)
    prefix = actor_critic("encode", batch=batch)
    assert prefix.pooled.requires_grad
    actor_critic.value_head(actor_critic.value_head.observe(prefix)).sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert all(p.grad is not None for p in actor_critic.value_head.parameters())


def test_checkpointed_layers_give_the_same_gradient(policy, batch):
    prefix = policy.encode_prefix(batch)
    x, t = noise_and_time(policy)
    policy.velocity(prefix, x, t)[0].pow(2).sum().backward()
    plain = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    u = checkpoint(lambda x, t: policy.velocity(prefix, x, t)[0], x, t, use_reentrant=False)
    u.pow(2).sum().backward()
    for name, gradient in plain.items():
        assert torch.equal(policy.get_parameter(name).grad, gradient), name


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="PI0Policy or PI05Policy"):
        PiFlowPolicy(nn.Linear(1, 1))


@pytest.mark.parametrize(("kind", "billions", "expert"), [("pi0", 4.028, 0.314), ("pi05", 4.143, 0.430)])
def test_published_size_and_its_split(kind, billions, expert):
    features = {
        "input_features": {
            "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
    }
    config = make_policy_config(kind, device="cpu", dtype="bfloat16", **features)
    config.device = None
    with init_empty_weights(include_buffers=False):
        policy = PiFlowPolicy(get_policy_class(kind)(config))
    policy.freeze_vlm()
    assert all(p.is_meta for p in policy.parameters())
    assert sum(p.numel() for p in policy.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert sum(p.numel() for p in policy.trainable_parameters()) / 1e9 == pytest.approx(expert, abs=2e-3)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.named_parameters() if learning(n)
    }
    assert (policy.chunk_size, policy.action_dim, policy.max_action_dim) == (50, 7, 32)
    assert (policy.feature_dim, policy.pooled_dim) == (1024, 2048)
    without = len(policy.trainable_parameters())
    with init_empty_weights(include_buffers=False):
        add_lora(policy, vlm_lora_config())
    # 17 language layers of 7, keys and values of the last one, 27 vision layers of 6
    assert len(policy.trainable_parameters()) - without == 2 * (17 * 7 + 2 + 27 * 6)
    assert sum(p.numel() for p in lora_parameters(policy)) == 54_582_272
    assert {p.dtype for p in lora_parameters(policy)} == {torch.float32}

"""Numeric type and rows per pass change rounding and nothing else; rollout and update compute alike."""

import copy

import pytest
import torch

from pi_rl.flow.chain import Chain
from pi_rl.policies.execution import Execution, encode_in_passes, row_slices, velocity_in_passes
from pi_rl.policies.lora import add_lora, vlm_lora_config
from pi_rl.policies.pi import PiFlowPolicy

BF16 = torch.bfloat16


def test_rows_of_passes():
    assert row_slices(4, None, "cpu") is None
    assert row_slices(4, 4, "cpu") is None
    assert [part.tolist() for part in row_slices(5, 2, "cpu")] == [[0, 1], [2, 3], [4, 0]]
    assert [part.tolist() for part in row_slices(2, 5, "cpu")] == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("settings", [{"expert_rows": 0}, {"encode_rows": -1}, {"compute_dtype": torch.float16}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Execution(**settings)


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_passes_of_fixed_rows_give_every_sample_its_own_result(policy, batch, rows):
    sizes = []

    def counted(batch):
        sizes.append(len(batch["observation.state"]))
        return policy.encode_prefix(batch)

    whole, divided = policy.encode_prefix(batch), encode_in_passes(counted, batch, rows)
    assert set(sizes) == {rows}
    for (_, a), (_, b) in zip(whole.tensors(), divided.tensors(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    x, t = torch.randn(4, policy.chunk_size, policy.max_action_dim), torch.linspace(1.0, 0.1, 4)
    sizes.clear()

    def velocity(prefix, x, t):
        sizes.append((len(prefix), len(x), len(t)))
        return policy.velocity(prefix, x, t)

    outputs = velocity_in_passes(velocity, whole, rows)(x, t)
    assert set(sizes) == {(rows,) * 3}
    for a, b in zip(policy.velocity(whole, x, t), outputs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def first_ratio_error(actor_critic, batch, toolbox, live=False, minibatch=3):
    """Acts on the whole batch and scores a shuffled part of it, as rollout and first minibatch do."""
    prefix = actor_critic("encode", batch=batch)
    chain, log_prob = toolbox.draw(actor_critic, prefix)
    rows = torch.tensor([2, 0, 3])[:minibatch]
    inputs = prefix.index(rows)
    if live:
        inputs = {name: value[rows] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    step_index = None if chain.step_index is None else chain.step_index[rows]
    score, _ = actor_critic("score", inputs=inputs, chain=Chain(chain.x[rows], step_index))
    score.log_prob.sum().backward()
    return (score.log_prob - log_prob[rows]).exp().sub(1).abs().max().item()


@pytest.mark.parametrize("noise", ["flow_sde", "flow_noise"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_first_ratio_is_one_in_bfloat16(policy, batch, toolbox, noise, attention):
    policy.attention = attention
    policy.cast_vlm(BF16)
    actor_critic = toolbox.make_actor_critic(policy, noise)
    actor_critic.execution = Execution(BF16, expert_rows=3)
    prefix = actor_critic("encode", batch=batch)
    assert prefix.kv.dtype == BF16
    assert first_ratio_error(actor_critic, batch, toolbox) < 1e-4
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert {p.grad.dtype for p in policy.trainable_parameters()} == {torch.float32}


def test_the_first_ratio_is_one_with_a_live_prefix_in_bfloat16(policy, batch, toolbox):
    policy.attention = "sdpa"
    policy.cast_vlm(BF16)
    add_lora(policy, vlm_lora_config(rank=2))
    actor_critic = toolbox.make_actor_critic(policy)
    actor_critic.execution = Execution(BF16, expert_rows=3, encode_rows=1)
    assert first_ratio_error(actor_critic, batch, toolbox, live=True) < 1e-4


def test_bfloat16_is_close_to_float32(policy, batch, toolbox):
    x = torch.randn(4, policy.chunk_size, policy.max_action_dim)
    actions = []
    for execution in (Execution(), Execution(BF16, expert_rows=4)):
        actor_critic = toolbox.make_actor_critic(policy)
        actor_critic.execution = execution
        prefix = actor_critic("encode", batch=batch)
        actions.append(actor_critic("ode", prefix=prefix, x_init=x))
    assert 0 < (actions[0] - actions[1]).abs().max() < 0.05 * actions[0].abs().max()


@pytest.mark.parametrize("live", [False, True])
def test_checkpointed_activations_change_neither_gradients_nor_names(policy, batch, toolbox, live):
    if live:
        policy.train_vlm()
    names = list(policy.policy.state_dict())
    plain, saved = toolbox.make_actor_critic(copy.deepcopy(policy)), toolbox.make_actor_critic(policy)
    saved.gradient_checkpointing_enable()
    saved.gradient_checkpointing_enable()  # a second call wraps nothing twice
    assert list(policy.policy.state_dict()) == names
    kept = []
    for actor_critic in (plain, saved):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.setdefault(id(t), t), lambda t: t):
            inputs = batch if live else actor_critic("encode", batch=batch)
            prefix = actor_critic("encode", batch=batch)
            chain, _ = toolbox.draw(actor_critic, prefix)
            score, _ = actor_critic("score", inputs=inputs, chain=chain)
        kept.append(sum(t.nbytes for t in held.values()))
        score.log_prob.sum().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (plain, saved)]
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    assert kept[1] < 0.7 * kept[0]


def test_compiled_passes_act_and_score_alike(policy, batch, toolbox):
    plain = toolbox.make_actor_critic(copy.deepcopy(policy))
    policy.compile_velocity(backend="aot_eager")
    compiled = toolbox.make_actor_critic(policy)
    plain.execution = compiled.execution = Execution(expert_rows=3)
    assert first_ratio_error(compiled, batch, toolbox) < 1e-5
    assert first_ratio_error(plain, batch, toolbox) < 1e-5
    for (name, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_inductor_acts_and_scores_alike_in_bfloat16(policy, batch, toolbox):
    policy.attention = "sdpa"
    policy.cast_vlm(BF16)
    policy.compile_velocity()
    actor_critic = toolbox.make_actor_critic(policy)
    actor_critic.execution = Execution(BF16, expert_rows=3)
    assert first_ratio_error(actor_critic, batch, toolbox) < 1e-4


def test_the_last_layer_stops_where_nobody_reads_it(policy, batch):
    whole, keys = policy.encode_prefix(batch), policy.encode_prefix(batch, pooled=False)
    assert keys.pooled is None
    assert torch.equal(whole.kv, keys.kv)
    last = policy.policy.model.paligemma_with_expert.paligemma.model.language_model.layers[-1]
    ran = []
    for part in (last.mlp, last.self_attn.o_proj, last.self_attn.q_proj, last.self_attn.k_proj):
        part.register_forward_hook(lambda module, *_: ran.append(module))
    policy.encode_prefix(batch, pooled=False)
    assert ran == [last.self_attn.k_proj]


def test_full_fine_tuning_reaches_everything_that_is_read(policy, batch, toolbox):
    policy.park_language_heads()
    policy.train_vlm()
    assert policy.prefix_is_live
    actor_critic = toolbox.make_actor_critic(policy)
    chain, _ = toolbox.draw(actor_critic, actor_critic("encode", batch=batch))
    score, _ = actor_critic("score", inputs=batch, chain=chain)
    score.log_prob.sum().backward()
    without = [name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {name.split("language_model.")[-1] for name, p in policy.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"layers", "norm"}
    moving = [name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("vision_tower" in name for name in moving)
    assert any("embed_tokens" in name for name in moving)
    assert isinstance(policy, PiFlowPolicy)

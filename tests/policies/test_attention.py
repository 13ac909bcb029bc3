"""Fused attention with one key-value head equals the definition, and LeRobot's policies through it."""

import math

import pytest
import torch

from pi_rl.policies.attention import fold_mask, folded_attention
from pi_rl.policies.pi import PiFlowPolicy

B, HEADS, T, S, SIZE = 3, 8, 5, 11, 16


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    # the layout that Gemma's projections give: tokens before heads in memory
    return normal(B, T, HEADS, SIZE).transpose(1, 2), normal(B, 1, S, SIZE), normal(B, 1, S, SIZE)


def visible_tokens():
    mask = torch.ones(B, T, S, dtype=torch.bool)
    mask[1, :, 7:9] = False
    mask[2, 0, 6:] = False
    return mask


@pytest.mark.parametrize("rows", ["each", "alike"])
def test_it_is_softmax_attention_with_shared_keys(rows):
    query, key, value = tensors()
    visible = visible_tokens() if rows == "each" else visible_tokens()[:, 1:2]
    scores = torch.einsum("bhtd,bsd->bhts", query, key[:, 0]) / math.sqrt(SIZE)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bsd->bthd", weights, value[:, 0])
    mask = fold_mask(visible, HEADS, torch.float64)
    output, _ = folded_attention(None, query, key, value, mask, scaling=SIZE**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(B, T, HEADS, SIZE, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * direction).sum(), (query, key, value)) for out in (output, expected)]
    for fused, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, exact, rtol=1e-10, atol=1e-12)


def test_masked_tokens_have_no_effect_at_all():
    query, key, value = tensors(torch.float32)
    mask = fold_mask(visible_tokens(), HEADS, torch.float32)
    before, _ = folded_attention(None, query, key, value, mask, scaling=0.25)
    other = value.detach().clone()
    other[1, :, 7:9] = 1e6
    after, _ = folded_attention(None, query, key, other, mask, scaling=0.25)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(folded_attention(None, query, key, other, None, scaling=0.25)[0][1], before[1])


def test_a_mask_of_rows_alike_is_not_repeated_and_rows_are_aligned():
    mask = fold_mask(visible_tokens()[:, :1], HEADS, torch.bfloat16)
    assert mask.shape == (B, 1, 1, S)
    each = fold_mask(visible_tokens(), HEADS, torch.bfloat16)
    assert each.shape == (B, 1, T * HEADS, S)
    assert each.stride(2) % 16 == 0


def test_a_policy_computes_the_same_with_both(policy, batch):
    x = torch.randn(4, policy.chunk_size, policy.max_action_dim)
    t = torch.linspace(1.0, 0.1, 4)
    fused = PiFlowPolicy(policy.policy, attention="sdpa")
    fused.freeze_vlm()
    results = []
    for wrapped in (policy, fused):
        prefix = wrapped.encode_prefix(batch)
        u, tokens = wrapped.velocity(prefix, x, t)
        wrapped.zero_grad()
        u.pow(2).sum().backward()
        gradient = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
        valid = prefix.pad_mask[None, None, :, None, :, None]
        results.append({"kv": prefix.kv * valid, "pooled": prefix.pooled, "u": u, "tokens": tokens, **gradient})
    assert len(results[0]) > 20
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=2e-5)
    assert not torch.equal(results[0]["u"], results[1]["u"])  # other kernels were really used


def test_unknown_attention_is_refused(policy):
    with pytest.raises(ValueError, match="eager"):
        PiFlowPolicy(policy.policy, attention="flash")

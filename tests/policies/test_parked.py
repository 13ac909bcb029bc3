"""Parked heads: out of the way of training, there in every state dict, unchanged."""

import copy

import pytest
import torch
from torch import nn

from pi_rl.policies.checkpoints import load_policy, save_policy
from pi_rl.policies.parked import ParkedHead, park_linear

HEADS = (
    "model.paligemma_with_expert.paligemma.lm_head.weight",
    "model.paligemma_with_expert.gemma_expert.lm_head.weight",
)


def test_the_policy_computes_the_same_without_its_heads(policy, batch):
    x, t = torch.randn(4, policy.chunk_size, policy.max_action_dim), torch.full((4,), 0.5)
    before = policy.velocity(policy.encode_prefix(batch), x, t)[0]
    count, state = sum(p.numel() for p in policy.parameters()), copy.deepcopy(policy.policy.state_dict())
    freed = policy.park_language_heads()
    assert freed == 4 * (count - sum(p.numel() for p in policy.parameters())) > 0
    assert torch.equal(policy.velocity(policy.encode_prefix(batch), x, t)[0], before)
    assert list(policy.policy.state_dict()) == list(state)
    for name, value in policy.policy.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert policy.park_language_heads() == 0


def test_a_saved_policy_has_its_heads_back_bit_for_bit(loaded, policy, tmp_path):
    for name in HEADS:
        loaded.policy.get_parameter(name).data.normal_()
    heads = {name: loaded.policy.state_dict()[name].clone() for name in HEADS}
    policy.park_language_heads()
    save_policy(tmp_path / "saved", loaded.policy, loaded.preprocessor, loaded.postprocessor)
    again = load_policy(tmp_path / "saved").policy
    for name, weight in heads.items():
        assert torch.equal(again.get_parameter(name), weight), name


def test_nothing_that_trains_or_moves_sees_it():
    owner = nn.Module()
    owner.lm_head = nn.Linear(3, 5, bias=False)
    weight = owner.lm_head.weight.detach().clone()
    park_linear(owner, "lm_head")
    assert isinstance(owner.lm_head, ParkedHead)
    assert not list(owner.parameters())
    assert not list(owner.buffers())
    owner.to("meta", torch.bfloat16).requires_grad_(False).eval()
    assert torch.equal(owner.state_dict()["lm_head.weight"], weight)
    assert torch.equal(copy.deepcopy(owner).state_dict()["lm_head.weight"], weight)


def test_loading_is_strict():
    owner = nn.Module()
    owner.lm_head = ParkedHead(torch.zeros(2, 3))
    owner.load_state_dict({"lm_head.weight": torch.ones(2, 3)})
    assert torch.equal(owner.state_dict()["lm_head.weight"], torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="Missing key"):
        owner.load_state_dict({})
    with pytest.raises(RuntimeError, match="instead of"):
        owner.load_state_dict({"lm_head.weight": torch.ones(3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        owner.load_state_dict({"lm_head.weight": torch.ones(2, 3), "lm_head.bias": torch.ones(2)})

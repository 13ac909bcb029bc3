"""One place knows which LeRobot policies can be fine-tuned."""

import pytest
import torch

from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.mlp.create import create_mlp_policy
from pi_rl.policies.mlp.flow_policy import MlpFlowPolicy
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.wrap import supported_config_types, wrap_policy


def test_pi_policies_are_wrapped(loaded):
    wrapped = wrap_policy(loaded.policy)
    assert isinstance(wrapped, PiFlowPolicy)
    assert wrapped.policy is loaded.policy


def test_mlp_policies_are_wrapped(tmp_path):
    folder = create_mlp_policy(
        state_dim=2, action_dim=1, chunk_size=1, n_action_steps=1, denoising_steps=2, output_dir=tmp_path / "p", seed=0
    )
    wrapped = wrap_policy(load_policy(folder).policy)
    assert isinstance(wrapped, MlpFlowPolicy)


def test_the_supported_types_are_listed_and_others_refused():
    assert supported_config_types() == ["flow_mlp", "pi0", "pi05", "pi05_small", "pi0_small"]
    with pytest.raises(ValueError, match="A Linear cannot be fine-tuned .* flow_mlp, pi0, pi05, pi05_small, pi0_sma"):
        wrap_policy(torch.nn.Linear(1, 1))

"""One place knows which LeRobot policies can be fine-tuned."""

import pytest
import torch

from pi_rl.policies import wrap
from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig
from pi_rl.policies.mlp.create import create_mlp_policy
from pi_rl.policies.mlp.flow_policy import MlpFlowPolicy
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.wrap import register_flow_policy, supported_config_types, wrap_policy


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


@pytest.fixture
def registered():
    """Undoes what a test registers."""
    before = dict(wrap._WRAPPERS)
    yield
    wrap._WRAPPERS.clear()
    wrap._WRAPPERS.update(before)


def test_a_registered_wrapper_is_used_for_its_type_and_no_other(registered, loaded, tmp_path):
    class Wrapped(MlpFlowPolicy):
        pass

    folder = create_mlp_policy(
        state_dim=2, action_dim=1, chunk_size=1, n_action_steps=1, denoising_steps=2, output_dir=tmp_path / "p", seed=0
    )
    with pytest.raises(ValueError, match="FlowMLPConfig has a flow policy already"):
        register_flow_policy(FlowMLPConfig, Wrapped)
    del wrap._WRAPPERS[FlowMLPConfig]
    assert "flow_mlp" not in supported_config_types()
    with pytest.raises(ValueError, match=r"has type 'flow_mlp'; supported types are"):
        load_policy(folder)
    register_flow_policy(FlowMLPConfig, Wrapped)
    register_flow_policy(FlowMLPConfig, Wrapped)  # an import that is repeated
    assert isinstance(wrap_policy(load_policy(folder).policy), Wrapped)
    assert isinstance(wrap_policy(loaded.policy), PiFlowPolicy)


def test_a_class_unknown_to_lerobot_is_not_registered():
    class Unknown(FlowMLPConfig):
        pass

    with pytest.raises(ValueError, match=r"Unknown is no policy type of LeRobot; put @PreTrainedConfig\.register"):
        register_flow_policy(Unknown, MlpFlowPolicy)

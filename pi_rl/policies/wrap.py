"""Which LeRobot policies can be fine-tuned, and the flow policy around each."""

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pretrained import PreTrainedPolicy

import pi_rl.policies.small  # noqa: F401  (registers the small policy types)
from pi_rl.policies.flow_policy import FlowPolicy
from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig


def supported_config_types() -> list[str]:
    """Names of the LeRobot policy types that `wrap_policy` takes, sorted."""
    classes = (PI0Config, PI05Config, FlowMLPConfig)
    return sorted(name for name, choice in PreTrainedConfig.get_known_choices().items() if issubclass(choice, classes))


def wrap_policy(policy: PreTrainedPolicy) -> FlowPolicy:
    """Puts a LeRobot policy behind the interface that reinforcement learning uses.

    Args:
        policy: π0, π0.5, their small versions, or `flow_mlp`.

    Returns:
        The flow policy; it holds `policy` itself, not a copy.

    Raises:
        ValueError: If the policy is of another type; the message names the supported ones.
    """
    config = getattr(policy, "config", None)
    if isinstance(config, PI0Config | PI05Config):
        from pi_rl.policies.pi import PiFlowPolicy

        return PiFlowPolicy(policy)
    if isinstance(config, FlowMLPConfig):
        from pi_rl.policies.mlp.flow_policy import MlpFlowPolicy

        return MlpFlowPolicy(policy)
    raise ValueError(
        f"A {type(policy).__name__} cannot be fine-tuned here; supported policy types are "
        f"{', '.join(supported_config_types())}."
    )

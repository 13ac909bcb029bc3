"""LeRobot configuration of the policy type `pi0_small`."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from pi_rl.policies.small.sizes import SmallSizes


@PreTrainedConfig.register_subclass("pi0_small")
@dataclass
class PI0SmallConfig(SmallSizes, PI0Config):
    """LeRobot's π0 configuration with explicit sizes; see `SmallSizes` for the added fields."""

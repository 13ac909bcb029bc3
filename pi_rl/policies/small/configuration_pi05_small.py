"""LeRobot configuration of the policy type `pi05_small`."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from pi_rl.policies.small.sizes import SmallSizes


@PreTrainedConfig.register_subclass("pi05_small")
@dataclass
class PI05SmallConfig(SmallSizes, PI05Config):
    """LeRobot's π0.5 configuration with explicit sizes; see `SmallSizes` for the added fields.

    Attributes:
        state_in_prompt: Write the state into the prompt, as LeRobot's π0.5 does. False leaves it out, as in the
            paper's LIBERO and ManiSkill runs: the prompt is then π0's.
    """

    state_in_prompt: bool = True

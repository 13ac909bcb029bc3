"""The small π0: LeRobot's classes with a small backbone, everything else inherited."""

from typing import Any

from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from torch import nn

from pi_rl.policies.small.backbone import SmallBackbone, SmallPolicy, initialise
from pi_rl.policies.small.configuration_pi0_small import PI0SmallConfig


class PI0SmallBackbone(SmallBackbone, PaliGemmaWithExpertModel):
    """Small PaliGemma and action expert of π0."""

    time_conditioned_norm = False


class PI0SmallPytorch(PI0Pytorch):
    """LeRobot's π0 network on a small backbone.

    Args:
        config: Sizes.
        rtc_processor: LeRobot's real-time-chunking processor, or None.
    """

    def __init__(self, config: PI0SmallConfig, rtc_processor: Any = None):
        nn.Module.__init__(self)  # PI0Pytorch.__init__ would build 4 billion parameters
        self.config = config
        self.rtc_processor = rtc_processor
        self.gradient_checkpointing_enabled = False
        self.paligemma_with_expert = PI0SmallBackbone(config)
        width = config.expert_width
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        initialise(self, config.init_scale)


class PI0SmallPolicy(SmallPolicy, PI0Policy):
    """LeRobot policy of type `pi0_small`."""

    config_class = PI0SmallConfig
    name = "pi0_small"
    model_class = PI0SmallPytorch

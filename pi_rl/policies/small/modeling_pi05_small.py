"""The small π0.5: LeRobot's classes with a small backbone, everything else inherited."""

from typing import Any

from lerobot.policies.pi05.modeling_pi05 import PaliGemmaWithExpertModel, PI05Policy, PI05Pytorch
from torch import nn

from pi_rl.policies.small.backbone import SmallBackbone, SmallPolicy, initialise
from pi_rl.policies.small.configuration_pi05_small import PI05SmallConfig


class PI05SmallBackbone(SmallBackbone, PaliGemmaWithExpertModel):
    """Small PaliGemma and action expert of π0.5, whose norms are conditioned on time."""

    time_conditioned_norm = True


class PI05SmallPytorch(PI05Pytorch):
    """LeRobot's π0.5 network on a small backbone.

    Args:
        config: Sizes.
        rtc_processor: LeRobot's real-time-chunking processor, or None.
    """

    def __init__(self, config: PI05SmallConfig, rtc_processor: Any = None):
        nn.Module.__init__(self)  # PI05Pytorch.__init__ would build 4 billion parameters
        self.config = config
        self.rtc_processor = rtc_processor
        self.gradient_checkpointing_enabled = False
        self.paligemma_with_expert = PI05SmallBackbone(config)
        width = config.expert_width
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        initialise(self, config.init_scale)


class PI05SmallPolicy(SmallPolicy, PI05Policy):
    """LeRobot policy of type `pi05_small`."""

    config_class = PI05SmallConfig
    name = "pi05_small"
    model_class = PI05SmallPytorch

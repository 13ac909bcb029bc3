"""What the small π0 and π0.5 share: backbone construction, policy construction, initialisation."""

import math
from typing import Any

from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM, PiGemmaRMSNorm
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn
from transformers import GemmaConfig, PaliGemmaConfig

_ACTIVATION = "gelu_pytorch_tanh"


class SmallBackbone:
    """Constructor of a small `PaliGemmaWithExpertModel`; mixed in before LeRobot's class, which supplies the rest.

    Args:
        config: A small configuration.
    """

    time_conditioned_norm: bool

    def __init__(self, config: Any):
        nn.Module.__init__(self)  # type: ignore[arg-type]  # LeRobot's __init__ would build the full size
        self.freeze_vision_encoder = config.freeze_vision_encoder
        self.train_expert_only = config.train_expert_only
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=_paligemma_config(config))
        self.gemma_expert = PiGemmaForCausalLM(
            config=GemmaConfig(**_gemma_fields(config, config.expert_width, self.time_conditioned_norm))
        )
        self.gemma_expert.model.embed_tokens = None
        self.to_bfloat16_for_selected_params(config.dtype)  # type: ignore[attr-defined]
        self._set_requires_grad()  # type: ignore[attr-defined]


class SmallPolicy:
    """Constructor of a small LeRobot policy; mixed in before LeRobot's policy class, which supplies the rest.

    Args:
        config: A small configuration.
        **kwargs: Accepted and unused, as in LeRobot's policies (dataset statistics and the like).
    """

    model_class: type[nn.Module]

    def __init__(self, config: Any, **kwargs: Any):
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()  # type: ignore[attr-defined]
        self.model = self.model_class(config, rtc_processor=self.rtc_processor)  # type: ignore[attr-defined]
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.model.to(config.device)
        self.reset()  # type: ignore[attr-defined]


def initialise(model: nn.Module, scale: float) -> None:
    """Draws linear and convolution weights from N(0, (scale / √fan_in)²) and zeroes their biases, in place.

    That includes the time-conditioned norms, whose weights LeRobot starts at zero: an untrained π0.5 would not depend
    on time. Their residual gates start open.

    Args:
        model: The network.
        scale: Standard deviation times √fan_in.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=scale / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, PiGemmaRMSNorm) and module.dense is not None:
            nn.init.ones_(module.dense.bias.data[2 * module.dim :])  # order: scale, shift, gate


def _gemma_fields(config: Any, width: int, time_conditioned_norm: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_activation": _ACTIVATION,
        "dtype": "float32",
        "use_adarms": time_conditioned_norm,
        "adarms_cond_dim": width if time_conditioned_norm else None,
    }


def _paligemma_config(config: Any) -> PaliGemmaConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_resolution[0],
        "projection_dim": config.vlm_width,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
        "dtype": "float32",
    }
    text = {"model_type": "gemma", **_gemma_fields(config, config.vlm_width, False)}
    return PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=config.vlm_width)

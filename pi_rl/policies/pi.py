"""π0 and π0.5 of LeRobot as flow policies; every touch point with LeRobot's model code is in this file.

LeRobot is used unpatched. Its `denoise_step` clones the whole prefix cache at every call and returns only the
velocity; here the same expert is called with a cache that is read, never written, so that one stored tensor serves all
denoising steps, epochs and minibatches, and the expert's output tokens are returned for the noise network.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from pi_rl.policies.flow_policy import FlowPolicy, Prefix
from pi_rl.policies.lora import has_lora, lora_parameters

_EMPTY_CAMERA = "empty_camera"
_ALWAYS_FLOAT32 = (
    "vision_tower",
    "multi_modal_projector",
    "input_layernorm",
    "post_attention_layernorm",
    "language_model.norm",
)


class ReadOnlyPrefixCache:
    """Prefix keys and values for attention layers that expect a cache they may append to.

    `update` answers what an appending cache would, but keeps nothing, so a layer may run again on it (activation
    checkpointing) and nothing has to be copied between denoising steps.

    Args:
        kv: (L, 2, B, kv heads, S, head dim).
    """

    is_compileable = False

    def __init__(self, kv: Tensor):
        self.kv = kv

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the prefix's keys and values followed by the given ones, (B, kv heads, S + new, head dim) each."""
        prefix_keys, prefix_values = self.kv[layer_idx].to(keys.dtype).unbind(0)
        return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of prefix tokens S."""
        return self.kv.shape[4]


class PiFlowPolicy(FlowPolicy):
    """LeRobot's π0 or π0.5 behind the flow-policy interface.

    Attention is eager in both rollout and update: other kernels change bfloat16 results by up to 2e-2, which would
    show up as policy ratios different from 1.

    Args:
        policy: A LeRobot `PI0Policy` or `PI05Policy` (subclasses included).
        language_tokens: Number of language token slots to encode; None encodes all of the tokenizer's padding.
            Padding does not change the result, it only costs compute and memory.

    Raises:
        ValueError: If `policy` is of another class or `language_tokens` is outside 1 … tokenizer_max_length.
    """

    def __init__(self, policy: PI0Policy | PI05Policy, *, language_tokens: int | None = None):
        super().__init__()
        if not isinstance(policy, PI0Policy | PI05Policy):
            raise ValueError(
                f"PiFlowPolicy wraps LeRobot's PI0Policy or PI05Policy, got {type(policy).__name__}. "
                "Load one with pi_rl.policies.checkpoints.load_policy."
            )
        config = policy.config
        if language_tokens is not None and not 1 <= language_tokens <= config.tokenizer_max_length:
            raise ValueError(
                f"language_tokens={language_tokens} is outside 1 … "
                f"tokenizer_max_length={config.tokenizer_max_length}; use None for all."
            )
        self.policy = policy
        self.language_tokens = language_tokens
        self._state_in_suffix = isinstance(policy, PI0Policy)
        self._vlm_frozen = False
        self.prefix_is_live = has_lora(policy)
        self.chunk_size = config.chunk_size
        self.n_action_steps = config.n_action_steps
        self.denoising_steps = config.num_inference_steps
        self.action_dim = config.output_features[ACTION].shape[0]
        self.max_action_dim = config.max_action_dim
        self.feature_dim = policy.model.action_out_proj.in_features
        self.pooled_dim = self._language_model.config.hidden_size
        self.prefix_state_dim = config.max_state_dim if self._state_in_suffix else 0
        state_feature = config.input_features.get(OBS_STATE)
        self.state_dim = None if state_feature is None else state_feature.shape[0]
        self.cameras = tuple(key for key in config.image_features if _EMPTY_CAMERA not in key)

    def cast_vlm(self, dtype: torch.dtype) -> None:
        """Changes the numeric type of the VLM's weights, except where LeRobot always keeps float32 (vision, norms).

        Args:
            dtype: torch.bfloat16 or torch.float32. LeRobot's checkpoints in bfloat16 lose nothing by it.
        """
        for name, parameter in self._vlm.named_parameters():
            if not any(part in f"paligemma.{name}" for part in _ALWAYS_FLOAT32):
                parameter.data = parameter.data.to(dtype)

    @property
    def _vlm(self) -> Any:
        return self.policy.model.paligemma_with_expert.paligemma

    @property
    def _language_model(self) -> Any:
        return self._vlm.model.language_model

    @property
    def _expert(self) -> Any:
        return self.policy.model.paligemma_with_expert.gemma_expert

    def train(self, mode: bool = True) -> "PiFlowPolicy":
        """Sets the training mode; a frozen VLM stays in eval mode, also when it has adapters."""
        super().train(mode)
        if self._vlm_frozen:
            self._vlm.eval()
        return self

    def freeze_vlm(self) -> None:
        """Leaves the expert, the projections and LoRA adapters trainable.

        The expert's language head is frozen too: LeRobot builds it but no forward pass uses it, and distributed
        wrappers wait for the gradients of every trainable parameter.
        """
        self._vlm_frozen = True
        self.policy.requires_grad_(True)
        self._vlm.requires_grad_(False)
        for parameter in lora_parameters(self._vlm):
            parameter.requires_grad_(True)
        self._expert.lm_head.requires_grad_(False)
        self._vlm.eval()

    def encode_prefix(self, batch: Mapping[str, Any]) -> Prefix:
        """Runs SigLIP and the language model on preprocessed observations; see `FlowPolicy.encode_prefix`.

        `Prefix.pooled` carries gradients too when the prefix is live.

        Args:
            batch: Output of the preprocessor: images (B, 3, height, width) in [0, 1] by feature key,
                `observation.state` (B, state dim) normalised, `observation.language.tokens` (B, N) and
                `observation.language.attention_mask` (B, N).

        Raises:
            ValueError: If a key is missing, or a prompt is longer than `language_tokens`.
        """
        with torch.set_grad_enabled(self.prefix_is_live and torch.is_grad_enabled()):
            return self._encode(batch)

    def _encode(self, batch: Mapping[str, Any]) -> Prefix:
        images, image_masks = self._images(batch)
        tokens, token_mask = self._language(batch)
        model, language_model = self.policy.model, self._language_model
        was_training = self._vlm.training
        self._vlm.eval()  # in train mode with gradient checkpointing LeRobot drops the cache
        embeddings, pad_mask, attention = model.embed_prefix(images, image_masks, tokens, token_mask)
        language_model.config._attn_implementation = "eager"
        output = language_model(
            inputs_embeds=embeddings,
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad_mask, attention)),
            position_ids=torch.cumsum(pad_mask, dim=1) - 1,
            use_cache=True,
        )
        self._vlm.train(was_training)
        kv = torch.stack([torch.stack((layer[0], layer[1])) for layer in output.past_key_values])
        weights = pad_mask.float().unsqueeze(-1)
        pooled = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        state = self.policy.prepare_state(batch).float() if self._state_in_suffix else None
        return Prefix(kv=kv, pad_mask=pad_mask, pooled=pooled, state=state)

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and output tokens of the action expert; see `FlowPolicy.velocity`.

        Equals LeRobot's `denoise_step`. The expert is called as a module so that hooks (FSDP, checkpointing) run.
        """
        model, expert = self.policy.model, self._expert.model
        inputs = (prefix.state, x, t) if self._state_in_suffix else (x, t)
        embeddings, suffix_mask, attention, condition = model.embed_suffix(*inputs)
        (samples, suffix_length), prefix_length = suffix_mask.shape, prefix.pad_mask.shape[1]
        to_prefix = prefix.pad_mask[:, None, :].expand(samples, suffix_length, prefix_length)
        visible = torch.cat([to_prefix, make_att_2d_masks(suffix_mask, attention)], dim=2)
        positions = prefix.pad_mask.sum(dim=1, keepdim=True) + torch.cumsum(suffix_mask, dim=1) - 1
        expert.config._attn_implementation = "eager"
        output = expert(
            inputs_embeds=embeddings,
            attention_mask=prepare_attention_masks_4d(visible),
            position_ids=positions,
            past_key_values=ReadOnlyPrefixCache(prefix.kv),
            use_cache=False,
            adarms_cond=condition,
        )
        features = output.last_hidden_state[:, -self.chunk_size :].float()
        return model.action_out_proj(features).float(), features

    def _images(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        missing = [camera for camera in self.cameras if camera not in batch]
        if missing:
            raise ValueError(
                f"The batch lacks camera(s) {missing}; it has {sorted(map(str, batch))}. "
                f"Give all of {list(self.cameras)}."
            )
        images, masks = self.policy._preprocess_images(batch)
        present = sum(key in batch for key in self.policy.config.image_features)
        return images[:present], masks[:present]  # the rest are fully masked cameras, which change nothing

    def _language(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        missing = [key for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE) if key not in batch]
        if missing:
            raise ValueError(
                f"The batch lacks {missing}; it has {sorted(map(str, batch))}. Run the policy's preprocessor first."
            )
        tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK].bool()
        if self.language_tokens is None:
            return tokens, mask
        if mask[:, self.language_tokens :].any():
            raise ValueError(
                f"A prompt has {int(mask.sum(1).max())} tokens, more than language_tokens={self.language_tokens}; "
                "raise it or use None."
            )
        return tokens[:, : self.language_tokens], mask[:, : self.language_tokens]

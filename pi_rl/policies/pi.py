"""π0 and π0.5 of LeRobot as flow policies; every touch point with LeRobot's model code is in this file.

LeRobot is used unpatched. Its `denoise_step` clones the whole prefix cache at every call and returns only the
velocity; here the same expert is called with a cache that is read, never written, so that one stored tensor serves all
denoising steps, epochs and minibatches, and the expert's output tokens are returned for the noise network.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

from pi_rl.policies.attention import ATTENTION_IMPLEMENTATIONS, FOLDED, fold_mask
from pi_rl.policies.flow_policy import FlowPolicy, Prefix
from pi_rl.policies.lora import has_lora, lora_parameters
from pi_rl.policies.parked import park_linear

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
        """Returns the prefix's keys and values followed by the given ones, (B, kv heads, S + new, head dim) each.

        Under autocast in its type: rotary positions make float32 keys, and converting a token costs less than
        converting the prefix.
        """
        dtype = compute_dtype(keys)
        prefix_keys, prefix_values = self.kv[layer_idx].to(dtype).unbind(0)
        return torch.cat([prefix_keys, keys.to(dtype)], dim=2), torch.cat([prefix_values, values.to(dtype)], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of prefix tokens S."""
        return self.kv.shape[4]


class PrefixKeys:
    """Collects the keys and values of a prefix, layer by layer, for attention layers that expect a cache.

    A layer that runs a second time (activation checkpointing) changes nothing.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps a layer's keys and values and returns them as they are."""
        self.layers.setdefault(layer_idx, (keys, values))
        return keys, values

    def stacked(self) -> Tensor:
        """All layers, (L, 2, B, kv heads, S, head dim), in the type that attention computes in."""
        pairs = [self.layers[index] for index in sorted(self.layers)]
        dtype = compute_dtype(pairs[0][0])
        return torch.stack([torch.stack((keys.to(dtype), values.to(dtype))) for keys, values in pairs])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Type in which matrix products of a tensor are computed: autocast's, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class PiFlowPolicy(FlowPolicy):
    """LeRobot's π0 or π0.5 behind the flow-policy interface.

    Rollout and update use the same attention: other kernels change bfloat16 results by up to 2e-2, which would show
    up as policy ratios different from 1. The projections of state, time and actions stay in float32 under autocast,
    where LeRobot has them too.

    Args:
        policy: A LeRobot `PI0Policy` or `PI05Policy` (subclasses included).
        language_tokens: Number of language token slots to encode; None encodes all of the tokenizer's padding.
            Padding does not change the result, it only costs compute and memory.
        attention: "eager" or "sdpa" (fused kernels; Transformers' names).

    Raises:
        ValueError: If `policy` is of another class, `language_tokens` is outside 1 … tokenizer_max_length or
            `attention` is unknown.
    """

    def __init__(
        self, policy: PI0Policy | PI05Policy, *, language_tokens: int | None = None, attention: str = "eager"
    ):
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
        if attention not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(f"attention={attention!r} is unknown; use one of {ATTENTION_IMPLEMENTATIONS}.")
        self.policy = policy
        self.language_tokens = language_tokens
        self.attention = attention
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

    def train_vlm(self) -> None:
        """Makes the VLM trainable as far as the action expert reads it; prefixes are live from then on.

        Of the last language layer the expert reads keys and values alone: its other parts, the final norm and the
        language heads get no gradient and stay frozen. The VLM stays in eval mode (it has no dropout to switch on).
        """
        self.freeze_vlm()
        self._vlm.requires_grad_(True)
        last = self._language_model.layers[-1]
        unread = (last.self_attn.q_proj, last.self_attn.o_proj, last.post_attention_layernorm, last.mlp)
        for module in (*unread, self._language_model.norm, self._vlm.lm_head):
            module.requires_grad_(False)
        self.prefix_is_live = True

    def park_language_heads(self) -> int:
        """Takes the two language heads off the compute device: π0 and π0.5 never use them (790 M parameters).

        They stay in `state_dict()`, so a saved policy has them.

        Returns:
            Bytes that were freed on the compute device.
        """
        return park_linear(self._vlm, "lm_head") + park_linear(self._expert, "lm_head")

    def checkpoint_activations(self) -> None:
        """Recomputes layers in the backward pass instead of keeping what they computed.

        The expert's layers; with a live prefix the VLM's too. Names of parameters stay as they are.
        """
        stacks = [self._expert.model.layers]
        if self.prefix_is_live:
            stacks += [self._language_model.layers, self._vlm.model.vision_tower.vision_model.encoder.layers]
        for layers in stacks:
            for layer in layers:
                if "forward" not in vars(layer):  # a wrapping module would change the parameters' names
                    # nothing here is random
                    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def compile_velocity(self, *, backend: str = "inductor", mode: str | None = None) -> None:
        """Compiles the action expert's pass; see `FlowPolicy.compile_velocity`."""
        self._expert_pass = torch.compile(  # type: ignore[method-assign]
            self._expert_pass, backend=backend, mode=mode, fullgraph=True, dynamic=False
        )
        self.is_compiled = True

    def encode_prefix(self, batch: Mapping[str, Any], *, pooled: bool = True) -> Prefix:
        """Runs SigLIP and the language model on preprocessed observations; see `FlowPolicy.encode_prefix`.

        `Prefix.pooled` carries gradients too when the prefix is live.

        Args:
            batch: Output of the preprocessor: images (B, 3, height, width) in [0, 1] by feature key,
                `observation.state` (B, state dim) normalised, `observation.language.tokens` (B, N) and
                `observation.language.attention_mask` (B, N).
            pooled: Whether the VLM's output is wanted. Without it the last layer stops at its keys and values.

        Raises:
            ValueError: If a key is missing, or a prompt is longer than `language_tokens`.
        """
        with torch.set_grad_enabled(self.prefix_is_live and torch.is_grad_enabled()):
            return self._encode(batch, pooled)

    def _encode(self, batch: Mapping[str, Any], pooled: bool) -> Prefix:
        images, image_masks = self._images(batch)
        tokens, token_mask = self._language(batch)
        model, language_model = self.policy.model, self._language_model
        was_training = self._vlm.training
        self._vlm.eval()  # in train mode LeRobot's own checkpointing would run embeddings a second time
        embeddings, pad_mask, attention = model.embed_prefix(images, image_masks, tokens, token_mask)
        output, keys = self._language_layers(embeddings, pad_mask, attention, pooled)
        self._vlm.train(was_training)
        mean = None
        if pooled:
            weights = pad_mask.float().unsqueeze(-1)
            mean = (language_model.norm(output)[0].float() * weights).sum(1) / weights.sum(1)
        state = self.policy.prepare_state(batch).float() if self._state_in_suffix else None
        return Prefix(kv=keys.stacked(), pad_mask=pad_mask, pooled=mean, state=state)

    def _language_layers(
        self, embeddings: Tensor, pad_mask: Tensor, attention: Tensor, whole: bool
    ) -> tuple[Tensor, PrefixKeys]:
        """The language model's layers; the last one only up to its keys and values unless ``whole``."""
        language_model = self._language_model
        language_model.config._attn_implementation = self._implementation
        layers, keys = language_model.layers, PrefixKeys()
        positions = torch.cumsum(pad_mask, dim=1) - 1
        hidden = embeddings
        if layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
            hidden = hidden.to(torch.bfloat16)
        rotary = language_model.rotary_emb(hidden, positions)
        if self.attention == "sdpa":  # all tokens see the same ones; what padding computes is never read
            mask = fold_mask(pad_mask[:, None], self._heads, compute_dtype(hidden))
        else:
            mask = prepare_attention_masks_4d(make_att_2d_masks(pad_mask, attention))
        for layer in layers if whole else layers[:-1]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=keys,
                use_cache=True,
                position_embeddings=rotary,
            )
        if not whole:
            _keys_and_values(layers[-1], hidden, rotary, keys)
        return hidden, keys

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and output tokens of the action expert; see `FlowPolicy.velocity`.

        Equals LeRobot's `denoise_step`. The expert is called as a module so that hooks (FSDP, checkpointing) run.
        """
        self._expert.model.config._attn_implementation = self._implementation
        return self._expert_pass(prefix.kv, prefix.pad_mask, prefix.state, x, t)

    def _expert_pass(
        self, kv: Tensor, pad_mask: Tensor, state: Tensor | None, x: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        model = self.policy.model
        inputs = (state, x, t) if self._state_in_suffix else (x, t)
        with torch.autocast(x.device.type, enabled=False):
            embeddings, suffix_mask, attention, condition = model.embed_suffix(*inputs)
        (samples, suffix_length), prefix_length = suffix_mask.shape, pad_mask.shape[1]
        to_prefix = pad_mask[:, None, :].expand(samples, suffix_length, prefix_length)
        visible = torch.cat([to_prefix, make_att_2d_masks(suffix_mask, attention)], dim=2)
        if self.attention == "sdpa":
            weight = self._expert.model.layers[0].self_attn.q_proj.weight  # decides the type that LeRobot computes in
            mask = fold_mask(visible, self._heads, compute_dtype(weight))
        else:
            mask = prepare_attention_masks_4d(visible)
        output = self._expert.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=pad_mask.sum(dim=1, keepdim=True) + torch.cumsum(suffix_mask, dim=1) - 1,
            past_key_values=ReadOnlyPrefixCache(kv),
            use_cache=False,
            adarms_cond=condition,
        )
        features = output.last_hidden_state[:, -self.chunk_size :].float()
        with torch.autocast(x.device.type, enabled=False):
            return model.action_out_proj(features).float(), features

    @property
    def _implementation(self) -> str:
        return FOLDED if self.attention == "sdpa" else "eager"

    @property
    def _heads(self) -> int:
        return self._expert.model.config.num_attention_heads

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


def _keys_and_values(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], keys: PrefixKeys) -> None:
    """What a decoder layer adds to a cache, without what it would pass on."""
    if isinstance(layer, FSDPModule):  # gathers its weights by itself only when it is called
        layer.unshard()
    attention: Any = layer.self_attn
    normed, _ = layer.input_layernorm(hidden)  # type: ignore[operator]
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    key, value = (
        projection(normed).view(shape).transpose(1, 2) for projection in (attention.k_proj, attention.v_proj)
    )
    key, _ = apply_rotary_pos_emb(key, key, *rotary)
    keys.update(key, value, attention.layer_idx)
    if isinstance(layer, FSDPModule) and not torch.is_grad_enabled():  # else the backward pass does it
        layer.reshard()

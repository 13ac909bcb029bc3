"""Attention with one key-value head (Gemma's multi-query attention) on PyTorch's fused kernels, nothing repeated.

Transformers' own "sdpa" copies keys and values once per query head. Here the heads are laid beside the query tokens
instead, so a kernel sees T * heads queries and reads every key once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
FOLDED = "pi_rl_folded_sdpa"
"""Name under which Transformers' attention layers find `folded_attention`."""

_ALIGNMENT = 16  # elements; fused CUDA kernels copy a mask whose rows are not aligned


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of T tokens with several query heads to S tokens with one key-value head.

    Args:
        module: The attention layer; not used.
        query: (B, heads, T, head dim); converted to the type of the keys.
        key: (B, 1, S, head dim).
        value: (B, 1, S, head dim).
        attention_mask: (B, 1, 1 or T * heads, S), additive or bool, rows ordered as `fold_mask` does; None masks
            nothing.
        scaling: Factor of the scores.
        **kwargs: What else Transformers passes (dropout is switched off everywhere).

    Returns:
        (B, T, heads, head dim), and None for the attention weights.
    """
    samples, heads, tokens, size = query.shape
    folded = query.transpose(1, 2).reshape(samples, 1, tokens * heads, size)
    output = nn.functional.scaled_dot_product_attention(
        folded.to(key.dtype), key, value.to(key.dtype), attn_mask=attention_mask, scale=scaling
    )
    return output.view(samples, tokens, heads, size), None


def default_attention(device: torch.device, *, bf16: bool = False) -> str:
    """Fused kernels on a GPU and in bfloat16; else eager, whose results on a CPU are those of earlier versions."""
    return "sdpa" if device.type == "cuda" or bf16 else "eager"


def fold_mask(visible: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The additive mask of `folded_attention`.

    Args:
        visible: (B, T, S) bool, True where a token may look; T may be 1 for all alike (then nothing is repeated).
        heads: Number of query heads.
        dtype: Type of the keys.

    Returns:
        (B, 1, T * heads, S), or (B, 1, 1, S) for T = 1; 0 where visible and -inf elsewhere.
    """
    samples, tokens, width = visible.shape
    if tokens > 1:
        visible = visible.repeat_interleave(heads, dim=1)
    padded = -(-width // _ALIGNMENT) * _ALIGNMENT
    mask = torch.zeros(samples, 1, visible.shape[1], padded, dtype=dtype, device=visible.device)[..., :width]
    return mask.masked_fill_(~visible[:, None], -torch.inf)


AttentionInterface.register(FOLDED, folded_attention)

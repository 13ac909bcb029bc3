"""How the network is run: numeric type of matrix products, and rows per pass.

A matrix product rounds differently in batches of another size, because other kernels are chosen. In bfloat16 that
moves a chunk's log-probability by percents, and the ratio of an unchanged policy away from 1. So rollout and update
then pass the same number of rows, filled up by repetition: with the same kernel a row's result depends on the row
alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi_rl.policies.flow_policy import Prefix


@dataclass(frozen=True)
class Execution:
    """Settings that change results by rounding alone.

    Attributes:
        compute_dtype: Autocast type of matrix products; None computes in the weights' type.
        expert_rows: Rows of every pass of the action expert; None passes what comes.
        encode_rows: Rows of every pass of the VLM; None passes what comes.

    Raises:
        ValueError: If a number of rows is not positive or the type is not bfloat16.
    """

    compute_dtype: torch.dtype | None = None
    expert_rows: int | None = None
    encode_rows: int | None = None

    def __post_init__(self) -> None:
        if self.compute_dtype not in (None, torch.bfloat16):
            raise ValueError(f"compute_dtype={self.compute_dtype} is not supported; use torch.bfloat16 or None.")
        for name in ("expert_rows", "encode_rows"):
            if (rows := getattr(self, name)) is not None and rows < 1:
                raise ValueError(f"{name}={rows} must be at least 1, or None.")

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which every computation runs."""
        return torch.autocast(
            device.type, self.compute_dtype or torch.bfloat16, enabled=self.compute_dtype is not None
        )


def row_slices(samples: int, rows: int | None, device: torch.device) -> list[Tensor] | None:
    """Indices of the passes that process a number of samples.

    Args:
        samples: Number of samples.
        rows: Rows of every pass, or None.
        device: Where the indices are wanted.

    Returns:
        (rows,) int64 each, repeated from the start where the samples do not fill the last pass; None where all samples
        make one pass as they are.
    """
    if rows is None or samples == rows:
        return None
    indices = torch.arange(-(-samples // rows) * rows, device=device) % samples
    return list(indices.split(rows))


def encode_in_passes(
    encode: Callable[[Mapping[str, Any]], Prefix], batch: Mapping[str, Any], rows: int | None
) -> Prefix:
    """Encodes a preprocessed batch in passes of a fixed number of rows.

    Args:
        encode: Encodes one batch.
        batch: Tensors with B rows each; everything else is left out of a pass.
        rows: Rows of every pass, or None.

    Returns:
        The prefix of the B observations.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()))
    passes = row_slices(len(first), rows, first.device)
    if passes is None:
        return encode(batch)
    pieces = [encode({name: tensor.index_select(0, part) for name, tensor in tensors.items()}) for part in passes]
    whole = pieces[0] if len(pieces) == 1 else Prefix.cat(pieces)
    return whole if len(whole) == len(first) else whole.index(torch.arange(len(first)))


def velocity_in_passes(
    velocity: Callable[[Prefix, Tensor, Tensor], tuple[Tensor, Tensor]], prefix: Prefix, rows: int | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The velocity on a prefix in passes of a fixed number of rows; the prefix is divided once, not at every step.

    Args:
        velocity: Of a policy: prefix, x (B, H, D), t (B,) to u (B, H, D) and tokens (B, H, F).
        prefix: B observations.
        rows: Rows of every pass, or None.
    """
    samples = len(prefix)
    passes = row_slices(samples, rows, prefix.pad_mask.device)
    if passes is None:
        return lambda x, t: velocity(prefix, x, t)
    parts = [(prefix.index(part), part) for part in passes]

    def divided(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [velocity(piece, x.index_select(0, part), t.index_select(0, part)) for piece, part in parts]
        u, tokens = (torch.cat(tensors)[:samples] for tensors in zip(*outputs, strict=True))
        return u, tokens

    return divided

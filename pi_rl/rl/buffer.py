"""Samples of one rollout and their minibatches.

Shapes: N valid samples, K denoising steps, H horizon, D padded action dimensions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PrefixSource[PrefixT](Protocol):
    """Anything that keeps one prefix per sample and gives batches of them."""

    def __getitem__(self, indices: Tensor) -> PrefixT:
        """Prefixes of the samples with the (M,) int64 ``indices``."""
        ...

    def __len__(self) -> int:
        """Number of samples kept."""
        ...


@dataclass
class Minibatch[PrefixT]:
    """M samples of a rollout.

    Attributes:
        x: (M, K + 1, H, D) denoising chains.
        step_index: (M,) stochastic steps, or None.
        log_prob: (M,) at rollout time.
        values: (M,) at rollout time.
        advantages: (M,).
        returns: (M,).
        prefix: The policy's inputs for these samples, as the prefix source gives them.
    """

    x: Tensor
    step_index: Tensor | None
    log_prob: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    prefix: PrefixT

    def __len__(self) -> int:
        """Number of samples M."""
        return len(self.log_prob)


@dataclass
class RolloutBuffer[PrefixT]:
    """The valid samples of a rollout; steps after an episode's end are dropped before.

    Attributes:
        x: (N, K + 1, H, D) float32 denoising chains.
        step_index: (N,) int64 stochastic step, or None for chains scored as a whole.
        log_prob: (N,) float32 of the policy that acted.
        values: (N,) float32 of the critic at rollout time.
        advantages: (N,) float32, normalised by the caller.
        returns: (N,) float32 regression targets of the critic.
        prefix: One prefix per sample, in the same order.
    """

    x: Tensor
    step_index: Tensor | None
    log_prob: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    prefix: PrefixSource[PrefixT]

    def __post_init__(self) -> None:
        """Check the lengths.

        Raises:
            ValueError: If a field does not hold one row per sample.
        """
        rows: dict[str, tuple[int, ...]] = {"prefix": (len(self.prefix),), "x": tuple(self.x.shape[:1])}
        for name in ("step_index", "log_prob", "values", "advantages", "returns"):
            if (tensor := getattr(self, name)) is not None:
                rows[name] = tuple(tensor.shape)
        if self.x.ndim != 4 or any(shape != (len(self.x),) for shape in rows.values()):
            raise ValueError(
                f"`x` has shape {tuple(self.x.shape)}, which must be (N, K + 1, H, D), and the other fields {rows}, "
                "which must all be (N,)"
            )

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.x)

    def minibatch(self, indices: Tensor, device: torch.device | str | None = None) -> Minibatch[PrefixT]:
        """Rows of the buffer.

        Args:
            indices: (M,) int64 in [0, N), on any device.
            device: Where to put the rows; None leaves them where they are. The prefix source decides about its own.

        Returns:
            The minibatch, copied.

        Raises:
            ValueError: If ``indices`` is not a vector of int64.
        """
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise ValueError(f"`indices` is {indices.dtype} of shape {tuple(indices.shape)}; it must be int64 (M,)")

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, indices.to(tensor.device)).to(device)

        return Minibatch(
            x=rows(self.x),
            step_index=None if self.step_index is None else rows(self.step_index),
            log_prob=rows(self.log_prob),
            values=rows(self.values),
            advantages=rows(self.advantages),
            returns=rows(self.returns),
            prefix=self.prefix[indices],
        )


def minibatch_permutations(n: int, update_epochs: int, minibatches: int, seed: int) -> list[Tensor]:
    """Index sets of all optimiser steps of one update, shuffled anew in every epoch.

    Args:
        n: Number of samples N.
        update_epochs: Passes over the samples.
        minibatches: Minibatches per pass, at most N.
        seed: Seed of the shuffles; equal arguments give equal results on every machine.

    Returns:
        ``update_epochs * minibatches`` int64 CPU vectors, epoch after epoch. Each epoch's minibatches cover every
        sample once and their sizes differ by at most 1.

    Raises:
        ValueError: If a count is smaller than 1 or there are more minibatches than samples.
    """
    if update_epochs < 1 or minibatches < 1:
        raise ValueError(f"got update_epochs={update_epochs}, minibatches={minibatches}; both must be at least 1")
    if n < minibatches:
        raise ValueError(
            f"{n} samples cannot fill minibatches={minibatches}; use at most {n} minibatches, or more environments or "
            "chunks per rollout"
        )
    generator = torch.Generator().manual_seed(seed)
    indices: list[Tensor] = []
    for _ in range(update_epochs):
        indices.extend(torch.randperm(n, generator=generator).tensor_split(minibatches))
    return indices

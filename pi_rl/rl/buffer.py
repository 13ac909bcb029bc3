"""Samples of one rollout and their minibatches.

Shapes: N chunks (rows), S transitions per chunk, M samples of a minibatch, K denoising steps, H horizon, D padded
action dimensions, U ratio units. A sample is one transition of the MDP that is trained: the whole chunk where a chunk
is one transition (S = 1), one of its denoising steps where every step is (S = K).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class InputSource[InputT](Protocol):
    """Anything that keeps the policy's input of every chunk and gives batches of them."""

    def __getitem__(self, rows: Tensor) -> InputT:
        """Inputs of the chunks with the (M,) int64 ``rows``."""
        ...

    def __len__(self) -> int:
        """Number of chunks kept."""
        ...

    def prefetch(self, rows: Tensor) -> None:
        """Announces the (M,) int64 ``rows`` that are asked for next, so that they may be fetched meanwhile."""
        ...


@dataclass
class Minibatch[InputT]:
    """M samples of a rollout.

    Attributes:
        x: (M, K + 1, H, D) denoising chains.
        step_index: (M,) the stochastic step that a sample is about, or None for chains scored as a whole.
        log_prob: (M, U) at rollout time.
        advantages: (M,).
        values: (M,) at rollout time, or None without a critic.
        returns: (M,), or None without a critic.
        critic_input: (M, V, F) features of the critic, or None.
        inputs: The policy's inputs for these samples, as the source gives them.
    """

    x: Tensor
    step_index: Tensor | None
    log_prob: Tensor
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    critic_input: Tensor | None
    inputs: InputT

    def __len__(self) -> int:
        """Number of samples M."""
        return len(self.log_prob)


@dataclass
class RolloutBuffer[InputT]:
    """The valid chunks of a rollout; steps after an episode's end are dropped before.

    Attributes:
        x: (N, K + 1, H, D) float32 denoising chains.
        step_index: (N, S) int64 stochastic step of each transition, or None for chains scored as a whole.
        log_prob: (N, S, U) float32 of the policy that acted.
        advantages: (N, S) float32, normalised by the caller.
        values: (N, S) float32 of the critic at rollout time; None without a critic.
        returns: (N, S) float32 regression targets of the critic; None without a critic.
        critic_input: (N, V, F) what the critic saw at rollout time: V = 1, or one entry per denoising step; None
            without a critic.
        inputs: One input of the policy per chunk, in the same order.
        critic_per_step: Whether a transition's value comes from its own denoising step's entry of ``critic_input``
            alone; otherwise from all entries.
    """

    x: Tensor
    step_index: Tensor | None
    log_prob: Tensor
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    critic_input: Tensor | None
    inputs: InputSource[InputT]
    critic_per_step: bool = False

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: If a field does not hold one row per chunk, or one entry per transition.
        """
        chunks, transitions = self.log_prob.shape[:2]
        expected: dict[str, tuple[int, ...]] = {"inputs": (chunks,), "x": (chunks,)}
        given: dict[str, tuple[int, ...]] = {"inputs": (len(self.inputs),), "x": tuple(self.x.shape[:1])}
        for name in ("step_index", "advantages", "values", "returns"):
            if (tensor := getattr(self, name)) is not None:
                given[name], expected[name] = tuple(tensor.shape), (chunks, transitions)
        if self.critic_input is not None:
            given["critic_input"], expected["critic_input"] = tuple(self.critic_input.shape[:1]), (chunks,)
        wrong = {name: (shape, expected[name]) for name, shape in given.items() if shape != expected[name]}
        if self.x.ndim != 4 or self.log_prob.ndim != 3 or wrong:
            raise ValueError(
                f"`x` has shape {tuple(self.x.shape)}, which must be (N, K + 1, H, D), `log_prob` "
                f"{tuple(self.log_prob.shape)}, which must be (N, S, U); (given, expected) of other fields: {wrong}"
            )

    def __len__(self) -> int:
        """Number of samples N * S."""
        return self.log_prob.shape[0] * self.log_prob.shape[1]

    @property
    def transitions(self) -> int:
        """S, transitions per chunk."""
        return self.log_prob.shape[1]

    def minibatch(self, indices: Tensor, device: torch.device | str | None = None) -> Minibatch[InputT]:
        """Samples of the buffer; sample ``i`` is transition ``i % S`` of chunk ``i // S``.

        Args:
            indices: (M,) int64 in [0, N * S), on any device.
            device: Where to put the samples; None leaves them where they are. The input source decides about its own.

        Returns:
            The minibatch, copied.

        Raises:
            ValueError: If ``indices`` is not a vector of int64.
        """
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise ValueError(f"`indices` is {indices.dtype} of shape {tuple(indices.shape)}; it must be int64 (M,)")
        rows = indices // self.transitions
        home = self.x.device  # of all tensors: the indices travel there once
        home_rows, home_indices = rows.to(home), indices.to(home)

        def of_chunk(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, home_rows).to(device)

        def of_sample(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1).index_select(0, home_indices).to(device)

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else of_sample(tensor)

        step_index = optional(self.step_index)
        critic_input = None if self.critic_input is None else of_chunk(self.critic_input)
        if critic_input is not None and self.critic_per_step and step_index is not None:
            samples = torch.arange(len(indices), device=critic_input.device)
            critic_input = critic_input[samples, step_index.to(critic_input.device)].unsqueeze(1)
        return Minibatch(
            x=of_chunk(self.x),
            step_index=step_index,
            log_prob=of_sample(self.log_prob),
            advantages=of_sample(self.advantages),
            values=optional(self.values),
            returns=optional(self.returns),
            critic_input=critic_input,
            inputs=self.inputs[rows],
        )

    def prefetch(self, indices: Tensor) -> None:
        """Announces the samples of the next :meth:`minibatch`, so that the policy's inputs may be fetched meanwhile.

        Args:
            indices: As of :meth:`minibatch`.
        """
        self.inputs.prefetch(indices // self.transitions)


def minibatch_permutations(n: int, update_epochs: int, minibatches: int, seed: int) -> list[Tensor]:
    """Index sets of all optimiser steps of one update, shuffled anew in every epoch.

    Args:
        n: Number of samples.
        update_epochs: Passes over the samples.
        minibatches: Minibatches per pass. With fewer samples than that, some index sets are empty.
        seed: Seed of the shuffles; equal arguments give equal results on every machine.

    Returns:
        ``update_epochs * minibatches`` int64 CPU vectors, epoch after epoch. Each epoch's minibatches cover every
        sample once and their sizes differ by at most 1.

    Raises:
        ValueError: If a count is smaller than 1 or ``n`` is negative.
    """
    if update_epochs < 1 or minibatches < 1 or n < 0:
        raise ValueError(
            f"got update_epochs={update_epochs}, minibatches={minibatches}, n={n}; the first two must be at least 1, "
            "the last 0 or more"
        )
    generator = torch.Generator().manual_seed(seed)
    indices: list[Tensor] = []
    for _ in range(update_epochs):
        indices.extend(torch.randperm(n, generator=generator).tensor_split(minibatches))
    return indices

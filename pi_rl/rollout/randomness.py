"""Every random number of a rollout, derived from what it belongs to.

A number depends on (seed, stream, episode, chunk) and on nothing else: not on the process that draws it, the number of
processes or workers, or what was drawn before. So a resumed run repeats exactly, and an evaluation gives the same
actions for the same initial state wherever it runs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi_rl.envs.vector_env import TRAIN_STATE_OFFSET

TRAIN_STREAM, EVAL_STREAM, RESET_STREAM, SHUFFLE_STREAM, SHARED_STREAM = 0, 1, 2, 3, 4

_STATE_RANGE = 2**30


@dataclass(frozen=True)
class ChunkNoise:
    """The random numbers that one chunk of each of B episodes needs.

    Attributes:
        x_init: Initial noise of the denoising chain, (B, H, D), standard normal.
        eps: Noise of the K transitions, (B, K, H, D), standard normal.
        uniform: (B,) in [0, 1), picks the stochastic step of a hybrid chain.
    """

    x_init: Tensor
    eps: Tensor
    uniform: Tensor


def chunk_noise(
    key: tuple[int, ...],
    reset_ids: np.ndarray,
    chunk_index: np.ndarray,
    *,
    denoising_steps: int,
    chunk_shape: tuple[int, int],
    members: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> ChunkNoise:
    """Draws the noise of one chunk for each of B episodes.

    Args:
        key: Non-negative integers shared by the episodes, such as (seed, stream, iteration).
        reset_ids: (B, 2) integers, the episodes' (task index, state id).
        chunk_index: (B,) integers, how many chunks each episode has executed already.
        denoising_steps: K.
        chunk_shape: (H, D), predicted horizon and padded action size.
        members: (B,) integers that tell episodes of one initial state apart; None stands for zeros.
        device: Where the tensors are wanted.

    Returns:
        The noise; row b depends on ``key``, ``reset_ids[b]``, ``chunk_index[b]`` and ``members[b]`` alone.
    """
    horizon, dim = chunk_shape
    normals = np.empty((len(reset_ids), denoising_steps + 1, horizon, dim), np.float32)
    uniform = np.empty(len(reset_ids), np.float32)
    members = np.zeros(len(reset_ids), np.int64) if members is None else members
    for row, ((task, state), chunk, member) in enumerate(zip(reset_ids, chunk_index, members, strict=True)):
        episode = [int(task), int(state), int(chunk)]
        generator = np.random.default_rng([*key, *episode, *([int(member)] if member else [])])
        normals[row] = generator.standard_normal(normals.shape[1:], dtype=np.float32)
        uniform[row] = generator.random(dtype=np.float32)
    drawn = torch.from_numpy(normals).to(device)
    return ChunkNoise(drawn[:, 0], drawn[:, 1:], torch.from_numpy(uniform).to(device))


def shared_uniform(key: tuple[int, ...]) -> float:
    """One number in [0, 1) that all processes draw alike.

    Args:
        key: Non-negative integers: seed, iteration, rollout epoch, chunk.
    """
    seed, *rest = key
    return float(np.random.default_rng([seed, SHARED_STREAM, *rest]).random(dtype=np.float32))


def training_state_ids(
    seed: int, iteration: int, env_index: np.ndarray, episode: np.ndarray, epoch: int = 0
) -> np.ndarray:
    """Initial states for training episodes, never one of the evaluation's.

    Args:
        seed: The run's seed.
        iteration: Number of the iteration.
        env_index: (n,) indices of the environments (or of the groups that share a state) over all processes.
        episode: (n,) number of the episode within the rollout epoch, per environment.
        epoch: Rollout epoch within the iteration.

    Returns:
        (n,) int64 state ids, all at or above ``TRAIN_STATE_OFFSET``.
    """
    draws = [
        np.random.default_rng(
            [seed, RESET_STREAM, iteration, int(index), int(number), *([epoch] if epoch else [])]
        ).integers(_STATE_RANGE)
        for index, number in zip(env_index, episode, strict=True)
    ]
    return TRAIN_STATE_OFFSET + np.asarray(draws, np.int64)


def shuffle_seed(seed: int, iteration: int, rank: int) -> int:
    """Seed of the minibatch permutations of one iteration on one process."""
    return int(np.random.SeedSequence([seed, SHUFFLE_STREAM, iteration, rank]).generate_state(1)[0])

"""What one iteration's rollout leaves behind, before any algorithm has looked at it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi_rl.policies.flow_policy import Prefix
from pi_rl.rl.buffer import InputSource, RolloutBuffer


@dataclass
class RolloutStatistics:
    """Sums over the episodes of a rollout, so that several processes' figures simply add up.

    Success, length and return count the first episode of every environment only: of the later ones mostly those end
    within the rollout that are short, that is successful.

    Attributes:
        tasks: Names, one per row of ``per_task``.
        per_task: (tasks, 4) float64: first episodes, their successes, environment steps and sum of rewards.
        env_steps: Simulated steps of all episodes, finished or not.
        episodes: Episodes that ended.
        failed: Episodes that were lost because their simulator broke down, or the process that it was in.
        restarts: Simulator processes that were lost and replaced.
    """

    tasks: tuple[str, ...]
    per_task: np.ndarray
    env_steps: int = 0
    episodes: int = 0
    failed: int = 0
    restarts: int = 0

    def add_episode(self, task: int, success: bool, length: int, reward: float) -> None:
        """Counts an environment's first episode: of task ``task``, ``length`` environment steps long."""
        self.per_task[task] += (1.0, float(success), float(length), reward)

    def as_tensor(self) -> Tensor:
        """Everything in one float64 vector, for one reduction over processes."""
        counts = [float(count) for count in (self.env_steps, self.episodes, self.failed, self.restarts)]
        return torch.from_numpy(np.append(self.per_task.ravel(), counts))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Rates from a (reduced) vector of :meth:`as_tensor`; a rate of no episodes is left out.

        Args:
            sums: (4 * tasks + 4,) float64.
        """
        table = sums[:-4].reshape(len(self.tasks), 4).cpu().numpy()
        total = table.sum(0)
        names = ("env_steps", "episodes", "failed_episodes", "worker_restarts")
        metrics = {f"rollout/{name}": float(value) for name, value in zip(names, sums[-4:], strict=True)}
        if total[0] > 0:
            metrics["rollout/success_rate"] = float(total[1] / total[0])
            metrics["rollout/episode_length"] = float(total[2] / total[0])
            metrics["rollout/return"] = float(total[3] / total[0])
        if len(self.tasks) > 1:
            for task, row in zip(self.tasks, table, strict=True):
                if row[0] > 0:
                    metrics[f"rollout/success_rate/{task}"] = float(row[1] / row[0])
        return metrics


def in_order(values: Tensor, mask: Tensor, epochs: int) -> Tensor:
    """Entries of some chunks, ordered by rollout epoch, then time, then environment.

    Args:
        values: (T, B), or (T, S, B) with an entry per transition.
        mask: (T, B) bool, N of them true.
        epochs: E, whose B / E columns each follow one another.

    Returns:
        (N, S); S = 1 for (T, B).
    """
    per_transition = values if values.ndim == 3 else values.unsqueeze(1)
    chunks, transitions, columns = per_transition.shape
    by_epoch = per_transition.reshape(chunks, transitions, epochs, columns // epochs)
    return by_epoch.permute(2, 0, 3, 1)[mask.reshape(chunks, epochs, -1).permute(1, 0, 2)]


class KeptInputs:
    """Some rows of a source of inputs.

    Args:
        source: All rows.
        rows: (n,) int64, the rows that are kept.
    """

    def __init__(self, source: InputSource[Prefix | Mapping[str, Any]], rows: Tensor):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        """Number of kept rows."""
        return len(self._rows)

    def __getitem__(self, indices: Tensor) -> Prefix | Mapping[str, Any]:
        """Inputs of some kept rows, indices (m,) int64."""
        return self._source[self._rows[indices.to(self._rows.device)]]

    def prefetch(self, indices: Tensor) -> None:
        """Announces the kept rows that are asked for next."""
        self._source.prefetch(self._rows[indices.to(self._rows.device)])


@dataclass
class Rollout:
    """T chunks of B trajectories and the N chunks of them that were really executed.

    A trajectory is one environment's T chunks; with several rollout epochs every environment contributes several. The
    N executed chunks are ordered by epoch, then time, then environment; :meth:`of_chunks` brings per-trajectory
    tensors into that order.

    Attributes:
        rewards: (T, B) float32, sum of the rewards inside each chunk.
        terminated: (T, B) bool, the episode ended inside the chunk and has no future.
        truncated: (T, B) bool, the episode was cut at the time limit inside the chunk.
        valid: (T, B) bool, the chunk was executed and its simulator did not break down in it.
        groups: (B,) int64, the group of trajectories with a common initial state that each belongs to.
        values: (T, S, B) float32 of the chunks' transitions; None without a critic.
        next_values: (T, B) float32, value of what follows each chunk: of the final observation where truncated.
        x: (N, K + 1, H, D) denoising chains.
        step_index: (N, S) stochastic step of each transition, or None for chains scored as a whole.
        log_prob: (N, S, U).
        critic_input: (N, V, width), or None without a critic.
        critic_per_step: Whether each transition reads its own entry of ``critic_input``.
        inputs: The policy's input of every executed chunk; valid until the next rollout.
        epochs: E; the B trajectories are E blocks of environments.
        statistics: Of the episodes.
    """

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    groups: Tensor
    values: Tensor | None
    next_values: Tensor | None
    x: Tensor
    step_index: Tensor | None
    log_prob: Tensor
    critic_input: Tensor | None
    critic_per_step: bool
    inputs: InputSource[Prefix | Mapping[str, Any]]
    epochs: int
    statistics: RolloutStatistics

    @property
    def done(self) -> Tensor:
        """Whether the episode ended inside the chunk, either way: (T, B) bool."""
        return self.terminated | self.truncated

    def of_chunks(self, values: Tensor) -> Tensor:
        """Entries of the executed chunks in their order.

        Args:
            values: (T, B), or (T, S, B) with an entry per transition.

        Returns:
            (N, S); S = 1 for (T, B).
        """
        return in_order(values, self.valid, self.epochs)

    def buffer(self, advantages: Tensor, returns: Tensor | None) -> RolloutBuffer[Prefix | Mapping[str, Any]]:
        """The samples of the update.

        Args:
            advantages: (T, B), the same for all transitions of a chunk, or (T, S, B).
            returns: The same shapes, regression targets of the critic; None without a critic.
        """
        device = self.x.device
        transitions = self.log_prob.shape[1]

        def samples(values: Tensor | None) -> Tensor | None:
            return None if values is None else self.of_chunks(values).expand(-1, transitions).to(device)

        advantage_samples = samples(advantages)
        assert advantage_samples is not None
        return RolloutBuffer(
            x=self.x,
            step_index=self.step_index,
            log_prob=self.log_prob,
            advantages=advantage_samples,
            values=samples(self.values),
            returns=samples(returns),
            critic_input=self.critic_input,
            inputs=self.inputs,
            critic_per_step=self.critic_per_step,
        )

"""One rollout: the policy acts with noise in every environment for T chunks, and the buffer for PPO is filled."""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pi_rl.envs.vector_env import Observation, VectorEnv
from pi_rl.flow.chain import Chain
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.prefix_cache import PrefixStore
from pi_rl.progress import ProgressFn
from pi_rl.rl.advantages import gae
from pi_rl.rl.buffer import RolloutBuffer
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.rollout.randomness import TRAIN_STREAM, chunk_noise, training_state_ids

logger = logging.getLogger(__name__)


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
    """

    tasks: tuple[str, ...]
    per_task: np.ndarray
    env_steps: int = 0
    episodes: int = 0

    def add_episode(self, task: int, success: bool, length: int, reward: float) -> None:
        """Counts an environment's first episode: of task ``task``, ``length`` environment steps long."""
        self.per_task[task] += (1.0, float(success), float(length), reward)

    def as_tensor(self) -> Tensor:
        """Everything in one float64 vector, for one reduction over processes."""
        return torch.from_numpy(np.append(self.per_task.ravel(), [float(self.env_steps), float(self.episodes)]))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Rates from a (reduced) vector of :meth:`as_tensor`; a rate of no episodes is left out.

        Args:
            sums: (4 * tasks + 2,) float64.
        """
        table = sums[:-2].reshape(len(self.tasks), 4).cpu().numpy()
        total = table.sum(0)
        metrics = {"rollout/env_steps": float(sums[-2]), "rollout/episodes": float(sums[-1])}
        if total[0] > 0:
            metrics["rollout/success_rate"] = float(total[1] / total[0])
            metrics["rollout/episode_length"] = float(total[2] / total[0])
            metrics["rollout/return"] = float(total[3] / total[0])
        if len(self.tasks) > 1:
            for task, row in zip(self.tasks, table, strict=True):
                if row[0] > 0:
                    metrics[f"rollout/success_rate/{task}"] = float(row[1] / row[0])
        return metrics


@dataclass
class Rollout:
    """What one iteration learns from: the buffer and the statistics of the episodes in it."""

    buffer: RolloutBuffer[Prefix]
    statistics: RolloutStatistics


@dataclass
class _Record:
    """What the T chunks leave behind; lists hold one entry per chunk, arrays are (T, B)."""

    rewards: np.ndarray
    values: np.ndarray
    final_values: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    chains: list[Chain] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, chunks: int, num_envs: int) -> "_Record":
        """Zeros for T chunks of B environments."""
        shape = (chunks, num_envs)
        return cls(
            rewards=np.zeros(shape, np.float32),
            values=np.zeros((chunks + 1, num_envs), np.float32),
            final_values=np.zeros(shape, np.float32),
            terminated=np.zeros(shape, bool),
            truncated=np.zeros(shape, bool),
            valid=np.zeros(shape, bool),
        )


class RolloutCollector:
    """Runs the stochastic policy in a vector environment and returns what PPO needs.

    Every iteration begins with fresh episodes, so nothing of a simulator has to be saved for an exact resume. A
    finished environment is reset at once (``auto_reset``: more episodes per rollout) or not simulated any more.

    Args:
        env: The simulators of this process.
        model: Policy, critic and noise network.
        io: Processors around the policy.
        chunks: T, chunks per environment and rollout.
        gamma: Discount per chunk.
        gae_lambda: λ of GAE.
        seed: The run's seed.
        rank: This process's index; its environments are numbered from ``rank * env.num_envs``.
        auto_reset: Reset finished environments within a rollout.
        prefix_storage: "device" or "host", where prefixes wait for the update.
    """

    def __init__(
        self,
        env: VectorEnv,
        model: FlowActorCritic,
        io: PolicyIO,
        *,
        chunks: int,
        gamma: float,
        gae_lambda: float,
        seed: int,
        rank: int = 0,
        auto_reset: bool = True,
        prefix_storage: str = "device",
    ) -> None:
        self.env, self.model, self.io = env, model, io
        self.chunks, self.gamma, self.gae_lambda = chunks, gamma, gae_lambda
        self.seed, self.auto_reset = seed, auto_reset
        check_tasks_share_envs(env.num_envs, len(env.spec.tasks))
        self._prefixes = PrefixStore(prefix_storage, capacity=chunks * env.num_envs)
        self.env_index = rank * env.num_envs + np.arange(env.num_envs)
        self.task = self.env_index % len(env.spec.tasks)

    @torch.no_grad()
    def collect(self, iteration: int, progress: ProgressFn | None = None) -> Rollout:
        """Collects the rollout of one iteration.

        Args:
            iteration: Its number; with the seed it determines every random choice.
            progress: Called as ``progress(chunks done, T, text)``.

        Returns:
            The buffer of valid samples with advantages (not normalised) and returns, and episode statistics. Its
            prefixes are valid until the next call, which reuses their memory.
        """
        self.model.eval()
        self._begin(iteration)
        record = _Record.empty(self.chunks, self.env.num_envs)
        self._prefixes.clear()
        observation = self.env.reset(self._reset_ids())
        for step in range(self.chunks):
            rows = np.flatnonzero(self._running)
            if len(rows) == 0:
                break
            prefix, actions = self._act(observation, rows, step, record)
            self._prefixes.append(prefix)
            observation = self._simulate(actions, rows, step, record)
            if progress is not None:
                progress(step + 1, self.chunks, self._progress_text())
        self._bootstrap(observation, record)
        return Rollout(self._fill_buffer(record), self._statistics)

    def _begin(self, iteration: int) -> None:
        num_envs, tasks = self.env.num_envs, self.env.spec.tasks
        self._iteration = iteration
        self._episode = np.zeros(num_envs, np.int64)
        self._chunk = np.zeros(num_envs, np.int64)
        self._length = np.zeros(num_envs, np.int64)
        self._return = np.zeros(num_envs, np.float64)
        self._running = np.ones(num_envs, bool)
        self._ids = np.zeros((num_envs, 2), np.int64)
        self._statistics = RolloutStatistics(tasks, np.zeros((len(tasks), 4)))

    def _reset_ids(self, rows: np.ndarray | None = None) -> np.ndarray:
        rows = np.arange(self.env.num_envs) if rows is None else rows
        states = training_state_ids(self.seed, self._iteration, self.env_index[rows], self._episode[rows])
        self._ids[rows] = np.stack([self.task[rows], states], 1)
        return self._ids[rows]

    def _act(
        self, observation: Observation, rows: np.ndarray, step: int, record: _Record
    ) -> tuple[Prefix, np.ndarray]:
        policy, sampler = self.model.policy, self.model.sampler
        prefix = self.model("encode", batch=self.io.batch(observation, rows))
        noise = chunk_noise(
            (self.seed, TRAIN_STREAM, self._iteration),
            self._ids[rows],
            self._chunk[rows],
            denoising_steps=sampler.denoising_steps,
            chunk_shape=(policy.chunk_size, policy.max_action_dim),
            device=prefix.kv.device,
        )
        chain, log_prob = self.model(
            "sample",
            prefix=prefix,
            x_init=noise.x_init,
            eps=noise.eps,
            step_index=sampler.draw_step_index(noise.uniform),
        )
        record.chains.append(chain)
        record.log_probs.append(log_prob)
        record.values[step, rows] = self.model("value", prefix=prefix).cpu().numpy()
        record.valid[step, rows] = True
        return prefix, self.io.actions(chain.x[:, -1])

    def _simulate(self, actions: np.ndarray, rows: np.ndarray, step: int, record: _Record) -> Observation:
        full = np.zeros((self.env.num_envs, *actions.shape[1:]), np.float32)
        full[rows] = actions
        result = self.env.step_chunk(full, self._running)
        record.rewards[step] = result.rewards.sum(1)
        record.terminated[step], record.truncated[step] = result.terminated, result.truncated
        self._chunk[rows] += 1
        self._length += result.steps
        self._return += record.rewards[step]
        self._statistics.env_steps += int(result.steps.sum())
        cut = np.flatnonzero(result.truncated)
        if len(cut):
            record.final_values[step, cut] = self._values(result.observation, cut)
        observation = result.observation
        done = np.flatnonzero(result.terminated | result.truncated)
        self._statistics.episodes += len(done)
        for row in done[self._episode[done] == 0]:
            self._statistics.add_episode(
                self.task[row], bool(result.success[row]), self._length[row], self._return[row]
            )
        if len(done):
            observation = self._finish(done, observation, last=step + 1 == self.chunks)
        return observation

    def _finish(self, done: np.ndarray, observation: Observation, *, last: bool) -> Observation:
        """Begins the next episode of finished environments, or stops simulating them."""
        self._chunk[done], self._length[done], self._return[done] = 0, 0, 0.0
        if last or not self.auto_reset:
            self._running[done] = False
            return observation
        self._episode[done] += 1
        return self.env.reset(self._reset_ids(done), done)

    def _bootstrap(self, observation: Observation, record: _Record) -> None:
        """Values of the observations after the last chunk, for episodes that go on."""
        rows = np.flatnonzero(self._running)
        if len(rows):
            record.values[-1, rows] = self._values(observation, rows)

    def _values(self, observation: Observation, rows: np.ndarray) -> np.ndarray:
        prefix = self.model("encode", batch=self.io.batch(observation, rows))
        return self.model("value", prefix=prefix).cpu().numpy()

    def _fill_buffer(self, record: _Record) -> RolloutBuffer[Prefix]:
        truncated = torch.from_numpy(record.truncated)
        terminated = torch.from_numpy(record.terminated)
        valid = torch.from_numpy(record.valid)
        values = torch.from_numpy(record.values)
        next_values = torch.where(truncated, torch.from_numpy(record.final_values), values[1:])
        advantages, returns = gae(
            torch.from_numpy(record.rewards),
            values[:-1],
            next_values,
            terminated,
            terminated | truncated,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            valid=valid,
        )
        chains = record.chains
        device = chains[0].x.device
        indices = [chain.step_index for chain in chains if chain.step_index is not None]
        return RolloutBuffer(
            x=torch.cat([chain.x for chain in chains]),
            step_index=torch.cat(indices) if indices else None,
            log_prob=torch.cat(record.log_probs),
            values=values[:-1][valid].to(device),
            advantages=advantages[valid].to(device),
            returns=returns[valid].to(device),
            prefix=self._prefixes,
        )

    def _progress_text(self) -> str:
        episodes, successes = self._statistics.per_task.sum(0)[:2]
        rate = f"{successes / episodes:.2f}" if episodes else "–"
        return f"success {rate}"


def check_tasks_share_envs(num_envs: int, num_tasks: int) -> None:
    """Every task needs the same number of the environments of a process.

    Raises:
        ValueError: With numbers that would do.
    """
    if num_envs % num_tasks:
        lower = max(num_envs // num_tasks, 1) * num_tasks
        raise ValueError(
            f"{num_envs} environments per process cannot be shared equally by {num_tasks} tasks; use {lower} or "
            f"{lower + num_tasks} per process."
        )


def warn_about_short_rollouts(chunks: int, n_action_steps: int, max_episode_steps: int) -> None:
    """Says when rollouts end before episodes do, and how many chunks would cover an episode."""
    covered, needed = chunks * n_action_steps, -(-max_episode_steps // n_action_steps)
    if covered < max_episode_steps:
        logger.warning(
            f"A rollout of {chunks} chunks x {n_action_steps} steps = {covered} steps is shorter than an episode "
            f"({max_episode_steps} steps): what lies beyond is never trained on, and the success rate of rollouts "
            f"counts only what ended. Use rollout_chunks={needed} or more."
        )

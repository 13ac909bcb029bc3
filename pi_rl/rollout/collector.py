"""One rollout: the policy acts with noise in every environment for T chunks, and what was done is kept."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi_rl.envs.vector_env import ChunkResult, Observation, VectorEnv
from pi_rl.policies.actor_critic import FlowActorCritic, Sample
from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.input_storage import InputStorage
from pi_rl.policies.observation_store import ObservationStore
from pi_rl.policies.prefix_cache import PrefixStore
from pi_rl.progress import ProgressFn
from pi_rl.rollout.policy_io import PolicyIO, blank_observation
from pi_rl.rollout.randomness import (
    TRAIN_STREAM,
    ChunkNoise,
    chunk_noise,
    shared_uniform,
    training_state_ids,
)
from pi_rl.rollout.rollout import KeptInputs, Rollout, RolloutStatistics, in_order
from pi_rl.rollout.stages import Stage, check_stages, make_stages

logger = logging.getLogger(__name__)


@dataclass
class _Record:
    """One rollout epoch: arrays are (T, B) or, for values, (T, S, B); ``samples`` holds one entry per chunk."""

    rewards: np.ndarray
    values: np.ndarray
    last_values: np.ndarray
    final_values: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    lost: np.ndarray
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def empty(cls, chunks: int, transitions: int, num_envs: int) -> "_Record":
        """Zeros for T chunks of B environments."""
        shape = (chunks, num_envs)
        return cls(
            rewards=np.zeros(shape, np.float32),
            values=np.zeros((chunks, transitions, num_envs), np.float32),
            last_values=np.zeros(num_envs, np.float32),
            final_values=np.zeros(shape, np.float32),
            terminated=np.zeros(shape, bool),
            truncated=np.zeros(shape, bool),
            valid=np.zeros(shape, bool),
            lost=np.zeros(shape, bool),
        )

    def lose(self, step: int, rows: np.ndarray, *, whole: bool) -> None:
        """Takes chunks out in which a simulator broke down; what came before ends there, with the value it led to.

        Args:
            step: The chunk.
            rows: Environments that broke down in it.
            whole: Take out everything that these environments did, not only this chunk.
        """
        if whole:
            self.lost[:, rows] |= self.valid[:, rows]
        else:
            self.lost[step, rows] = True
            if step > 0:
                going = rows[~(self.terminated | self.truncated)[step - 1, rows] & self.valid[step - 1, rows]]
                self.truncated[step - 1, going] = True
                self.final_values[step - 1, going] = self.values[step, 0, going]
        self.valid &= ~self.lost

    def next_values(self) -> np.ndarray:
        """Value of what follows each chunk, (T, B): of the final observation where an episode was truncated."""
        following = np.concatenate([self.values[1:, 0], self.last_values[None]])
        return np.where(self.truncated, self.final_values, following)


class RolloutCollector:
    """Runs the stochastic policy in a vector environment and returns what an algorithm learns from.

    Every iteration begins with fresh episodes, so nothing of a simulator has to be saved for an exact resume. A
    finished environment is reset at once (``auto_reset``: more episodes per rollout) or not simulated any more.

    With two stages one half of the environments is simulated while the policy infers for the other. Stages take turns
    and hold consecutive environments, so everything is stored in the order of one stage.

    Args:
        env: The simulators of this process.
        model: Policy, critic and noise network.
        io: Processors around the policy.
        chunks: T, chunks per environment and rollout epoch.
        seed: The run's seed.
        rank: This process's index; its environments are numbered from ``rank * env.num_envs``.
        processes: Number of processes, each with as many environments.
        epochs: E, how often T chunks are collected per iteration, each time with fresh episodes.
        group_size: Environments that start each episode from the same initial state.
        auto_reset: Reset finished environments within a rollout; not with groups, whose episodes differ in length.
        storage: Opens the store in which the policy's inputs wait for the update; by default the device keeps
            prefixes, or observations where prefixes are live.
        pipeline_stages: 1, or 2 to overlap simulation and inference.
        inference_batch_size: Environments of one pass of the network, consecutive ones of a stage; those that are not
            running are left out of it. None means the whole stage. Equal passes give equal bits: n environments in
            two stages do what they do in one stage with passes of n / 2.
        agree: Whether any process says yes. Asked before every call of the policy, with whether this process has
            rows for it: where calls are collective, one without rows joins in with a row of no consequence.

    Raises:
        ValueError: If the environments do not divide into groups, or the groups into stages.
    """

    def __init__(
        self,
        env: VectorEnv,
        model: FlowActorCritic,
        io: PolicyIO,
        *,
        chunks: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        epochs: int = 1,
        group_size: int = 1,
        auto_reset: bool = True,
        storage: InputStorage | None = None,
        pipeline_stages: int = 1,
        inference_batch_size: int | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        check_groups(env.num_envs, group_size, auto_reset=auto_reset)
        check_stages(env.num_envs, group_size, pipeline_stages, inference_batch_size)
        self.env, self.model, self.io = env, model, io
        self.chunks, self.epochs, self.seed, self.auto_reset = chunks, epochs, seed, auto_reset
        live = model.policy.prefix_is_live
        self._storage = storage or InputStorage("auto" if live else "device", live=live)
        self._inputs: PrefixStore | ObservationStore | None = None  # opened at the first observation
        self.env_index = rank * env.num_envs + np.arange(env.num_envs)
        self.group_size = group_size
        self._group = self.env_index // group_size
        self._total_groups = processes * env.num_envs // group_size
        self._member = self.env_index % group_size
        self._stages = make_stages(env.num_envs, pipeline_stages, inference_batch_size)
        if pipeline_stages > 1:
            env.arrange([np.concatenate(stage.blocks) for stage in self._stages])
        self._agree = agree
        self._blank = blank_observation(env.spec)

    @torch.no_grad()
    def collect(self, iteration: int, progress: ProgressFn | None = None) -> Rollout:
        """Collects the rollout of one iteration.

        Args:
            iteration: Its number; with the seed it determines every random choice.
            progress: Called as ``progress(chunks done, E * T, text)``.

        Returns:
            The trajectories and statistics. Its policy inputs are valid until the next call, which reuses their
            memory.
        """
        self.model.eval()
        self._iteration, self._started = iteration, time.perf_counter()
        if self._inputs is not None:
            self._inputs.clear()
        tasks = self.env.spec.tasks
        self._statistics = RolloutStatistics(tasks, np.zeros((len(tasks), 4)))
        restarts = self.env.worker_restarts
        records = [self._collect_epoch(epoch, progress) for epoch in range(self.epochs)]
        self._statistics.restarts = self.env.worker_restarts - restarts
        return self._assemble(records)

    def _collect_epoch(self, epoch: int, progress: ProgressFn | None) -> _Record:
        self._begin(epoch)
        record = _Record.empty(self.chunks, self.model.sampler.transitions, self.env.num_envs)
        first = self.env.reset(self._reset_ids())
        for stage in self._stages:
            stage.observation = first
        for step in range(self.chunks + 1):
            for stage in self._stages:
                if step > 0:
                    self._finish_chunk(stage, step - 1, record)
                if step < self.chunks:
                    self._start_chunk(stage, step, record)
            if step > 0 and progress is not None:
                progress(epoch * self.chunks + step, self.epochs * self.chunks, self._progress_text())
        for stage in self._stages:
            rows = np.flatnonzero(self._running)
            record.last_values += self._values(stage, stage.observation, rows, self.chunks)
        return record

    def _begin(self, epoch: int) -> None:
        num_envs = self.env.num_envs
        self._epoch = epoch
        # tasks take turns where they do not share the groups equally; where they do, a simulator keeps its task
        turn = self._iteration * self.epochs + epoch
        self.task = (self._group + turn * self._total_groups) % len(self.env.spec.tasks)
        self._episode = np.zeros(num_envs, np.int64)
        self._chunk = np.zeros(num_envs, np.int64)
        self._length = np.zeros(num_envs, np.int64)
        self._return = np.zeros(num_envs, np.float64)
        self._running = np.ones(num_envs, bool)
        self._ids = np.zeros((num_envs, 2), np.int64)

    def _reset_ids(self, rows: np.ndarray | None = None) -> np.ndarray:
        rows = np.arange(self.env.num_envs) if rows is None else rows
        episodes = self._episode[rows]
        states = training_state_ids(self.seed, self._iteration, self._group[rows], episodes, self._epoch)
        self._ids[rows] = np.stack([self.task[rows], states], 1)
        return self._ids[rows]

    def _noise(self, rows: np.ndarray, step: int, device: torch.device) -> ChunkNoise:
        """The random numbers of the next chunk of some environments, or of one of no consequence."""
        rows = rows if len(rows) else np.zeros(1, np.int64)
        policy, sampler = self.model.policy, self.model.sampler
        noise = chunk_noise(
            (self.seed, TRAIN_STREAM, self._iteration),
            self._ids[rows],
            self._chunk[rows],
            denoising_steps=sampler.denoising_steps,
            chunk_shape=(policy.chunk_size, policy.max_action_dim),
            members=self._member[rows],
            device=device,
        )
        if sampler.step_draw == "batch":
            shared = shared_uniform((self.seed, self._iteration, self._epoch, step))
            noise = ChunkNoise(noise.x_init, noise.eps, torch.full_like(noise.uniform, shared))
        return noise

    def _start_chunk(self, stage: Stage, step: int, record: _Record) -> None:
        """Acts in the running environments of a stage and has them simulated."""
        spec, running = self.env.spec, np.zeros(self.env.num_envs, bool)
        actions = np.zeros((self.env.num_envs, self.io.n_action_steps, spec.action_dim), np.float32)
        for block in stage.blocks:
            rows = block[self._running[block]]
            if self._agree(len(rows) > 0):
                acted = self._act(stage.observation, rows, step, record)
                actions[rows], running[rows] = acted[: len(rows)], True
        stage.simulated = np.flatnonzero(running)
        if len(stage.simulated):
            self.env.start_chunk(actions, running)

    def _act(self, observation: Observation, rows: np.ndarray, step: int, record: _Record) -> np.ndarray:
        """Actions (n, C, A) of one pass of the network, whose samples are kept; without rows nothing is."""
        batch = self._batch(observation, rows)
        prefix = self.model("encode", batch=batch)
        if self._inputs is None and len(rows):
            execution = self.model.execution
            self._inputs = self._storage.open(batch, prefix, self.epochs * self.chunks * self.env.num_envs)
            if self.model.execution != execution:  # the update will encode again, in passes of these rows
                prefix = self.model("encode", batch=batch)
        noise = self._noise(rows, step, prefix.pad_mask.device)
        sample: Sample = self.model(
            "sample",
            prefix=prefix,
            x_init=noise.x_init,
            eps=noise.eps,
            step_index=self.model.sampler.draw_step_index(noise.uniform),
        )
        if len(rows) == 0:
            return np.zeros((0, self.io.n_action_steps, self.env.spec.action_dim), np.float32)
        self._keep(batch, prefix)
        record.samples.append(sample)
        if sample.values is not None:
            record.values[step][:, rows] = sample.values.T.cpu().numpy()
        record.valid[step, rows] = True
        return self.io.actions(sample.chain.x[:, -1], observation, rows)

    def _batch(self, observation: Observation, rows: np.ndarray) -> dict[str, Any]:
        """The policy's input for some rows, or for one of no consequence where there are none."""
        return self.io.batch(observation, rows) if len(rows) else self.io.batch(self._blank, [0])

    def _keep(self, batch: Mapping[str, Any], prefix: Prefix) -> None:
        """Stores what the update needs: the prefix, or the observation where the prefix has to be computed anew."""
        if isinstance(self._inputs, ObservationStore):
            self._inputs.append(batch)
        elif self._inputs is not None:
            self._inputs.append(prefix)

    def close(self) -> None:
        """Gives the memory of the stored inputs back."""
        if self._inputs is not None:
            self._inputs.close()

    def _finish_chunk(self, stage: Stage, step: int, record: _Record) -> None:
        """Waits for the simulation of a stage, notes its outcome, and begins the next episodes."""
        rows = stage.simulated
        cut, result = rows[:0], None
        if len(rows):
            result = self.env.finish_chunk()
            stage.observation = result.observation
            self._note(result, rows, step, record)
            cut = np.flatnonzero(result.truncated)
        values = self._values(stage, stage.observation, cut, step + 1)
        if result is None:
            return
        record.final_values[step, cut] = values[cut]
        ended = np.flatnonzero(result.terminated | result.truncated)
        self._statistics.episodes += len(ended)
        for row in ended[self._episode[ended] == 0]:
            self._statistics.add_episode(
                self.task[row], bool(result.success[row]), self._length[row], self._return[row]
            )
        done = np.flatnonzero(result.done)
        if len(done):
            stage.observation = self._finish(done, stage.observation, last=step + 1 == self.chunks)

    def _note(self, result: ChunkResult, rows: np.ndarray, step: int, record: _Record) -> None:
        record.rewards[step, rows] = result.rewards.sum(1)[rows]
        record.terminated[step, rows], record.truncated[step, rows] = result.terminated[rows], result.truncated[rows]
        self._chunk[rows] += 1
        self._length[rows] += result.steps[rows]
        self._return[rows] += record.rewards[step, rows]
        self._statistics.env_steps += int(result.steps.sum())
        failed = np.flatnonzero(result.failed)
        if len(failed):  # a group compares whole episodes, so one that broke down takes all of itself out
            record.lose(step, failed, whole=self.group_size > 1)
            self._statistics.failed += len(failed)

    def _finish(self, done: np.ndarray, observation: Observation, *, last: bool) -> Observation:
        """Begins the next episode of finished environments, or stops simulating them."""
        self._chunk[done], self._length[done], self._return[done] = 0, 0, 0.0
        if last or not self.auto_reset:
            self._running[done] = False
            return observation
        self._episode[done] += 1
        return self.env.reset(self._reset_ids(done), done)

    def _values(self, stage: Stage, observation: Observation, rows: np.ndarray, step: int) -> np.ndarray:
        """Values (B,) of observations that the policy does not act on; 0 without a critic and for other rows.

        Args:
            stage: Whose rows are valued.
            observation: Of all environments.
            rows: Environments to value; those of other stages are left out.
            step: The chunk that would begin with the observation.
        """
        values = np.zeros(self.env.num_envs, np.float32)
        for block in stage.blocks if self.model.value_head is not None else ():
            part = np.intersect1d(block, rows)
            if self._agree(len(part) > 0):
                values[part] = self._values_of(observation, part, step)[: len(part)]
        return values

    def _values_of(self, observation: Observation, rows: np.ndarray, step: int) -> np.ndarray:
        head = self.model.value_head
        assert head is not None
        prefix = self.model("encode", batch=self._batch(observation, rows))
        if head.critic == "vlm":
            return self.model("value", prefix=prefix).cpu().numpy()
        noise = self._noise(rows, step, prefix.pad_mask.device)
        index = self.model.sampler.draw_step_index(noise.uniform)
        values = self.model("value", prefix=prefix, x_init=noise.x_init, eps=noise.eps, step_index=index)
        return values.cpu().numpy()

    def _assemble(self, records: list[_Record]) -> Rollout:
        def columns(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(record, name) for record in records], axis=-1))

        valid, lost = columns("valid"), columns("lost")
        rewards, truncated = columns("rewards"), columns("truncated")
        next_values = np.concatenate([record.next_values() for record in records], axis=-1)
        if not valid.any():  # a process without any sample could not take part in the update: one counts as no news
            step, column = lost.nonzero()[0].tolist()
            valid[step, column], lost[step, column] = True, False
            truncated[step, column], rewards[step, column] = True, 0.0
            epoch, env = divmod(column, self.env.num_envs)
            next_values[step, column] = records[epoch].values[step, 0, env]
        kept = in_order(valid, valid | lost, self.epochs)[:, 0]
        stored: Any = self._inputs
        inputs = stored if kept.all() else KeptInputs(stored, kept.nonzero()[:, 0])

        def of_kept(tensors: list[Tensor]) -> Tensor:
            every = torch.cat(tensors)
            return every if kept.all() else every[kept.to(every.device)]

        samples = [sample for record in records for sample in record.samples]
        indices = [sample.chain.step_index for sample in samples if sample.chain.step_index is not None]
        x = of_kept([sample.chain.x for sample in samples])
        sampler = self.model.sampler
        step_index = of_kept(indices)[:, None] if indices else None
        if sampler.mdp == "two_layer":
            steps = torch.tensor(list(sampler.stochastic_steps), device=x.device)
            step_index = steps.expand(len(x), -1)
        critic = [sample.critic_input for sample in samples if sample.critic_input is not None]
        num_envs, groups = self.env.num_envs, self.env.num_envs // self.group_size
        epoch_of = np.repeat(np.arange(self.epochs), num_envs)
        group_of = np.tile(np.arange(num_envs) // self.group_size, self.epochs)
        group = torch.from_numpy(epoch_of * groups + group_of)
        gone = lost.any(0) & ~valid.any(0)  # alone in a group it compares with nobody
        group[gone] = group.max() + 1 + torch.arange(int(gone.sum()))
        return Rollout(
            rewards=rewards,
            terminated=columns("terminated"),
            truncated=truncated,
            valid=valid,
            groups=group,
            values=columns("values") if critic else None,
            next_values=torch.from_numpy(next_values) if critic else None,
            x=x,
            step_index=step_index,
            log_prob=of_kept([sample.log_prob for sample in samples]),
            critic_input=of_kept(critic) if critic else None,
            critic_per_step=self.model.critic_per_step,
            inputs=inputs,
            epochs=self.epochs,
            statistics=self._statistics,
        )

    def _progress_text(self) -> str:
        episodes, successes = self._statistics.per_task.sum(0)[:2]
        rate = f"{successes / episodes:.2f}" if episodes else "–"
        steps = self._statistics.env_steps
        return f"success {rate}  {steps:,} steps  {steps / (time.perf_counter() - self._started):.0f}/s"


def check_groups(num_envs: int, group_size: int, *, auto_reset: bool) -> None:
    """Groups fill the environments of a process, and their episodes are whole.

    Raises:
        ValueError: With numbers that would do.
    """
    if group_size > 1 and auto_reset:
        raise ValueError(
            f"group_size={group_size} compares whole episodes from one initial state; set auto_reset=false, so that "
            "every environment runs one episode."
        )
    if num_envs % group_size:
        lower = max(num_envs // group_size, 1) * group_size
        raise ValueError(
            f"{num_envs} environments per process do not divide into groups of {group_size}; use {lower} or "
            f"{lower + group_size} per process."
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

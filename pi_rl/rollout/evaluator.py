"""Deterministic evaluation: every fixed initial state once, actions by the ODE."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pi_rl.envs.vector_env import ChunkResult, EnvSpec, Observation, VectorEnv
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.progress import ProgressFn
from pi_rl.rollout.policy_io import PolicyIO, blank_observation
from pi_rl.rollout.randomness import EVAL_STREAM, chunk_noise
from pi_rl.rollout.summary import EvalSummary, summarize_episodes


@dataclass(frozen=True)
class EpisodeResults:
    """Outcome of evaluation episodes, in the order of their initial states.

    Attributes:
        spec: Of the environment.
        reset_ids: (n, 2) task index and state id of each episode.
        success: (n,) bool.
        length: (n,) environment steps.
        returns: (n,) sum of rewards.
        failed: (n,) bool, the simulator broke down, also when the episode was tried again; these count as unsolved.
    """

    spec: EnvSpec
    reset_ids: np.ndarray
    success: np.ndarray
    length: np.ndarray
    returns: np.ndarray
    failed: np.ndarray

    @classmethod
    def empty(cls, spec: EnvSpec, reset_ids: np.ndarray) -> "EpisodeResults":
        """Results to be filled in."""
        n = len(reset_ids)
        numbers = np.zeros(n, bool), np.zeros(n, np.int64), np.zeros(n), np.zeros(n, bool)
        return cls(spec, reset_ids, *numbers)

    def summary(self) -> EvalSummary:
        """Success rate with interval, episode length and return, in total, per task and per group of tasks."""
        names = [self.spec.tasks[task] for task in self.reset_ids[:, 0]]
        outcome = (self.success.tolist(), self.length.tolist(), self.returns.tolist())
        return summarize_episodes(names, *outcome, self.spec.task_groups, self.spec.subtasks)


def evaluation_ids(spec: EnvSpec, episodes: int) -> np.ndarray:
    """The fixed initial states: the same number for every task, from the range that training never draws.

    Args:
        spec: Knows the tasks and how many evaluation states they have.
        episodes: Number of initial states in total, a multiple of the number of tasks.

    Returns:
        (episodes, 2) int64, task index and state id; tasks alternate, state ids count from 0.

    Raises:
        ValueError: When ``episodes`` does not divide by the number of tasks or exceeds the states that there are.
    """
    num_tasks = len(spec.tasks)
    if episodes < 1 or episodes % num_tasks:
        lower = max(episodes // num_tasks, 1) * num_tasks
        raise ValueError(
            f"{episodes} evaluation episodes cannot be shared equally by {num_tasks} tasks; "
            f"use {lower} or {lower + num_tasks}."
        )
    if episodes // num_tasks > spec.eval_states:
        raise ValueError(
            f"{episodes} evaluation episodes are {episodes // num_tasks} of each task, but {spec.name} has only "
            f"{spec.eval_states} evaluation states per task: use at most {spec.eval_states * num_tasks}."
        )
    order = np.arange(episodes)
    return np.stack([order % num_tasks, order // num_tasks], 1).astype(np.int64)


@torch.no_grad()
def evaluate_policy(
    model: FlowActorCritic,
    env: VectorEnv,
    io: PolicyIO,
    reset_ids: np.ndarray,
    *,
    seed: int = 0,
    denoising_steps: int | None = None,
    batch_size: int | None = None,
    progress: ProgressFn | None = None,
    on_episode: Callable[[EpisodeResults, int], None] | None = None,
    agree: Callable[[bool], bool] = bool,
) -> EpisodeResults:
    """Runs one episode from every given initial state, without exploration noise.

    The initial noise of each chunk is derived from (seed, initial state, chunk), so the result does not depend on
    the number of workers or on what the simulators did before. Every state is run exactly once, hence short
    episodes are not favoured.

    Args:
        model: Policy to evaluate; the critic is not used.
        env: Simulators; all of them are reset.
        io: Processors around the policy.
        reset_ids: (n, 2) task index and state id.
        seed: Seed of the flow's initial noise.
        denoising_steps: K of the ODE; the sampler's by default.
        batch_size: As for :func:`ode_actions`; with it the result does not depend on the number of environments
            either, nor on which episodes run together.
        progress: Called as ``progress(episodes done, n, text)`` after every chunk, also by a process without episodes.
        on_episode: Called as ``on_episode(results, i)`` when episode i has ended and its row is complete.
        agree: As for :class:`~pi_rl.rollout.collector.RolloutCollector`; a process without episodes then goes on
            until the last process has none.

    Returns:
        Success, length and return of the n episodes, in the order of ``reset_ids``. An episode whose simulator breaks
        down is tried once more.
    """
    results = EpisodeResults.empty(env.spec, reset_ids)
    was_training = model.training
    model.eval()
    queue = _EpisodeQueue(reset_ids, env.num_envs)
    slots = queue.next_for(np.arange(env.num_envs if len(reset_ids) else 0))
    observation = env.reset(reset_ids[queue.episode[slots]], slots) if len(slots) else blank_observation(env.spec)
    done_count = 0
    while agree(len(rows := np.flatnonzero(queue.episode >= 0)) > 0):
        actions = np.zeros((env.num_envs, io.n_action_steps, env.spec.action_dim), np.float32)
        actions[rows] = ode_actions(
            model,
            io,
            observation,
            rows,
            reset_ids[queue.episode[rows]],
            queue.chunk[rows],
            seed=seed,
            denoising_steps=denoising_steps,
            batch_size=batch_size,
            agree=agree,
        )
        if len(rows) == 0:
            if progress is not None:  # may end a run, on all processes of a sharded model together
                progress(done_count, len(reset_ids), "")
            continue
        result = env.step_chunk(actions, queue.episode >= 0)
        observation = result.observation
        queue.chunk[rows] += 1
        results.length[queue.episode[rows]] += result.steps[rows]
        results.returns[queue.episode[rows]] += result.rewards[rows].sum(1)
        ended = _end_episodes(results, queue, result)
        done_count += len(ended)
        if on_episode is not None:
            for episode in ended:
                on_episode(results, episode)
        if progress is not None:
            progress(done_count, len(reset_ids), _success_so_far(results, done_count))
        refilled = queue.next_for(np.flatnonzero(result.done))
        if len(refilled):
            observation = env.reset(reset_ids[queue.episode[refilled]], refilled)
    model.train(was_training)
    return results


def _success_so_far(results: EpisodeResults, done_count: int) -> str:
    return f"success {results.success.sum() / done_count:.2f}" if done_count else ""


def _end_episodes(results: EpisodeResults, queue: "_EpisodeQueue", result: ChunkResult) -> list[int]:
    """Notes the outcome of episodes that are over and returns them; a broken one may be put back into the queue."""
    ended = []
    for slot in np.flatnonzero(result.done):
        episode = int(queue.episode[slot])
        if result.failed[slot] and queue.put_back(slot):
            results.length[episode], results.returns[episode] = 0, 0.0
            continue
        results.success[episode], results.failed[episode] = result.success[slot], result.failed[slot]
        ended.append(episode)
    return ended


class _EpisodeQueue:
    """Which episode runs in which environment; -1 where none is left.

    An environment is given episodes of the task it already holds, so that no simulator is built twice.
    """

    def __init__(self, reset_ids: np.ndarray, num_envs: int) -> None:
        self.episode = np.full(num_envs, -1, np.int64)
        self.chunk = np.zeros(num_envs, np.int64)
        self._task = np.full(num_envs, -1, np.int64)
        self._waiting = {
            int(task): list(np.flatnonzero(reset_ids[:, 0] == task)) for task in np.unique(reset_ids[:, 0])
        }
        self._tried_again: set[int] = set()

    def put_back(self, slot: int) -> bool:
        """Lets the slot's episode be run once more; returns whether it may, which is the case one time."""
        episode = int(self.episode[slot])
        if episode in self._tried_again:
            return False
        self._tried_again.add(episode)
        self._waiting[int(self._task[slot])].append(episode)  # last, so that two bad states do not follow each other
        return True

    def next_for(self, slots: np.ndarray) -> np.ndarray:
        """Gives each slot its next episode; returns the slots that got one."""
        for slot in slots:
            self.episode[slot] = -1
            waiting = self._waiting[self._choose_task(slot)]
            if waiting:
                self.episode[slot] = waiting.pop(0)
            self.chunk[slot] = 0
        return slots[self.episode[slots] >= 0]

    def _choose_task(self, slot: int) -> int:
        """The slot's own task while it lasts, then one that waits and that no environment works on."""
        if self._task[slot] < 0:
            self._task[slot] = list(self._waiting)[slot % len(self._waiting)]
        if not self._waiting[int(self._task[slot])]:
            served = set(self._task[self.episode >= 0].tolist())
            orphans = [task for task, waiting in self._waiting.items() if waiting and task not in served]
            if orphans:
                self._task[slot] = orphans[0]
        return int(self._task[slot])


def ode_actions(
    model: FlowActorCritic,
    io: PolicyIO,
    observation: Observation,
    rows: np.ndarray,
    reset_ids: np.ndarray,
    chunk: np.ndarray,
    *,
    seed: int,
    denoising_steps: int | None = None,
    batch_size: int | None = None,
    agree: Callable[[bool], bool] = bool,
) -> np.ndarray:
    """Actions (n, C, A) of the deterministic policy for n rows of an observation.

    Args:
        model: Policy, critic, sampler.
        io: Processors around the policy.
        observation: Of all B environments.
        rows: (n,) rows to act for.
        reset_ids: (n, 2) initial states of their episodes.
        chunk: (n,) chunks that each of these episodes has executed.
        seed: Seed of the flow's initial noise.
        denoising_steps: K of the ODE; the sampler's by default.
        batch_size: Every pass of the network gets so many rows, filled up by repetition: matrix products of another
            shape round otherwise, and with one shape a row's actions do not depend on its neighbours. None passes
            all n rows at once.
        agree: Whether any process says yes. Asked before every further pass, whether this process has rows for it;
            the first pass, and what another process needs, is made without rows with one of no consequence.
    """
    size = batch_size or len(rows)
    parts, start = [], 0
    while True:
        part = np.arange(start, min(start + size, len(rows)))
        if len(part):
            full = part if batch_size is None else np.resize(part, batch_size)
            inputs = (observation, rows[full], reset_ids[full], chunk[full])
        else:  # another process has rows: this one joins in with one of no consequence
            zero = np.zeros(1, np.int64)
            inputs = (blank_observation(io.spec), zero, np.zeros((1, 2), np.int64), zero)
        parts.append(_ode_pass(model, io, *inputs, seed=seed, denoising_steps=denoising_steps)[: len(part)])
        start += size
        if batch_size is None or not agree(start < len(rows)):
            return np.concatenate(parts)


def _ode_pass(
    model: FlowActorCritic,
    io: PolicyIO,
    observation: Observation,
    rows: np.ndarray,
    reset_ids: np.ndarray,
    chunk: np.ndarray,
    *,
    seed: int,
    denoising_steps: int | None,
) -> np.ndarray:
    """One pass of the network; arguments as for `ode_actions`."""
    policy = model.policy
    prefix = model("encode", batch=io.batch(observation, rows), pooled=False)
    noise = chunk_noise(
        (seed, EVAL_STREAM),
        reset_ids,
        chunk,
        denoising_steps=0,
        chunk_shape=(policy.chunk_size, policy.max_action_dim),
        device=prefix.pad_mask.device,
    )
    chunk_actions = model("ode", prefix=prefix, x_init=noise.x_init, denoising_steps=denoising_steps)
    return io.actions(chunk_actions, observation, rows)


@torch.no_grad()
def record_episode(
    model: FlowActorCritic,
    env: VectorEnv,
    io: PolicyIO,
    reset_id: np.ndarray,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    size: tuple[int, int] = (240, 240),
    every: int = 1,
) -> tuple[np.ndarray, bool]:
    """Films the deterministic policy from one initial state, in environment 0.

    Args:
        model: Policy.
        env: Simulators; only environment 0 is used.
        io: Processors around the policy.
        reset_id: (2,) task index and state id.
        seed: Seed of the flow's initial noise, as in :func:`evaluate_policy`.
        batch_size: As in :func:`evaluate_policy`; with the same one the episode is the evaluated one.
        size: Height and width of the frames in pixels.
        every: Environment steps between frames.

    Returns:
        Frames uint8 (n, height, width, 3) from the first to the last observation, and whether the episode succeeded.
    """
    model.eval()
    rows = np.zeros(1, np.int64)
    active = np.arange(env.num_envs) == 0
    observation = env.reset(reset_id[None], rows)
    frames = [env.render(rows, *size)[0]]
    chunk, steps = np.zeros(1, np.int64), 0
    while True:
        actions = ode_actions(model, io, observation, rows, reset_id[None], chunk, seed=seed, batch_size=batch_size)
        for step in range(actions.shape[1]):
            single = np.zeros((env.num_envs, 1, env.spec.action_dim), np.float32)
            single[0] = actions[0, step]
            result = env.step_chunk(single, active)
            observation, steps = result.observation, steps + 1
            ended = bool(result.done[0])
            if not result.failed[0] and (ended or steps % every == 0):
                frames.append(env.render(rows, *size)[0])
            if ended:
                return np.stack(frames), bool(result.success[0])
        chunk += 1

"""Success rates with intervals from evaluation episodes. Standard library only."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pi_rl.rollout.sequences import SequenceSummary, summarize_sequences


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion.

    centre ± half with centre = (p + z²/2n) / (1 + z²/n) and
    half = z / (1 + z²/n) · sqrt(p(1 − p)/n + z²/4n²), p = successes / n. Unlike p ± z·s.e. it stays inside
    [0, 1] and does not collapse at 0 or n successes.

    Args:
        successes: Number of successful episodes, 0 … n.
        n: Number of episodes, at least 1.
        z: Standard normal quantile; 1.96 gives a two-sided 95 % interval.

    Returns:
        Lower and upper end, both in [0, 1].

    Raises:
        ValueError: If n is not positive or successes lies outside 0 … n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"wilson_interval got {successes} successes in {n} episodes; it needs 0 <= successes <= n, n >= 1."
        )
    p = successes / n
    scale = 1.0 / (1.0 + z * z / n)
    centre = scale * (p + z * z / (2 * n))
    half = scale * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 or n successes one end is exactly the proportion; rounding would put it 1e-17 beside it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """Success, length and return of the evaluation episodes of one task.

    Attributes:
        success_rate: Share of successful episodes, in [0, 1].
        n_episodes: Number of evaluation episodes.
        ci95: Wilson 95 % interval of the success rate.
        mean_episode_length: Mean number of environment steps per episode; failed episodes count at the time limit.
        mean_return: Mean sum of rewards per episode, in the environment's units.
    """

    success_rate: float
    n_episodes: int
    ci95: tuple[float, float]
    mean_episode_length: float
    mean_return: float


@dataclass(frozen=True, kw_only=True)
class EvalSummary(TaskSummary):
    """Success and length over all evaluation episodes, and the same numbers per task and per group of tasks.

    Attributes:
        per_task: Summary of each task, keyed by task name.
        per_group: Summary of the episodes of each group of tasks, such as "easy"; empty where there are no groups.
        sequences: How far episodes got that consist of several subtasks; None where they do not.
    """

    per_task: dict[str, TaskSummary] = field(default_factory=dict)
    per_group: dict[str, TaskSummary] = field(default_factory=dict)
    sequences: SequenceSummary | None = None

    @property
    def mean_of_tasks(self) -> TaskSummary | None:
        """The mean of the tasks' numbers; with equally many episodes each, the success rate over all episodes."""
        return mean_summary(list(self.per_task.values())) if self.per_task else None

    @property
    def mean_of_groups(self) -> TaskSummary | None:
        """The mean of the groups' numbers, however many tasks each has: "Avg." in the paper's MetaWorld table."""
        return mean_summary(list(self.per_group.values())) if self.per_group else None

    def metrics(self) -> dict[str, float]:
        """What a log shows, by name without prefix.

        A group's rate stands beside the tasks', under `success_rate/<group>`.
        """
        metrics = {
            "success_rate": self.success_rate,
            "ci95_low": self.ci95[0],
            "ci95_high": self.ci95[1],
            "episode_length": self.mean_episode_length,
            "return": self.mean_return,
            "n_episodes": float(self.n_episodes),
        }
        if self.mean_of_groups is not None:
            metrics["success_rate_mean_of_groups"] = self.mean_of_groups.success_rate
        if self.sequences is not None:
            metrics |= self.sequences.metrics()
        parts = self.per_group | self.per_task
        return metrics | {f"success_rate/{name}": part.success_rate for name, part in parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; intervals become lists, and the means over tasks and groups are written out."""
        means = {"mean_of_tasks": self.mean_of_tasks, "mean_of_groups": self.mean_of_groups}
        written = {name: asdict(mean) for name, mean in means.items() if mean is not None}
        return json.loads(json.dumps({**asdict(self), **written}))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EvalSummary":
        """Inverse of ``to_dict``.

        Raises:
            ValueError: If a number is missing.
        """

        def parts(kind: str) -> dict[str, TaskSummary]:
            return {name: TaskSummary(**_summary_fields(row)) for name, row in data.get(kind, {}).items()}

        return EvalSummary(
            **_summary_fields(data),
            per_task=parts("per_task"),
            per_group=parts("per_group"),
            sequences=SequenceSummary.from_dict(data["sequences"]) if data.get("sequences") else None,
        )


def mean_summary(parts: Sequence[TaskSummary]) -> TaskSummary:
    """The unweighted mean of several summaries, such as those of four difficulties.

    The interval of the mean p̄ of m rates combines the rates' own intervals [l, u] as independent errors:
    p̄ − √(Σ(p − l)²)/m to p̄ + √(Σ(u − p)²)/m.

    Args:
        parts: Summaries of different episodes, at least one.

    Raises:
        ValueError: If there are none.
    """
    if not parts:
        raise ValueError("mean_summary got no summaries; give at least one.")
    m = len(parts)
    rate = sum(part.success_rate for part in parts) / m
    below = math.hypot(*(part.success_rate - part.ci95[0] for part in parts)) / m
    above = math.hypot(*(part.ci95[1] - part.success_rate for part in parts)) / m
    return TaskSummary(
        success_rate=rate,
        n_episodes=sum(part.n_episodes for part in parts),
        ci95=(max(0.0, rate - below), min(1.0, rate + above)),
        mean_episode_length=sum(part.mean_episode_length for part in parts) / m,
        mean_return=sum(part.mean_return for part in parts) / m,
    )


def summarize_episodes(
    tasks: Sequence[str],
    successes: Sequence[bool],
    lengths: Sequence[float],
    returns: Sequence[float],
    task_groups: Mapping[str, Sequence[str]] | None = None,
    subtasks: int = 1,
) -> EvalSummary:
    """Summary of n evaluation episodes, over all, per task and per group of tasks.

    Args:
        tasks: Task name of each episode.
        successes: Outcome of each episode.
        lengths: Environment steps of each episode.
        returns: Sum of rewards of each episode.
        task_groups: Task names of each group; groups without an episode are left out, and a single one.
        subtasks: What an episode consists of; where there are several, its return is how many were solved.

    Raises:
        ValueError: If there are no episodes or the sequences differ in length.
    """
    if not len(tasks) == len(successes) == len(lengths) == len(returns):
        raise ValueError(
            f"{len(tasks)} task names, {len(successes)} outcomes, {len(lengths)} lengths and {len(returns)} returns; "
            "give one of each per episode."
        )
    rows = list(zip(successes, lengths, returns, strict=True))

    def part(members: Collection[str]) -> TaskSummary:
        return TaskSummary(**_episode_numbers([row for name, row in zip(tasks, rows, strict=True) if name in members]))

    per_task = {task: part([task]) for task in dict.fromkeys(tasks)}
    groups = {group: set(members) & set(tasks) for group, members in (task_groups or {}).items()}
    per_group = {group: part(members) for group, members in groups.items() if members}
    per_group = per_group if len(per_group) > 1 else {}  # one group says what the whole says
    sequences = summarize_sequences(returns, subtasks) if subtasks > 1 else None
    return EvalSummary(**_episode_numbers(rows), per_task=per_task, per_group=per_group, sequences=sequences)


def _episode_numbers(episodes: Sequence[tuple[bool, float, float]]) -> dict[str, Any]:
    n = len(episodes)
    if n == 0:
        raise ValueError("There are no evaluation episodes to summarise; give at least one.")
    successes = sum(bool(success) for success, _, _ in episodes)
    return {
        "success_rate": successes / n,
        "n_episodes": n,
        "ci95": wilson_interval(successes, n),
        "mean_episode_length": sum(float(length) for _, length, _ in episodes) / n,
        "mean_return": sum(float(total) for _, _, total in episodes) / n,
    }


def _summary_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    names = tuple(TaskSummary.__dataclass_fields__)
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"an evaluation summary lacks {', '.join(missing)}; it needs {', '.join(names)}.")
    return {**{name: data[name] for name in names}, "ci95": (data["ci95"][0], data["ci95"][1])}

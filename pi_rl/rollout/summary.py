"""Success rates with intervals from evaluation episodes. Standard library only."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


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
    """Success and length over all evaluation episodes, and the same numbers per task.

    Attributes:
        per_task: Summary of each task, keyed by task name.
    """

    per_task: dict[str, TaskSummary] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; intervals become lists."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EvalSummary":
        """Inverse of ``to_dict``.

        Raises:
            ValueError: If a number is missing.
        """
        per_task = {name: TaskSummary(**_summary_fields(row)) for name, row in data.get("per_task", {}).items()}
        return EvalSummary(**_summary_fields(data), per_task=per_task)


def summarize_episodes(
    tasks: Sequence[str], successes: Sequence[bool], lengths: Sequence[float], returns: Sequence[float]
) -> EvalSummary:
    """Summary of n evaluation episodes, over all and per task.

    Args:
        tasks: Task name of each episode.
        successes: Outcome of each episode.
        lengths: Environment steps of each episode.
        returns: Sum of rewards of each episode.

    Raises:
        ValueError: If there are no episodes or the sequences differ in length.
    """
    if not len(tasks) == len(successes) == len(lengths) == len(returns):
        raise ValueError(
            f"{len(tasks)} task names, {len(successes)} outcomes, {len(lengths)} lengths and {len(returns)} returns; "
            "give one of each per episode."
        )
    rows = list(zip(successes, lengths, returns, strict=True))
    per_task = {
        task: TaskSummary(**_episode_numbers([row for name, row in zip(tasks, rows, strict=True) if name == task]))
        for task in dict.fromkeys(tasks)
    }
    return EvalSummary(**_episode_numbers(rows), per_task=per_task)


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

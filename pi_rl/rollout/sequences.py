"""Episodes of several subtasks, such as CALVIN's five: how many were solved in a row. Standard library only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SequenceSummary:
    """How far episodes got, each of which ends at the first subtask that is not solved.

    Attributes:
        average_length: Mean number of subtasks solved, in [0, k].
        ci95: 95 % interval of that mean, average ± 1.96 · s/√n with the episodes' standard deviation s.
        in_a_row: Share of episodes with at least 1, 2, … k subtasks solved; its sum is the average length.
    """

    average_length: float
    ci95: tuple[float, float]
    in_a_row: tuple[float, ...]

    def metrics(self) -> dict[str, float]:
        """What a log shows, by name without prefix."""
        shares = {f"in_a_row/{position}": share for position, share in enumerate(self.in_a_row, start=1)}
        return {"average_length": self.average_length, **shares}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SequenceSummary":
        """Inverse of ``dataclasses.asdict``; lists, as JSON has them, become tuples."""
        low, high = data["ci95"]
        return cls(average_length=data["average_length"], ci95=(low, high), in_a_row=tuple(data["in_a_row"]))


def summarize_sequences(solved: Sequence[float], subtasks: int) -> SequenceSummary:
    """Summary of n episodes.

    Args:
        solved: Subtasks solved in each episode, 0 … subtasks: its return, where each pays 1.
        subtasks: k, what an episode consists of.

    Raises:
        ValueError: There are no episodes, or a number is not a whole one from 0 to k.
    """
    n = len(solved)
    if n == 0:
        raise ValueError("There are no evaluation episodes to summarise; give at least one.")
    wrong = [number for number in solved if number not in range(subtasks + 1)]
    if wrong:
        raise ValueError(f"an episode of {subtasks} subtasks solves 0 to {subtasks} of them, got {wrong[0]}.")
    average = sum(solved) / n
    spread = math.sqrt(sum((number - average) ** 2 for number in solved) / max(n - 1, 1))
    half = 1.96 * spread / math.sqrt(n)
    return SequenceSummary(
        average_length=average,
        ci95=(max(0.0, average - half), min(float(subtasks), average + half)),
        in_a_row=tuple(sum(number >= position for number in solved) / n for position in range(1, subtasks + 1)),
    )

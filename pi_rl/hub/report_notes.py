"""What a reader of a report should know before believing it: gaps, breakdowns, figures out of the usual range."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pi_rl.hub.run_record import RunRecord

HIGH_KL, RATIO_TOLERANCE = 0.1, 0.01
WARNING, INFORMATION = "warning", "information"


@dataclass(frozen=True)
class Note:
    """One sentence or two.

    Attributes:
        level: "warning" or "information".
        text: What is the case, and what to do.
    """

    level: str
    text: str


def notes_of(record: RunRecord) -> list[Note]:
    """All notes of a run, warnings first."""
    notes = [*_state(record), *_result(record), *_breakdowns(record), *_update(record)]
    return sorted(notes, key=lambda note: note.level != WARNING)


def _state(record: RunRecord) -> Iterator[Note]:
    for text in (*record.problems, *dict.fromkeys(record.warnings)):
        yield Note(WARNING, text)
    if not record.complete:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.written))
        done, planned = len(record.iterations), record.iterations_planned
        progress = f"{done} of {planned} iterations" if planned else f"{done} iterations"
        yield Note(INFORMATION, f"Not finished: {progress} so far, last written {when}. It goes on, or was stopped.")
    if record.starts > 1:
        yield Note(INFORMATION, f"The run was continued {record.starts - 1} time(s) after an interruption.")
    if record.config.get("blind"):
        yield Note(INFORMATION, "Blind control: the policy sees a constant image throughout.")


def _result(record: RunRecord) -> Iterator[Note]:
    before, after = record.before, record.after
    if before is None and after is None:
        yield Note(INFORMATION, "No evaluation yet: the curves below show exploring training episodes.")
    if before is None or after is None:
        return
    if after.success_rate <= before.success_rate:
        yield Note(INFORMATION, "Success did not rise: reinforcement learning has not helped in this run.")
    elif after.ci95[0] <= before.ci95[1]:
        yield Note(
            INFORMATION,
            "The intervals of before and after overlap: with so few episodes the gain may be chance. "
            "Evaluate more of them (eval_episodes).",
        )


def _breakdowns(record: RunRecord) -> Iterator[Note]:
    if record.lost_episodes:
        yield Note(
            WARNING,
            f"{record.lost_episodes} training episode(s) were lost because a simulator broke down; they were not "
            "trained on to their end. The run's log names environment, task, state and error of each.",
        )
    restarts = int(sum(entry.get("rollout/worker_restarts") or 0 for entry in record.iterations))
    if restarts:
        yield Note(WARNING, f"{restarts} simulator process(es) died or hung and were replaced while the run went on.")
    odd = [entry for entry in record.iterations if not math.isfinite(entry["loss"])]
    if odd:
        yield Note(WARNING, f"The loss was not finite in {len(odd)} iteration(s); see the metrics' page of the docs.")


def _update(record: RunRecord) -> Iterator[Note]:
    errors = [entry.get("policy/ratio_error_first", 0.0) for entry in record.iterations]
    if errors and max(errors) > RATIO_TOLERANCE:
        yield Note(
            WARNING,
            f"The first ratio of an update was off by {max(errors):.2g}: rollout and update do not score actions "
            "alike. Use the same precision and attention in both.",
        )
    late = record.iterations[-max(1, len(record.iterations) // 4) :]
    high = [entry for entry in late if entry.get("policy/approx_kl", 0.0) > HIGH_KL]
    if len(record.iterations) >= 8 and 2 * len(high) > len(late):
        yield Note(
            WARNING,
            f"KL was above {HIGH_KL} in {len(high)} of the last {len(late)} iterations: the updates are too large. "
            "Lower learning_rate or update_epochs, or set target_kl.",
        )

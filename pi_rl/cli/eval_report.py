"""What `pi-rl eval` shows and writes at the end: the table, `eval.json`, and films of chosen episodes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pi_rl.hub.results import aligned_table, format_success, sequence_rows, summary_parts
from pi_rl.rollout.summary import EvalSummary, TaskSummary

OUTCOMES = ("success", "failure")
_HEAD = ["task", "success [95 %]", "episodes", "episode length", "return"]


def evaluation_table(summary: EvalSummary, failed: int = 0) -> str:
    """One row for everything, then mean of groups, groups and tasks, and how far sequences of subtasks got.

    Args:
        summary: Of the evaluation.
        failed: Episodes that were lost to a simulator that broke down.
    """
    rows = [_row("all", summary), *(_row(name, part) for name, part in summary_parts(summary).items())]
    if len(summary.per_task) == 1:
        rows = [_row(*next(iter(summary.per_task.items())))]
    lines = [aligned_table(_HEAD, rows)]
    if summary.sequences is not None:
        lines += ["", *("  ".join(row) for row in sequence_rows(summary.sequences))]
    if failed:
        lines += ["", f"{failed} episode(s) count as unsolved because the simulator broke down in them twice."]
    return "\n".join(lines)


def _row(name: str, part: TaskSummary) -> list[str]:
    length, total = f"{part.mean_episode_length:.1f}", f"{part.mean_return:.3g}"
    return [name, format_success(part), str(part.n_episodes), length, total]


def parse_videos(words: Iterable[str]) -> dict[str, int]:
    """How many successes and failures to film, from `2_success 3_failure`, also with commas.

    Raises:
        ValueError: A word is not of that form.
    """
    wanted: dict[str, int] = {}
    for word in (part.strip() for one in words for part in one.split(",") if part.strip()):
        match = re.fullmatch(r"([0-9]+)_(success|failure)(?:es|s)?", word)
        if match is None:
            raise ValueError(f"--videos {word!r} must look like 2_success or 3_failure.")
        wanted[match[2]] = int(match[1])
    return wanted


def choose_videos(episodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, int]) -> list[Mapping[str, Any]]:
    """The first so many successes and failures; episodes whose simulator broke down are left out."""
    chosen: list[Mapping[str, Any]] = []
    for outcome in OUTCOMES:
        fitting = [row for row in episodes if row["success"] == (outcome == "success") and not row["failed"]]
        chosen += fitting[: wanted.get(outcome, 0)]
    return chosen


def video_name(episode: Mapping[str, Any]) -> str:
    """File name with task, state and outcome."""
    task = re.sub(r"[^A-Za-z0-9.-]+", "-", episode["task"])
    return f"{task}_state{episode['state_id']}_{'success' if episode['success'] else 'failure'}.mp4"


def film(
    episodes: Sequence[Mapping[str, Any]], folder: Path, fps: float, record: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Writes the films that are not there yet.

    Args:
        episodes: As noted in `episodes.jsonl`.
        folder: Where the films go.
        fps: Frames per second.
        record: Episode to frames and outcome, as `pi_rl.rollout.evaluator.record_episode`.

    Raises:
        RuntimeError: A replay ended otherwise than the evaluation did; its film is not written.
    """
    from pi_rl.hub.videos import write_video

    for episode in episodes:
        path = folder / video_name(episode)
        if path.exists():
            continue
        frames, success = record(episode)
        if (success, len(frames) - 1) != (episode["success"], episode["length"]):
            raise RuntimeError(
                f"the replay of {episode['task']}, state {episode['state_id']}, took {len(frames) - 1} steps and "
                f"{'succeeded' if success else 'failed'}; in the evaluation it took {episode['length']} and "
                f"{'succeeded' if episode['success'] else 'failed'}. The simulator is not deterministic here."
            )
        write_video(frames, path, fps)

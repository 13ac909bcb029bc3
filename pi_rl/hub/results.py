"""Numbers of one run: evaluation summaries with intervals, ``results.json`` and the printed tables.

Standard library only, so that the tables can be printed where torch is not installed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi_rl.rollout.sequences import SequenceSummary
from pi_rl.rollout.summary import EvalSummary, TaskSummary

RESULTS_NAME = "results.json"
MEAN_OF_GROUPS = "mean of groups"
_LONGEST_NAME = 48
_RUN_HEAD = ["sampler", "sight", "seed", "SFT", "SFT + RL", "gain"]
_RUN_TAIL = ["episode length", "env steps", "minutes"]
_RESULTS_HEAD = ["policy", "task", "success [95 %]", "episodes", "episode length", "env steps"]


@dataclass(kw_only=True)
class RunResults:
    """Everything ``results.json`` holds.

    Attributes:
        sft: Deterministic evaluation before reinforcement learning.
        rl: The same initial states after it.
        env_steps: Environment steps simulated for training, evaluations not counted.
        minutes: Wall-clock minutes of each stage, in the order they ran.
        seed: Training seed.
        noise: Sampler of the rollouts, for example ``"flow_noise"``.
        blind: True when the policy was shown a constant image (control run).
        versions: Version of Python and of each package that matters.
        config: The run's settings, JSON-ready.
    """

    sft: EvalSummary
    rl: EvalSummary
    env_steps: int
    minutes: dict[str, float]
    seed: int
    noise: str
    blind: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Success rate after reinforcement learning minus before."""
        return self.rl.success_rate - self.sft.success_rate

    @property
    def total_minutes(self) -> float:
        """Sum of all stages in minutes."""
        return sum(self.minutes.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "sft": self.sft.to_dict(), "rl": self.rl.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunResults":
        """Inverse of ``to_dict``.

        Raises:
            ValueError: If an entry is missing.
        """
        names = cls.__dataclass_fields__
        missing = [name for name in ("sft", "rl", "env_steps", "minutes", "seed", "noise") if name not in data]
        if missing:
            raise ValueError(f"results lack {', '.join(missing)}; they hold {', '.join(sorted(data)) or 'nothing'}.")
        known = {name: data[name] for name in names if name in data}
        known.update(sft=EvalSummary.from_dict(data["sft"]), rl=EvalSummary.from_dict(data["rl"]))
        return cls(**known)


def write_results(path: str | Path, results: RunResults) -> Path:
    """Write ``results.json`` atomically.

    Args:
        path: File, or an existing folder in which ``results.json`` is written.
        results: The run's numbers.

    Returns:
        The file written.
    """
    file = Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
    return file


def read_results(path: str | Path) -> RunResults:
    """Read what ``write_results`` wrote; a folder stands for its ``results.json``.

    Raises:
        ValueError: If the file does not exist, is not JSON or lacks an entry.
    """
    file = Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"No results at {file}; give the {RESULTS_NAME} of a finished run or its output folder.")
    try:
        return RunResults.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file} is not a results file of this package: {error}") from error


def short_name(env_name: str) -> str:
    """An environment's name for a heading: a long list of tasks becomes their number."""
    simulator, _, tasks = env_name.partition(":")
    return env_name if len(env_name) <= _LONGEST_NAME else f"{simulator}, {tasks.count(',') + 1} tasks"


def format_success(summary: TaskSummary) -> str:
    """Success rate with its interval, as in ``0.835 [0.78, 0.88]``."""
    low, high = summary.ci95
    return f"{summary.success_rate:.3f} [{low:.2f}, {high:.2f}]"


def format_minutes(minutes: Mapping[str, float]) -> str:
    """Minutes per stage and their sum on one line."""
    stages = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in minutes.items()]
    return " · ".join([*stages, f"total {sum(minutes.values()):.1f} min"])


def results_table(results: RunResults, *, markdown: bool = False) -> str:
    """The SFT → RL table of one run, one row per policy and, with several tasks, per group and task.

    Args:
        results: The run's numbers.
        markdown: Write a Markdown table instead of aligned text.

    Returns:
        The table followed by sampler, seed and the minutes per stage.
    """
    table = results_rows_markdown(results) if markdown else aligned_table(_RESULTS_HEAD, _results_rows(results))
    sight = "blind control: constant image" if results.blind else "sighted"
    notes = f"{results.noise}, seed {results.seed}, {sight}\nminutes: {format_minutes(results.minutes)}"
    return f"{table}\n\n{notes}" if markdown else f"{table}\n{notes}"


def results_rows_markdown(results: RunResults) -> str:
    """The rows of :func:`results_table` as a Markdown table, without the notes below."""
    return _markdown(_RESULTS_HEAD, _results_rows(results))


def runs_table(runs: Sequence[RunResults], *, markdown: bool = False) -> str:
    """One row per run: for several seeds, samplers or the blind control.

    Args:
        runs: Results in the order of the rows.
        markdown: Write a Markdown table instead of aligned text.

    Raises:
        ValueError: If no run is given.
    """
    if not runs:
        raise ValueError("runs_table got no runs; give at least one.")
    grouped = any(run.rl.per_group for run in runs)
    head = [*_RUN_HEAD, *([MEAN_OF_GROUPS] if grouped else []), *_RUN_TAIL]
    rows = [_run_row(run, grouped=grouped) for run in runs]
    return _markdown(head, rows) if markdown else aligned_table(head, rows)


def _run_row(run: RunResults, *, grouped: bool) -> list[str]:
    means = (run.sft.mean_of_groups, run.rl.mean_of_groups)
    return [
        run.noise,
        "blind" if run.blind else "camera",
        str(run.seed),
        format_success(run.sft),
        format_success(run.rl),
        f"{run.gain:+.3f}",
        *([" → ".join("" if mean is None else f"{mean.success_rate:.3f}" for mean in means)] if grouped else []),
        f"{run.sft.mean_episode_length:.1f} → {run.rl.mean_episode_length:.1f}",
        f"{run.env_steps:,}",
        f"{run.total_minutes:.1f}",
    ]


def _results_rows(results: RunResults) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, summary, steps in (("SFT", results.sft, "0"), ("SFT + RL", results.rl, f"{results.env_steps:,}")):
        rows.append(_summary_row(name, "all", summary, steps))
        rows += [_summary_row("", part, row, "") for part, row in summary_parts(summary).items()]
        if summary.sequences is not None:
            rows += [["", name, text, "", "", ""] for name, text in sequence_rows(summary.sequences)]
    rows.append(["gain", "", f"{results.gain:+.3f}", "", "", ""])
    before, after = results.sft.mean_of_groups, results.rl.mean_of_groups
    if before is not None and after is not None:
        rows.append(["", MEAN_OF_GROUPS, f"{after.success_rate - before.success_rate:+.3f}", "", "", ""])
    return rows


def sequence_rows(solved: SequenceSummary) -> list[tuple[str, str]]:
    """Average length with its interval, and the shares of episodes that solved at least 1, 2, … subtasks in a row."""
    length = f"{solved.average_length:.3f} [{solved.ci95[0]:.2f}, {solved.ci95[1]:.2f}]"
    shares = " / ".join(f"{share:.3f}" for share in solved.in_a_row)
    return [(f"solved of {len(solved.in_a_row)}", length), ("at least 1, 2, …", shares)]


def summary_parts(summary: EvalSummary) -> dict[str, TaskSummary]:
    """What stands below the row of all episodes: mean of groups, groups, and tasks where there are several."""
    mean = summary.mean_of_groups
    averages = {} if mean is None else {MEAN_OF_GROUPS: mean}
    return averages | summary.per_group | (summary.per_task if len(summary.per_task) > 1 else {})


def _summary_row(name: str, task: str, summary: TaskSummary, env_steps: str) -> list[str]:
    length = f"{summary.mean_episode_length:.1f}"
    return [name, task, format_success(summary), str(summary.n_episodes), length, env_steps]


def aligned_table(head: list[str], rows: list[list[str]]) -> str:
    """A table as text, its columns padded to equal width."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

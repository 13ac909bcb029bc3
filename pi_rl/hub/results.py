"""Numbers of one run: evaluation summaries with intervals, ``results.json`` and the printed tables.

Standard library only, so that the tables can be printed where torch is not installed.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS_NAME = "results.json"
VERSIONED_PACKAGES = ("pi_rl", "lerobot", "torch", "transformers", "accelerate", "mujoco", "metaworld", "numpy")


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
    """Success and length of the evaluation episodes of one task.

    Attributes:
        success_rate: Share of successful episodes, in [0, 1].
        n_episodes: Number of evaluation episodes.
        ci95: Wilson 95 % interval of the success rate.
        mean_episode_length: Mean number of environment steps per episode; failed episodes count at the time limit.
    """

    success_rate: float
    n_episodes: int
    ci95: tuple[float, float]
    mean_episode_length: float


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


def summarize_episodes(tasks: Sequence[str], successes: Sequence[bool], lengths: Sequence[float]) -> EvalSummary:
    """Summary of n evaluation episodes, over all and per task.

    Args:
        tasks: Task name of each episode.
        successes: Outcome of each episode.
        lengths: Environment steps of each episode.

    Raises:
        ValueError: If there are no episodes or the sequences differ in length.
    """
    if not len(tasks) == len(successes) == len(lengths):
        raise ValueError(
            f"{len(tasks)} task names, {len(successes)} outcomes and {len(lengths)} lengths; give one of each per episode."
        )
    rows = list(zip(tasks, successes, lengths, strict=True))
    per_task = {
        task: TaskSummary(**_episode_numbers([(s, n) for name, s, n in rows if name == task]))
        for task in dict.fromkeys(tasks)
    }
    return EvalSummary(**_episode_numbers([(s, n) for _, s, n in rows]), per_task=per_task)


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


def installed_versions(packages: Sequence[str] = VERSIONED_PACKAGES) -> dict[str, str]:
    """Version of Python and of each installed package; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def format_success(summary: TaskSummary) -> str:
    """Success rate with its interval, as in ``0.835 [0.78, 0.88]``."""
    low, high = summary.ci95
    return f"{summary.success_rate:.3f} [{low:.2f}, {high:.2f}]"


def format_minutes(minutes: Mapping[str, float]) -> str:
    """Minutes per stage and their sum on one line."""
    stages = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in minutes.items()]
    return " · ".join([*stages, f"total {sum(minutes.values()):.1f} min"])


def results_table(results: RunResults, *, markdown: bool = False) -> str:
    """The SFT → RL table of one run, one row per policy and, with several tasks, per task.

    Args:
        results: The run's numbers.
        markdown: Write a Markdown table instead of aligned text.

    Returns:
        The table followed by a line with the minutes per stage.
    """
    head = ["policy", "task", "success [95 %]", "episodes", "episode length", "env steps"]
    rows: list[list[str]] = []
    for name, summary, steps in (("SFT", results.sft, "0"), ("SFT + RL", results.rl, f"{results.env_steps:,}")):
        rows.append(_summary_row(name, "all", summary, steps))
        if len(summary.per_task) > 1:
            rows += [_summary_row("", task, row, "") for task, row in summary.per_task.items()]
    rows.append(["gain", "", f"{results.gain:+.3f}", "", "", ""])
    sight = "blind control: constant image" if results.blind else "sighted"
    notes = f"{results.noise}, seed {results.seed}, {sight}\nminutes: {format_minutes(results.minutes)}"
    table = _markdown(head, rows) if markdown else _aligned(head, rows)
    return f"{table}\n\n{notes}" if markdown else f"{table}\n{notes}"


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
    head = ["sampler", "sight", "seed", "SFT", "SFT + RL", "gain", "episode length", "env steps", "minutes"]
    rows = [
        [
            run.noise,
            "blind" if run.blind else "camera",
            str(run.seed),
            format_success(run.sft),
            format_success(run.rl),
            f"{run.gain:+.3f}",
            f"{run.sft.mean_episode_length:.1f} → {run.rl.mean_episode_length:.1f}",
            f"{run.env_steps:,}",
            f"{run.total_minutes:.1f}",
        ]
        for run in runs
    ]
    return _markdown(head, rows) if markdown else _aligned(head, rows)


def _episode_numbers(episodes: Sequence[tuple[bool, float]]) -> dict[str, Any]:
    n = len(episodes)
    if n == 0:
        raise ValueError("There are no evaluation episodes to summarise; give at least one.")
    successes = sum(bool(success) for success, _ in episodes)
    return {
        "success_rate": successes / n,
        "n_episodes": n,
        "ci95": wilson_interval(successes, n),
        "mean_episode_length": sum(float(length) for _, length in episodes) / n,
    }


def _summary_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    names = tuple(TaskSummary.__dataclass_fields__)
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"an evaluation summary lacks {', '.join(missing)}; it needs {', '.join(names)}.")
    return {**{name: data[name] for name in names}, "ci95": (data["ci95"][0], data["ci95"][1])}


def _summary_row(name: str, task: str, summary: TaskSummary, env_steps: str) -> list[str]:
    length = f"{summary.mean_episode_length:.1f}"
    return [name, task, format_success(summary), str(summary.n_episodes), length, env_steps]


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""What the folder of a run tells about it, whether the run has ended, is going on or was killed.

Settings come from ``pi_rl_config.yaml``, measurements from ``metrics.jsonl`` (written line by line, so that a killed
run loses none) or a ``trainer_state.json``, the result from ``results.json``. Records that cannot be read are named,
not guessed. Nothing heavy is imported.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi_rl.argument_values import load_yaml
from pi_rl.arguments import CONFIG_NAME
from pi_rl.checkpoint_order import by_age
from pi_rl.hub.results import RESULTS_NAME, RunResults, read_results
from pi_rl.rollout.summary import EvalSummary, TaskSummary
from pi_rl.secrets import redacted

STAGES_NAME, METRICS_NAME, STATE_NAME = "stages.json", "metrics.jsonl", "trainer_state.json"
BEGAN, WARNING = "began", "warning"
"""Keys of lines of ``metrics.jsonl`` that are no log entries: when a process began, and what it warned of."""
PARTS_OF_A_RUN = ("policy", "sft", "init")
"""Folders of policies in a run's folder, beside its checkpoints."""
Entry = dict[str, Any]


class NoRecordError(ValueError):
    """A folder holds no record of a run."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, as its folder tells.

    Attributes:
        folder: The run's output folder.
        config: Settings by name; empty where no configuration was found.
        config_text: The configuration file's text without access tokens.
        history: Log entries of iterations and evaluations, as ``transformers.TrainerState.log_history``.
        results: The measured result; None until the run has ended.
        minutes: Wall-clock minutes per stage.
        versions: Of packages, as noted by the run.
        warnings: What the run noted by itself, such as failed pushes.
        starts: How often a process began or continued the run; 0 where it is not known.
        videos: Films, the one of before and after first.
        problems: Records that could not be read, one sentence each.
        written: When the youngest record was written, in seconds since the epoch.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    history: list[Entry]
    results: RunResults | None
    minutes: dict[str, float]
    versions: dict[str, str]
    warnings: list[str]
    starts: int
    videos: list[Path]
    problems: list[str] = field(default_factory=list)
    written: float

    @property
    def iterations(self) -> list[Entry]:
        """The entries of finished iterations."""
        return [entry for entry in self.history if "loss" in entry]

    @property
    def evaluations(self) -> list[Entry]:
        """The entries of evaluations."""
        return [entry for entry in self.history if "eval_success_rate" in entry]

    @property
    def iterations_planned(self) -> int | None:
        """Iterations the run was to have, where its configuration is known."""
        return self.config.get("num_iterations")

    @property
    def env_steps(self) -> int:
        """Environment steps simulated for training."""
        if self.results is not None:
            return self.results.env_steps
        return int(max((entry.get("env_steps", 0) for entry in self.history), default=0))

    @property
    def env(self) -> str:
        """Name of the environment; empty where it is not known."""
        return str((self.results.config if self.results else self.config).get("env", ""))

    @property
    def algorithm(self) -> str:
        """Name of the algorithm, "PPO" or "GRPO"."""
        named = self.results.config.get("algorithm") if self.results else None
        return str(named or ("GRPO" if "group_size" in self.config else "PPO"))

    @property
    def noise(self) -> str:
        """Sampler of the rollouts, such as "flow_sde"; empty where it is not known."""
        return self.results.noise if self.results else str(self.config.get("noise", ""))

    @property
    def seed(self) -> int | None:
        """Training seed, where it is known."""
        return self.results.seed if self.results else self.config.get("seed")

    @property
    def complete(self) -> bool:
        """Whether nothing of the run is missing: its result is there, or it was to be trained without evaluation."""
        if self.results is not None:
            return True
        planned = self.iterations_planned
        return self.config.get("eval_episodes") == 0 and planned is not None and len(self.iterations) >= planned

    @property
    def before(self) -> EvalSummary | None:
        """Evaluation of the policy that RL started from, where there was one."""
        if self.results is not None:
            return self.results.sft
        first = [entry for entry in self.evaluations if entry.get("env_steps") == 0]
        return summary_of(first[0]) if first else None

    @property
    def after(self) -> EvalSummary | None:
        """The last evaluation of the trained policy."""
        if self.results is not None:
            return self.results.rl
        later = [entry for entry in self.evaluations if entry.get("env_steps", 0) > 0]
        return summary_of(later[-1]) if later else None

    @property
    def lost_episodes(self) -> int:
        """Training episodes that a simulator lost by breaking down."""
        return int(sum(entry.get("rollout/failed_episodes") or 0 for entry in self.iterations))


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder.

    Args:
        folder: Output folder of a recipe or of a trainer.

    Raises:
        ValueError: It is no folder, or, as `NoRecordError`, holds no record of a run.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give the output folder of a run.")
    problems: list[str] = []
    lines, files = _metrics(root, problems)
    starts = [line for line in lines if BEGAN in line]
    found = [root / name for name in (CONFIG_NAME, RESULTS_NAME, STAGES_NAME) if (root / name).is_file()]
    if not files and not found:
        where = f" It lies in one: {root.parent}." if (root.parent / CONFIG_NAME).is_file() else ""
        raise NoRecordError(
            f"{root} holds no record of a run ({CONFIG_NAME}, {METRICS_NAME}, {STATE_NAME} and {RESULTS_NAME} are "
            f"missing). Give the output folder of a recipe or trainer.{where}"
        )
    config, text = _config(root, files, problems)
    results = _results(root, problems)
    stages = _json(root / STAGES_NAME, problems) or {}
    return RunRecord(
        folder=root,
        config=config,
        config_text=text,
        history=merged_history(_numbers(line) for line in lines if not {BEGAN, WARNING} & set(line)),
        results=results,
        minutes=results.minutes if results else {str(name): float(value) for name, value in stages.items()},
        versions=results.versions if results else dict(starts[-1].get("versions", {})) if starts else {},
        warnings=[redacted(str(line[WARNING])) for line in lines if WARNING in line],
        starts=len(starts),
        videos=_videos(root),
        problems=problems,
        written=max(file.stat().st_mtime for file in [*files, *found]),
    )


def run_folder_of(folder: Path) -> Path | None:
    """The output folder of the run that a folder belongs to.

    Every saved policy carries settings of its own, so what is named as a part of a run is looked for above first.

    Args:
        folder: A run's output folder, or one in it.

    Returns:
        A folder with the run's settings or log; None for a policy outside of a run.
    """
    place = folder.absolute()
    if checkpoint_number(place) >= 0 or place.name in PARTS_OF_A_RUN:
        run, other = place.parent, place
    else:
        run, other = place, place.parent
    logs = (run / METRICS_NAME, run / STATE_NAME, *run.glob(f"checkpoint-*/{STATE_NAME}"))
    if (run / CONFIG_NAME).is_file() or any(file.is_file() for file in logs):
        return run
    return other if (other / CONFIG_NAME).is_file() else None


def checkpoint_number(folder: Path) -> int:
    """The N of a folder `checkpoint-N`, -1 of any other."""
    match = re.fullmatch(r"checkpoint-([0-9]+)", folder.name)
    return int(match[1]) if match else -1


def summary_of(entry: Mapping[str, Any]) -> EvalSummary:
    """The evaluation that a log entry tells of.

    Tasks are known by their rates only: their episodes are not logged, so they have no interval.
    """
    return EvalSummary(
        success_rate=entry["eval_success_rate"],
        n_episodes=int(entry.get("eval_n_episodes", 0)),
        ci95=(entry.get("eval_ci95_low", 0.0), entry.get("eval_ci95_high", 1.0)),
        mean_episode_length=entry.get("eval_episode_length", math.nan),
        mean_return=entry.get("eval_return", math.nan),
    )


def rates_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """Success rate of each task and group in an evaluation's log entry."""
    prefix = "eval_success_rate/"
    return {name.removeprefix(prefix): rate for name, rate in entry.items() if name.startswith(prefix)}


def merged_history(entries: Iterable[Entry]) -> list[Entry]:
    """Entries in the order they were written, of which a continued run repeats some: the last of each stays.

    An iteration that is written again removes everything of the lost part, which lies at its step or later.
    """
    kept: list[Entry] = []
    highest = 0
    for entry in entries:
        step = entry.get("step", 0)
        if "loss" in entry and step <= highest:
            kept = [other for other in kept if other.get("step", 0) < step]
            highest = 0
        highest = max(highest, step)
        if "eval_success_rate" in entry:
            kept = [other for other in kept if not ("eval_success_rate" in other and other.get("step", 0) == step)]
        kept.append(entry)
    return sorted(kept, key=lambda entry: entry.get("step", 0))


def _metrics(root: Path, problems: list[str]) -> tuple[list[Entry], list[Path]]:
    """The lines of ``metrics.jsonl``, or the log of the newest state that can be read, and the file they are from."""
    metrics = root / METRICS_NAME
    if metrics.is_file():
        return _lines(metrics, problems), [metrics]
    for file in (root / STATE_NAME, *(folder / STATE_NAME for folder in reversed(by_age(root)))):
        state = _json(file, problems)
        if state is not None:
            return [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)], [file]
    return [], []


def _numbers(entry: Entry) -> Entry:
    return {str(name): value for name, value in entry.items() if isinstance(value, int | float)}


def _lines(file: Path, problems: list[str]) -> list[Entry]:
    """Lines of JSON. Where a process was killed, its last one may be half a line."""
    found: list[Entry] = []
    torn = 0
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if torn and not (isinstance(entry, dict) and BEGAN in entry):
            problems.append(f"Line {torn} of {file.name} cannot be read.")
        torn = 0 if isinstance(entry, dict) else number
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _json(file: Path, problems: list[str]) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    problems.append(f"{_shown(file)} cannot be read: it is not JSON, or not a mapping.")
    return None


def _config(root: Path, sources: Sequence[Path], problems: list[str]) -> tuple[dict[str, Any], str]:
    """The run's configuration; a trainer without a recipe has it in its checkpoints."""
    for file in dict.fromkeys((root / CONFIG_NAME, *(source.parent / CONFIG_NAME for source in sources))):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            content = load_yaml(text)
        except ValueError:
            content = None
        if isinstance(content, dict):
            return content, redacted(text)
        problems.append(f"{_shown(file)} cannot be read: it is not a YAML mapping.")
    return {}, ""


def _results(root: Path, problems: list[str]) -> RunResults | None:
    if not (root / RESULTS_NAME).is_file():
        return None
    try:
        return read_results(root)
    except (ValueError, TypeError, KeyError) as error:
        problems.append(str(error))
        return None


def _videos(root: Path) -> list[Path]:
    """Films of the run; those of evaluations by name, in which numbers count as numbers."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", path.name)]

    first = [root / "before_after.mp4"] if (root / "before_after.mp4").is_file() else []
    return [*first, *sorted((root / "videos").glob("*.mp4"), key=natural)]


def _shown(file: Path) -> str:
    return f"{file.parent.name}/{file.name}" if checkpoint_number(file.parent) >= 0 else file.name


def part_rates(record: RunRecord) -> dict[str, tuple[TaskSummary | float | None, TaskSummary | float | None]]:
    """Success before and after of every group and task: summaries of a finished run, bare rates of another.

    Args:
        record: Of the run.

    Returns:
        Name to (before, after), groups first; empty with a single task.
    """
    from pi_rl.hub.results import summary_parts

    before: Mapping[str, TaskSummary | float] = {}
    after: Mapping[str, TaskSummary | float] = {}
    if record.results is not None:
        before, after = summary_parts(record.results.sft), summary_parts(record.results.rl)
    else:
        first = [rates_of(entry) for entry in record.evaluations if entry.get("env_steps") == 0]
        later = [rates_of(entry) for entry in record.evaluations if entry.get("env_steps", 0) > 0]
        before, after = (first[0] if first else {}), (later[-1] if later else {})
    names = list(dict.fromkeys([*before, *after]))
    return {name: (before.get(name), after.get(name)) for name in names} if len(names) > 1 else {}

"""A run as one HTML page: result, curves, tasks, films, settings and times; several runs side by side.

The page needs nothing else: no script, no font, no other file except the films, which it links or, on request, holds.
All text that comes from a run is escaped by the template engine, and access tokens are replaced.
"""

import base64
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from pi_rl.__about__ import __version__
from pi_rl.arguments import CONFIG_NAME
from pi_rl.hub.plots import evaluations, series, smooth
from pi_rl.hub.report_charts import Band, Layer, chart, percent
from pi_rl.hub.report_notes import notes_of
from pi_rl.hub.results import short_name
from pi_rl.hub.run_record import RunRecord, part_rates
from pi_rl.rollout.summary import TaskSummary
from pi_rl.secrets import redacted

REPORT_NAME, TEMPLATE = "report.html", "report.html.jinja"
TEMPLATES = Path(__file__).parent / "templates"
LARGEST_EMBEDDED_MB = 40
SHOWN_VIDEOS = 24
COLOURS = 8
"""Colours of runs in a comparison, after which they repeat."""
TRAIN_SUCCESS = "rollout/success_rate"
NOISE_NAMES = {"flow_noise": "Flow-Noise", "flow_sde": "Flow-SDE", "flow_cps": "Flow-CPS", "ode": "ODE"}
# key, heading, what it says, whether it is a share
_CURVES = (
    ("rollout/return", "Return", "sum of rewards of a training episode", False),
    ("rollout/episode_length", "Episode length", "control steps; failures count at the limit", False),
    ("policy/approx_kl", "KL of the update", "old ‖ new policy, in nats; .005 to .04 is usual", False),
    ("policy/clip_fraction", "Clip fraction", "ratios outside the clip; .05 to .4 is usual", True),
    (
        "critic/explained_variance",
        "Explained variance",
        "of the critic; 1 is perfect, 0 no better than the mean",
        False,
    ),
    ("groups/informative", "Informative groups", "share of episodes whose group has unequal returns", True),
    ("policy/entropy", "Entropy of the noise", "per element, in nats", False),
    ("policy/noise_std", "Noise", "standard deviation in stochastic steps", False),
    ("grad_norm", "Gradient norm", "before clipping, last step of the iteration", False),
)
_SETTINGS = (
    ("Policy", ("model", "small_model", "lora_rank", "train_vlm", "chunk_size", "n_action_steps")),
    ("Sampling", ("noise", "denoising_steps", "noise_level", "noise_std_min", "noise_std_max", "joint_reduction")),
    ("Rollout", ("num_envs", "rollout_chunks", "rollout_epochs", "auto_reset")),
    ("Update", ("per_device_train_batch_size", "global_batch_size", "update_epochs", "learning_rate", "clip_range",
                "entropy_coefficient", "critic_learning_rate", "critic", "gamma", "gae_lambda", "group_size")),
    ("Run", ("num_iterations", "eval_episodes", "eval_seed", "seed", "bf16")),
)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One row of the table of tasks."""

    name: str
    before: TaskSummary | None
    after: TaskSummary | None

    @property
    def change(self) -> float | None:
        """Gain in success."""
        return (
            None if self.before is None or self.after is None else self.after.success_rate - self.before.success_rate
        )


def write_report(
    runs: RunRecord | Sequence[RunRecord], output: str | Path | None = None, *, embed: bool = False
) -> Path:
    """Writes the page.

    Args:
        runs: One run, or several to be compared.
        output: File to write; by default ``report.html`` in the run's folder. It appears only when complete.
        embed: Put the films into the page instead of linking them.

    Returns:
        The file written.

    Raises:
        ValueError: No run is given, several without an output, or the films are too large to be embedded.
    """
    records = [runs] if isinstance(runs, RunRecord) else list(runs)
    if not records or (output is None and len(records) > 1):
        raise ValueError(f"write_report got {len(records)} runs; give at least one, and output= for several.")
    file = Path(output) if output is not None else records[0].folder / REPORT_NAME
    text = render_report(records, file.parent, embed=embed)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
    return file


def render_report(records: Sequence[RunRecord], beside: Path, *, embed: bool = False) -> str:
    """The page's text; arguments as for :func:`write_report`, which says what is raised.

    Args:
        records: The runs.
        beside: Folder in which the page will lie; films are linked from there.
        embed: Put the films into the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    names = run_names(records)
    shown = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown.filters.update(rate=_rate, interval=_interval, share=lambda value: f"{100 * value:.2f}%")
    views = [_view(record, name, beside, embed) for record, name in zip(records, names, strict=True)]
    page = shown.get_template(TEMPLATE).render(
        title=heading(records[0]) if len(records) == 1 else f"{len(records)} runs compared",
        runs=views,
        run=views[0],
        compared=len(records) > 1,
        curves=list(_curves(records, names)),
        success=_success_chart(records, names),
        differences=_differences(records, names) if len(records) > 1 else [],
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        colours=COLOURS,
    )
    return redacted(page)


def heading(record: RunRecord) -> str:
    """A run's title: its environment, shortened."""
    return short_name(record.env) if record.env else record.folder.resolve().name


def run_names(records: Sequence[RunRecord]) -> list[str]:
    """Names of runs in a comparison: their folders, with as many parents as tell them apart."""
    parts = [record.folder.resolve().parts for record in records]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(names, start=1)]


def summary_of_run(record: RunRecord) -> dict[str, Any]:
    """The run's figures for programs, ready for JSON."""
    before, after = record.before, record.after
    return {
        "folder": str(record.folder),
        "env": record.env or None,
        "algorithm": record.algorithm,
        "noise": record.noise or None,
        "seed": record.seed,
        "complete": record.complete,
        "iterations": len(record.iterations),
        "iterations_planned": record.iterations_planned,
        "env_steps": record.env_steps,
        "before": _figures(before),
        "after": _figures(after),
        "minutes": record.minutes,
        "notes": [{"level": note.level, "text": redacted(note.text)} for note in notes_of(record)],
    }


def _figures(summary: TaskSummary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {
        "success_rate": summary.success_rate,
        "ci95": list(summary.ci95),
        "n_episodes": summary.n_episodes,
    }


def _view(record: RunRecord, name: str, beside: Path, embed: bool) -> dict[str, Any]:
    """What the template shows of one run."""
    done, planned = len(record.iterations), record.iterations_planned
    total = sum(record.minutes.values())
    return {
        "name": name,
        "heading": heading(record),
        "line": " · ".join(filter(None, _facts(record))),
        "complete": record.complete,
        "before": record.before,
        "after": record.after,
        "iterations": f"{done} of {planned}" if planned and done != planned else str(done),
        "env_steps": record.env_steps,
        "episodes": int(max((entry.get("episodes", 0) for entry in record.iterations), default=0)),
        "speed": _speed(record),
        "minutes": [(stage, value, value / total if total else 0.0) for stage, value in record.minutes.items()],
        "total_minutes": total,
        "parts": [_Part(part, *pair) for part, pair in _parts(record).items()],
        "sequences": _sequences(record),
        "videos": list(_videos(record, beside, embed)),
        "hidden_videos": max(0, len(record.videos) - SHOWN_VIDEOS),
        "settings": _settings(record.config),
        "config_text": record.config_text,
        "versions": record.versions,
        "notes": notes_of(record),
        "commands": _commands(record),
    }


def _facts(record: RunRecord) -> Iterator[str]:
    yield record.algorithm
    yield NOISE_NAMES.get(record.noise, record.noise)
    model = record.config.get("model")
    yield (
        Path(model).name
        if model
        else f"small {record.config['small_model']}"
        if "small_model" in record.config
        else ""
    )
    yield f"seed {record.seed}" if record.seed is not None else ""
    yield "blind control" if record.config.get("blind") else ""


def _parts(record: RunRecord) -> dict[str, tuple[TaskSummary | None, TaskSummary | None]]:
    """Groups and tasks before and after; of a run that has not ended the rates are known, not their intervals."""

    def summary(value: TaskSummary | float | None) -> TaskSummary | None:
        if value is None or isinstance(value, TaskSummary):
            return value
        return TaskSummary(
            success_rate=value, n_episodes=0, ci95=(value, value), mean_episode_length=0.0, mean_return=0.0
        )

    return {name: (summary(before), summary(after)) for name, (before, after) in part_rates(record).items()}


def _sequences(record: RunRecord) -> list[tuple[str, str, str]]:
    """Rows (what, before, after) of episodes that consist of several subtasks."""
    results = record.results
    if results is None or results.sft.sequences is None or results.rl.sequences is None:
        return []
    before, after = results.sft.sequences, results.rl.sequences
    rows = [(f"solved of {len(after.in_a_row)}, mean", f"{before.average_length:.3f}", f"{after.average_length:.3f}")]
    pairs = zip(before.in_a_row, after.in_a_row, strict=True)
    return rows + [
        (f"at least {count} in a row", _rate(first), _rate(second))
        for count, (first, second) in enumerate(pairs, start=1)
    ]


def _speed(record: RunRecord) -> float | None:
    """Environment steps per second of rollout and update together."""
    timed = [entry for entry in record.iterations if "time/rollout" in entry and "rollout/env_steps" in entry]
    seconds = sum(entry["time/rollout"] + entry.get("time/update", 0.0) for entry in timed)
    return sum(entry["rollout/env_steps"] for entry in timed) / seconds if seconds > 0 else None


def _videos(record: RunRecord, beside: Path, embed: bool) -> Iterator[tuple[str, str]]:
    """(address, caption) of the films shown: the first of all, and the last ones of evaluations."""
    shown = record.videos[:1] + record.videos[1:][-(SHOWN_VIDEOS - 1) :]
    size = sum(file.stat().st_size for file in shown) / 1e6
    if embed and size > LARGEST_EMBEDDED_MB:
        raise ValueError(
            f"The films of {record.folder} take {size:.0f} MB; up to {LARGEST_EMBEDDED_MB} MB can be embedded. Leave "
            "out --embed: the page then links them."
        )
    for file in shown:
        caption = "One initial state before (left) and after (right)" if file.stem == "before_after" else file.stem
        if embed:
            yield f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}", caption
        else:
            yield quote(Path(os.path.relpath(file, beside)).as_posix()), caption


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings that matter most, by topic; unset ones are left out."""
    topics = []
    for topic, names in _SETTINGS:
        rows = [(name, _plain(config[name])) for name in names if config.get(name) not in (None, "", [], 0, False)]
        if rows:
            topics.append((topic, rows))
    return topics


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _commands(record: RunRecord) -> list[tuple[str, str]]:
    """(what it does, command) for the next steps."""
    folder = str(record.folder)
    commands = []
    of_a_recipe = (record.folder / CONFIG_NAME).is_file()  # a trainer's own settings are in its checkpoints
    if of_a_recipe and not record.complete:
        commands.append(("Continue from the last checkpoint", shlex.join(["pi-rl", "train", "--resume", folder])))
    if of_a_recipe:
        again = ["pi-rl", "train", "--config", f"{folder}/{CONFIG_NAME}", "--algorithm", record.algorithm.lower()]
        commands.append(("Run it again", shlex.join([*again, "--output_dir", f"{folder}_again"])))
    if record.env and record.complete:
        commands.append(("Evaluate", shlex.join(["pi-rl", "eval", "--policy", folder, "--env", record.env])))
    return commands


def _differences(records: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ: (name, value of each run)."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    rows = [(key, [_plain(record.config.get(key, "–")) for record in records]) for key in keys if key != "output_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _success_chart(records: Sequence[RunRecord], names: Sequence[str]) -> Markup | None:
    """Success of training episodes and of evaluations over environment steps."""
    single = len(records) == 1
    layers: list[Layer] = []
    for index, (record, name) in enumerate(zip(records, names, strict=True)):
        steps, rates = series(record.iterations, TRAIN_SUCCESS)
        label = "training episodes" if single else name
        if single:
            layers.append(Layer(points=list(zip(steps, rates, strict=True)), colour=0, kind="faint"))
        layers.append(Layer(points=list(zip(steps, smooth(rates), strict=True)), colour=index % COLOURS, label=label))
        points = _evaluation_points(record)
        layers.append(
            Layer(
                points=[(x, rate) for x, rate, _, _ in points],
                intervals=[(low, high) for _, _, low, high in points],
                colour=1 if single else index % COLOURS,
                kind="dots",
                label="evaluation" if single else f"{name}, evaluation",
            )
        )
    if not any(layer.points for layer in layers):
        return None
    before = records[0].before if single else None
    band = None if before is None else Band(
        level=before.success_rate, low=before.ci95[0], high=before.ci95[1], label="before training"
    )  # fmt: skip
    return chart(layers, name="success rate", y_range=(0.0, 1.0), y_format=percent, band=band, tall=True)


def _evaluation_points(record: RunRecord) -> list[tuple[float, float, float, float]]:
    """(env_steps, rate, low, high); a finished run's first and last are in its results alone, perhaps."""
    points = evaluations(record.evaluations)
    for steps, summary in ((0.0, record.before), (float(record.env_steps), record.after)):
        if summary is not None and record.results is not None:
            points = [point for point in points if point[0] != steps]
            points.append((steps, summary.success_rate, *summary.ci95))
    return sorted(points)


def _curves(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, str, Markup]]:
    """(heading, explanation, chart) of every quantity that a run logged."""
    for key, title, text, share in _CURVES:
        values = [series(record.iterations, key) for record in records]
        if not any(steps for steps, _ in values):
            continue
        layers = [
            Layer(points=list(zip(*pair, strict=True)), colour=index % COLOURS, label=name if len(names) > 1 else "")
            for index, (pair, name) in enumerate(zip(values, names, strict=True))
        ]
        limits = _limits(key, [value for _, column in values for value in column])
        yield title, text, chart(layers, name=title, y_range=limits, y_format=percent if share else None)
    yield from _time_curve(records, names)


def _limits(key: str, values: Sequence[float]) -> tuple[float, float] | None:
    """A diverging critic may give large negative values; the informative range is shown."""
    return (max(min([*values, 0.0]), -1.0), 1.0) if key == "critic/explained_variance" else None


def _time_curve(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, str, Markup]]:
    """Seconds of an iteration: rollout and update of one run, their sum of several."""
    layers = []
    for index, (record, name) in enumerate(zip(records, names, strict=True)):
        steps, rollout = series(record.iterations, "time/rollout")
        update = dict(zip(*series(record.iterations, "time/update"), strict=True))
        if len(records) == 1:
            layers.append(Layer(points=list(zip(steps, rollout, strict=True)), colour=0, label="rollout"))
            layers.append(Layer(points=list(update.items()), colour=1, label="update"))
        else:
            both = [(x, y + update.get(x, 0.0)) for x, y in zip(steps, rollout, strict=True)]
            layers.append(Layer(points=both, colour=index % COLOURS, label=name))
    if any(layer.points for layer in layers):
        text = "rollout (blue) and update (orange)" if len(records) == 1 else "rollout and update"
        yield "Seconds per iteration", text, chart(layers, name="seconds per iteration")


def _rate(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(summary: TaskSummary) -> str:
    low, high = summary.ci95
    return f"{100 * low:.0f} – {100 * high:.0f} %"

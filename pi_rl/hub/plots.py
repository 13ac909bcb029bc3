"""Pictures of a run: the learning curve and the before/after figure of several runs.

A history is a list of records such as ``transformers.Trainer.state.log_history``. Of each record these keys are used,
all optional but ``env_steps``; records without it are skipped:

* ``env_steps``: training environment steps so far,
* ``rollout/success_rate``: success of the finished training episodes of the iteration (exploring policy),
* ``eval_success_rate``, ``eval_ci95_low``, ``eval_ci95_high``: deterministic evaluation with its interval,
* ``policy/approx_kl``, ``policy/clip_fraction``, ``critic/explained_variance``: diagnostics of the update.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_rl.rollout.summary import EvalSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]

# Okabe-Ito: told apart with every kind of colour blindness and, by lightness, in grey.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7A7A7A"
_SEED_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION)
TRAIN_SUCCESS = "rollout/success_rate"
_DIAGNOSTICS = (
    ("policy/approx_kl", "KL of the update"),
    ("policy/clip_fraction", "clip fraction"),
    ("critic/explained_variance", "explained variance"),
)
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """One run in the before/after figure.

    Attributes:
        label: Name in the legend, for example ``"seed 0"``.
        history: Records, see the module's description; may be empty.
        sft: Evaluation before reinforcement learning.
        rl: Evaluation after it.
        blind: True for the control run on a constant image; drawn in grey.
    """

    label: str
    history: History
    sft: EvalSummary
    rl: EvalSummary
    blind: bool = False


def plot_learning_curve(
    history: History,
    path: str | Path,
    *,
    title: str = "π0 learns by reinforcement",
    sft_baseline: EvalSummary | float | None = None,
    final: EvalSummary | None = None,
) -> Path:
    """Success against environment steps, with the update's diagnostics below.

    Args:
        history: Records, see the module's description.
        path: PNG to write; it appears only when complete.
        title: Heading.
        sft_baseline: Success before reinforcement learning, as a dashed line; an evaluation also shows its interval.
        final: Evaluation after it, drawn at the last step of the history.

    Returns:
        The file written.

    Raises:
        ValueError: If no record has ``env_steps``.
    """
    records = [record for record in history if "env_steps" in record]
    if not records:
        raise ValueError("plot_learning_curve got no record with 'env_steps'; give the trainer's log history.")
    shown = [(key, name) for key, name in _DIAGNOSTICS if series(records, key)[0]]
    with _style():
        figure = _figure(8.6, 4.4 + (1.5 if shown else 0))
        grid = figure.add_gridspec(2 if shown else 1, max(len(shown), 1), height_ratios=[3.4, 1] if shown else [1])
        main = figure.add_subplot(grid[0, :])
        _draw_success(main, records, sft_baseline, final)
        main.set_title(title)
        for column, (key, name) in enumerate(shown):
            _draw_diagnostic(figure.add_subplot(grid[1, column]), records, key, name)
        return _save(figure, path)


def plot_before_after(
    runs: Sequence[RunCurve],
    path: str | Path,
    *,
    title: str = "Success on fixed initial states before and after reinforcement learning",
    subtitle: str = "",
) -> Path:
    """Learning curves of several runs (left) and SFT → RL of each with 95 % intervals (right).

    Args:
        runs: Runs in the order of the legend; blind controls are drawn in grey.
        path: PNG to write; it appears only when complete.
        title: Heading.
        subtitle: Small line at the bottom, for example model, task and numbers of episodes.

    Returns:
        The file written.

    Raises:
        ValueError: If no run is given.
    """
    if not runs:
        raise ValueError("plot_before_after got no runs; give at least one.")
    colours = _run_colours(runs)
    with _style():
        figure = _figure(10.4, 4.3)
        left, right = figure.subplots(1, 2, width_ratios=[1.55, 1])
        for run, colour in zip(runs, colours, strict=True):
            _draw_run_curve(left, run, colour)
        left.set_title("training episodes (exploring)", fontsize=10, fontweight="normal", color="#444444")
        _finish_success_axis(left)
        left.set_xlabel("environment steps")
        left.set_ylabel("success rate")
        left.legend(loc="best", fontsize=9)
        _draw_dumbbells(right, runs, colours)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        if subtitle:
            figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9, color="#666666")
        return _save(figure, path)


def _draw_success(
    axes: "Axes", records: History, sft_baseline: EvalSummary | float | None, final: EvalSummary | None
) -> None:
    """Training curve, evaluations with intervals and the dashed baseline."""
    steps, success = series(records, TRAIN_SUCCESS)
    if steps:
        axes.plot(steps, success, color=BLUE, alpha=0.3, linewidth=1.2)
        axes.plot(steps, smooth(success), color=BLUE, linewidth=2.4, label="training episodes (exploring)")
    points = evaluations(records)
    if sft_baseline is not None:
        if isinstance(sft_baseline, EvalSummary):
            axes.axhspan(*sft_baseline.ci95, color=GREY, alpha=0.13, linewidth=0)
        rate = sft_baseline.success_rate if isinstance(sft_baseline, EvalSummary) else sft_baseline
        axes.axhline(rate, color=GREY, linestyle=(0, (5, 3)), linewidth=1.6, label=f"SFT baseline {rate:.2f}")
    if final is not None:
        last = max(float(record["env_steps"]) for record in records)
        points = [point for point in points if point[0] < last]
        points.append((last, final.success_rate, *final.ci95))
    if points:
        label = "deterministic evaluation, 95 % interval"
        _error_bars(axes, points, VERMILION, label=label)
        axes.annotate(
            f"{points[-1][1]:.2f}",
            points[-1][:2],
            textcoords="offset points",
            xytext=(9, 0),
            va="center",
            color=VERMILION,
            fontweight="bold",
            annotation_clip=False,
        )
    _finish_success_axis(axes)
    axes.set_ylabel("success rate")
    axes.set_xlabel("environment steps")
    axes.legend(loc="lower right", fontsize=9)


def _draw_diagnostic(axes: "Axes", records: History, key: str, name: str) -> None:
    steps, values = series(records, key)
    axes.plot(steps, values, color="#333333", linewidth=1.3)
    axes.set_title(name, fontsize=9, fontweight="normal", color="#444444")
    axes.tick_params(labelsize=8)
    _thousands(axes, bins=4)
    if key == "critic/explained_variance":
        # A diverging critic may give large negative values; the informative range is shown.
        axes.set_ylim(max(min([*values, 0.0]), -1.0) - 0.05, 1.0)
    else:
        axes.set_ylim(bottom=0)


def _draw_run_curve(axes: "Axes", run: RunCurve, colour: str) -> None:
    """Smoothed training success of one run; the evaluations stand in for runs that logged none."""
    steps, success = series(run.history, TRAIN_SUCCESS)
    line = (0, (4, 2)) if run.blind else "solid"
    if steps:
        axes.plot(steps, success, color=colour, alpha=0.22, linewidth=1.0)
        axes.plot(steps, smooth(success), color=colour, linewidth=2.2, label=run.label, linestyle=line)
        return
    points = evaluations(run.history)
    if points:
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], color=colour, linewidth=2.2, label=run.label, ls=line
        )


def _draw_dumbbells(axes: "Axes", runs: Sequence[RunCurve], colours: Sequence[str]) -> None:
    """One row per run: hollow mark before, filled mark after, intervals as bars, gain in figures."""
    for row, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        y = len(runs) - 1 - row
        before, after = run.sft.success_rate, run.rl.success_rate
        axes.annotate(
            "",
            xy=(after, y),
            xytext=(before, y),
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2.0, "shrinkA": 6, "shrinkB": 6},
        )
        for summary, face, offset in ((run.sft, "white", -0.13), (run.rl, colour, 0.13)):
            axes.plot(summary.ci95, [y + offset] * 2, color=colour, linewidth=1.3, alpha=0.75, solid_capstyle="butt")
            axes.plot(
                summary.success_rate, y, "o", color=colour, markerfacecolor=face, markersize=9, markeredgewidth=2
            )
        # Figures outside the pair, so that they never lie on the arrow.
        low, high = (before, after) if before <= after else (after, before)
        axes.annotate(f"{low:.2f}", (low, y), textcoords="offset points", xytext=(-9, 0), ha="right", va="center")
        axes.annotate(
            f"{high:.2f}", (high, y), textcoords="offset points", xytext=(9, 0), va="center", fontweight="bold"
        )
    axes.set_yticks(range(len(runs)), [run.label for run in reversed(runs)])
    axes.set_ylim(-0.6, len(runs) - 0.4)
    axes.set_xlim(-0.12, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    episodes = runs[0].rl.n_episodes
    axes.set_xlabel("success rate")
    axes.set_title(
        f"deterministic, {episodes} fixed initial states, 95 %", fontsize=10, fontweight="normal", color="#444444"
    )
    axes.annotate(
        "○ SFT    ● SFT + RL", (1.0, 0.015), xycoords="axes fraction", ha="right", fontsize=9, color="#444444"
    )


def evaluations(records: History) -> list[tuple[float, float, float, float]]:
    """(env_steps, rate, low, high) of each deterministic evaluation; without interval the bar has no length."""
    points = []
    for record in records:
        rate = record.get("eval_success_rate")
        if rate is not None and "env_steps" in record:
            low, high = record.get("eval_ci95_low", rate), record.get("eval_ci95_high", rate)
            points.append((float(record["env_steps"]), float(rate), float(low), float(high)))
    return points


def _error_bars(axes: "Axes", points: Sequence[tuple[float, float, float, float]], colour: str, *, label: str) -> None:
    below = [rate - low for _, rate, low, _ in points]
    above = [high - rate for _, rate, _, high in points]
    axes.errorbar(
        [point[0] for point in points],
        [point[1] for point in points],
        yerr=[below, above],
        fmt="o",
        color=colour,
        markersize=7,
        capsize=3.5,
        linewidth=1.6,
        label=label,
        zorder=5,
        clip_on=False,
    )


def series(records: History, key: str) -> tuple[list[float], list[float]]:
    """Environment steps and finite values of one quantity; records without it are left out."""
    rows = [(r["env_steps"], r[key]) for r in records if "env_steps" in r and r.get(key) is not None]
    rows = [(float(step), float(value)) for step, value in rows if math.isfinite(value)]
    return [row[0] for row in rows], [row[1] for row in rows]


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Trailing mean, so that the curve never shows the future."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _run_colours(runs: Sequence[RunCurve]) -> list[str]:
    seen = 0
    colours = []
    for run in runs:
        colours.append(GREY if run.blind else _SEED_COLOURS[seen % len(_SEED_COLOURS)])
        seen += not run.blind
    return colours


def _finish_success_axis(axes: "Axes") -> None:
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    _thousands(axes, bins=8)


def _thousands(axes: "Axes", *, bins: int) -> None:
    """Ticks such as 20k; a fresh locator keeps them round."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value else "0"))


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _figure(width: float, height: float) -> "Figure":
    """A figure without pyplot: no global state, no display needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | Path) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.partial.png")
    figure.savefig(partial, dpi=150, format="png")
    os.replace(partial, file)
    return file

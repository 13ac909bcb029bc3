"""Figures of ``scripts/ablation.py`` in the paper's layout: one panel per quantity, one colour per setting."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_report import Records
from ablation_settings import BASE, FIGURES

from pi_rl.hub.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P")
# measured in an iteration's rollout, that is before its update
_BEFORE_UPDATE = ("train_success", "explained_variance")
_UNITS = {"update_seconds": "s per iteration"}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "figure.facecolor": "white",
}

Point = tuple[float, float, float, float]
"""Iteration, mean, smallest and largest value over seeds."""


def plot_figure(name: str, records: Records, path: Path) -> Path:
    """Draws a figure: mean over seeds as a line, smallest to largest as a band.

    Args:
        name: Name in ``FIGURES``.
        records: Finished runs; settings without any are left out.
        path: PNG to write.

    Returns:
        The file.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = FIGURES[name]
    shown = [setting for setting in figure.settings if records.seeds(setting)]
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(3.7 * len(figure.panels) + 0.3, 3.6), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(1, len(figure.panels), squeeze=False)[0]
        places = _places(figure.settings)
        last = max(row["iteration"] for curve in records.curves.values() for row in curve)
        for panel, (column, title) in zip(axes, figure.panels, strict=True):
            for setting in shown:
                _draw(panel, band(records, setting, column), places[setting], figure.settings[setting])
            _finish(panel, column, title, last=last)
        _legend(canvas, axes[0], records, shown)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=140, format="png")
    return path


def band(records: Records, setting: str, column: str) -> list[Point]:
    """A column's mean, smallest and largest value over the seeds by the number of updates the policy had."""
    found: dict[float, list[float]] = {}
    shift = 1 if column in _BEFORE_UPDATE else 0
    for seed in records.seeds(setting):
        for row in records.curves[setting, seed]:
            if column in row:
                found.setdefault(row["iteration"] - shift, []).append(row[column])
    return [(x, sum(ys) / len(ys), min(ys), max(ys)) for x, ys in sorted(found.items())]


def _places(settings: Iterable[str]) -> dict[str, int]:
    """Colour of each setting; the base has the same in every figure."""
    others = [setting for setting in settings if setting != BASE]
    return {BASE: 0} | {setting: place for place, setting in enumerate(others, 1)}


def _legend(canvas: Any, axes: "Axes", records: Records, shown: Sequence[str]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    counts = sorted({len(records.seeds(setting)) for setting in shown})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    canvas.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 5),
        title=f"mean of {seeds} seeds; band: smallest to largest",
        title_fontproperties={"size": 9},
    )


def _draw(axes: "Axes", points: Sequence[Point], place: int, label: str) -> None:
    colour = _COLOURS[place % len(_COLOURS)]
    x, mean, low, high = ([point[part] for point in points] for part in range(4))
    style: dict[str, Any] = {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 4}
    axes.plot(x, mean, color=colour, linewidth=1.8, label=label, **style)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: "Axes", column: str, title: str, *, last: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("iterations of RL")
    axes.set_ylabel(_UNITS.get(column, "success rate" if column.endswith("_success") else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.03 * last, 1.03 * last)
    if column.endswith("_success"):
        axes.set_ylim(0, 1.02)
    elif column == "explained_variance":
        # a critic that diverges may give large negative values; the informative range is shown
        axes.set_ylim(min(max(axes.get_ylim()[0], -1.0), 0.0), 1.02)
    else:
        axes.set_ylim(bottom=0)

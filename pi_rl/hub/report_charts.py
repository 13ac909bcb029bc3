"""Charts of the HTML report: inline SVG that stretches with the page while lines, marks and letters keep their size.

Colours are CSS variables of the page (``--c0``, ``--c1``, …), so that one picture serves light and dark. Marks carry
their value as ``<title>``, which browsers show when the pointer rests on them; nothing needs a script.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Points = Sequence[tuple[float, float]]
Format = Callable[[float], str]

MOST_POINTS, MOST_TOOLTIPS = 400, 120
_UNIT = 1000  # the drawing is so many units wide and high, whatever its size on the screen


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One line or set of marks.

    Attributes:
        points: (x, y), finite, x ascending.
        colour: Number of the page's colour.
        kind: "line", "faint" (thin, without tooltips), "dashed" or "dots".
        label: What it is, for the legend and the tooltips; empty for no entry in the legend.
        intervals: (low, high) of each point, drawn as bars; only for dots.
    """

    points: Points
    colour: int = 0
    kind: str = "line"
    label: str = ""
    intervals: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Band:
    """A level with its interval across the whole width, such as the success before training."""

    level: float
    low: float
    high: float
    label: str


def chart(
    layers: Sequence[Layer],
    *,
    name: str,
    y_range: tuple[float, float] | None = None,
    y_format: Format | None = None,
    band: Band | None = None,
    tall: bool = False,
) -> Markup:
    """A chart over environment steps, as HTML.

    Args:
        layers: What is drawn, from back to front; at least one has points.
        name: What the chart shows, for readers that cannot see it.
        y_range: Ends of the vertical axis; by default those of the points, from 0 where they are not negative.
        y_format: Text of a value; by default four digits.
        band: Level behind everything.
        tall: A large chart, with the name of its horizontal axis.

    Raises:
        ValueError: There is no point to draw.
    """
    drawn = [layer for layer in layers if layer.points]
    if not drawn:
        raise ValueError(f"the chart {name!r} has no points; leave it out.")
    show = y_format or number
    right = max(x for layer in drawn for x, _ in layer.points) or 1.0
    x_ticks = [tick for tick in ticks(0.0, right, 5) if tick <= right]
    low, high = y_range or _range([y for layer in drawn for _, y in layer.points])
    y_ticks = ticks(low, high, 5 if tall else 3)
    frame = _Frame(right, min(low, y_ticks[0]), max(high, y_ticks[-1]) if y_range is None else high)
    y_ticks = [tick for tick in y_ticks if frame.low <= tick <= frame.high]
    body = [_grid(frame, x_ticks, y_ticks), *([_band(frame, band, show)] if band else [])]
    body += [_layer(frame, layer, show) for layer in drawn]
    return Markup(
        '<div class="chart{tall}" role="img" aria-label="{name}"><div class="ys">{ys}</div>'
        '<svg viewBox="0 0 {unit} {unit}" preserveAspectRatio="none" aria-hidden="true">{body}</svg>'
        '<div class="xs">{xs}</div>{x_name}</div>'
    ).format(
        tall=" tall" if tall else "",
        x_name=Markup('<div class="xname">environment steps</div>') if tall else "",
        name=name,
        unit=_UNIT,
        ys=_joined(_label("bottom", 100 - frame.y(tick) / _UNIT * 100, show(tick)) for tick in y_ticks),
        xs=_joined(_label("left", frame.x(tick) / _UNIT * 100, number(tick)) for tick in x_ticks),
        body=_joined(body),
    )


def number(value: float) -> str:
    """A number for an axis or tooltip: 20k, 1.2M, 0.05, 3e-06."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if value else "0"


def percent(value: float) -> str:
    """A share as a percentage without decimals, for axes."""
    return f"{100 * value:.0f} %"


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About so many round numbers that cover an interval, in steps of 1, 2 or 5 times a power of ten.

    Args:
        low: Lower end.
        high: Upper end; raised where it is not above the lower.
        wanted: How many intervals, at least 1.
    """
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of neighbours, of which the last is always there."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


@dataclass(frozen=True)
class _Frame:
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(value / self.right * _UNIT, 1)

    def y(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return round((1 - (inside - self.low) / (self.high - self.low)) * _UNIT, 1)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        return 0.0, high
    middle, half = (low + high) / 2, (high - low) / 2
    half = max(half, 0.02 * abs(middle)) or 0.5  # less would show rounding as a trend
    return middle - half, middle + half


def _grid(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Markup:
    lines = [f"M{frame.x(tick)} 0V{_UNIT}" for tick in x_ticks] + [f"M0 {frame.y(tick)}H{_UNIT}" for tick in y_ticks]
    return Markup('<path class="grid" d="{}"/>').format("".join(lines))


def _band(frame: _Frame, band: Band, show: Format) -> Markup:
    top, bottom = frame.y(band.high), frame.y(band.low)
    return Markup(
        '<rect class="band" x="0" y="{top}" width="{unit}" height="{height}"/>'
        '<path class="level" d="M0 {level}H{unit}"><title>{label}: {value}</title></path>'
    ).format(
        top=top,
        height=round(bottom - top, 1),
        unit=_UNIT,
        level=frame.y(band.level),
        label=band.label,
        value=show(band.level),
    )


def _layer(frame: _Frame, layer: Layer, show: Format) -> Markup:
    style = Markup(' style="--c:var(--c{})"').format(layer.colour)
    if layer.kind == "dots":
        return _dots(frame, layer, show, style)
    points = thinned(layer.points)
    path = "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)
    line = Markup('<path class="{}" d="{}"{}/>').format(layer.kind, path if len(points) > 1 else f"{path}h.01", style)
    if layer.kind == "faint":
        return line
    return line + _joined(
        Markup('<path class="hit" d="M{} {}h.01"{}><title>{}</title></path>').format(
            frame.x(x), frame.y(y), style, _tooltip(layer.label, x, show(y))
        )
        for x, y in thinned(points, MOST_TOOLTIPS)
    )


def _dots(frame: _Frame, layer: Layer, show: Format, style: Markup) -> Markup:
    drawn: list[Markup] = []
    for index, (x, y) in enumerate(layer.points):
        text = show(y)
        if layer.intervals:
            low, high = layer.intervals[index]
            text = f"{text} [{show(low)}, {show(high)}]"
            drawn.append(
                Markup('<path class="bar" d="M{} {}V{}"{}/>').format(frame.x(x), frame.y(low), frame.y(high), style)
            )
        drawn.append(
            Markup('<path class="dot" d="M{} {}h.01"{}><title>{}</title></path>').format(
                frame.x(x), frame.y(y), style, _tooltip(layer.label, x, text)
            )
        )
    return _joined(drawn)


def _tooltip(label: str, x: float, text: str) -> str:
    return f"{label + ': ' if label else ''}{text} after {x:,.0f} environment steps"


def _label(side: str, position: float, text: str) -> Markup:
    return Markup('<span style="{}:{:.2f}%">{}</span>').format(side, position, text)


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)

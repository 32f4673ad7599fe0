"""Geometry of line charts: numbers in, the points and ticks of an SVG out. The template draws and colours them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 32
_MOST_POINTS = 120
DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}

Point = tuple[float, float]


class Series(NamedTuple):
    """One curve.

    Attributes:
        label: what it shows, the run included where there are several.
        kind: the same without the run; what the dash stands for.
        run: number of the run, its colour.
        style: solid "-", dashed "--" or dotted ":".
        points: (x, y).
    """

    label: str
    kind: str
    run: int
    style: str
    points: Sequence[Point]


class Tick(NamedTuple):
    """A mark on an axis: place in the drawing, text."""

    place: float
    text: str


class Dot(NamedTuple):
    """A point with a text that shows when it is pointed at."""

    x: float
    y: float
    text: str


class Curve(NamedTuple):
    """A drawn series: as `Series`, with the dash by name ("solid", ...), the points of the line and its dots."""

    label: str
    kind: str
    run: int
    dash: str
    line: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """What the template needs to draw one chart and its table.

    Attributes:
        name: unique in the page, for references.
        title, x_label: texts.
        curves: in the order of the series.
        x_ticks, y_ticks: marks.
        header, rows: the same numbers as a table, x in the first column.
        summary: one sentence for those who do not see the drawing.
        left, right, top, bottom: the plotting area in a drawing of WIDTH x HEIGHT.
    """

    name: str
    title: str
    x_label: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    header: list[str]
    rows: list[list[str]]
    summary: str
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM

    @property
    def kinds(self) -> dict[str, str]:
        """What each dash stands for: kind -> dash."""
        return {curve.kind: curve.dash for curve in self.curves if curve.kind}


def line_chart(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "epoch",
    from_zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> Chart | None:
    """Lay out a chart; None when no series has a point.

    Args:
        name, title, x_label: see `Chart`.
        series: the curves.
        from_zero: the y axis starts at zero.
        limits: ends of both axes; None takes those of the points.
    """
    series = [one for one in series if one.points]
    if not series:
        return None
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    x_low, x_high = limits or _spread(min(xs), max(xs), 0.5)
    y_low, y_high = limits or _spread(0.0 if from_zero else min(ys), max(ys), 0.1 * abs(max(ys)) or 1.0)
    whole = all(float(x).is_integer() for x in xs)
    x_marks = _marks(x_low, x_high, 5 if limits else 8, integer=whole and not limits)
    y_marks = _marks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_marks[0]), max(y_high, y_marks[-1])
    across, down = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> Point:
        right, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return round(_LEFT + across * right, 1), round(_TOP + down * (1 - up), 1)

    header, rows = _table(x_label, series)
    return Chart(
        name,
        title,
        x_label,
        [_draw(one, place) for one in series],
        [Tick(place(mark, y_low)[0], _tick_text(mark)) for mark in x_marks],
        [Tick(place(x_low, mark)[1], _tick_text(mark)) for mark in y_marks],
        header,
        rows,
        _describe(title, series, x_label),
    )


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most about a hundred of the points, the last one included."""
    step = -(-len(points) // _MOST_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def format_number(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:.4g}"


def _draw(series: Series, place: Callable[[float, float], Point]) -> Curve:
    placed = [place(*point) for point in series.points]
    dots = [
        Dot(*place(x, y), f"{series.label}, {format_number(x)}: {format_number(y)}") for x, y in thinned(series.points)
    ]
    return Curve(
        series.label, series.kind, series.run, DASHES[series.style], " ".join(f"{x},{y}" for x, y in placed), dots
    )


def _table(x_label: str, series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    columns = [dict(one.points) for one in series]
    xs = thinned([(x, 0.0) for x in sorted({x for column in columns for x in column})])
    rows = [[f"{x:g}", *(format_number(column[x]) if x in column else "" for column in columns)] for x, _ in xs]
    return [x_label, *(one.label for one in series)], rows


def _describe(title: str, series: Sequence[Series], x_label: str) -> str:
    ends = [
        f"{one.label} from {format_number(one.points[0][1])} to {format_number(one.points[-1][1])}" for one in series
    ]
    return f"{title} over {x_label}: {'; '.join(ends)}."


def _marks(low: float, high: float, count: int, *, integer: bool = False) -> list[float]:
    slack = 1e-9 * (high - low)
    marks = MaxNLocator(nbins=count, integer=integer).tick_values(low, high)
    return [float(mark) for mark in marks if low - slack <= mark <= high + slack] or [low]


def _tick_text(value: float) -> str:
    # Without exponents' leading zeros, which would not fit beside the axis.
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def _spread(low: float, high: float, least: float) -> tuple[float, float]:
    if high > low:
        return low, high
    return (0.0, least) if low == 0 else (low - least, high + least)

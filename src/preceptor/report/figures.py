"""Figures of the report as inline SVG, coloured by the style sheet, so that they follow light and dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36
NAMED_RIGHT, NAME_HEIGHT, NAME_LETTERS = 58, 13, 8  # where curves are named at their ends
POINTS = 160  # per line; more are averaged in runs


@dataclass(frozen=True)
class Line:
    """One curve: `kind` is its class in the style sheet, `points` (x, y); `marked` is the x of a point to ring.

    `spreads`, where given, are the (low, high) of each point's interval; every point is then ringed. `rings` are the x
    of further points to ring.
    """

    title: str
    kind: str
    points: list[tuple[float, float]]
    marked: float | None = None
    spreads: list[tuple[float, float]] = field(default_factory=list)
    rings: tuple[float, ...] = ()


def line_chart(
    title: str, lines: Sequence[Line], *, x_title: str, percent: bool = False, counts: bool = False, named: bool = False
) -> str:
    """Return an SVG of curves over a common x axis; points that are not finite leave a gap in nothing but the average.

    `percent` labels shares in [0, 1] as percentages; `counts` draws whole x with room around the first and the last;
    `named` writes each curve's title at its end. The description for screen readers gives each curve's first and last
    value. Returns "" where there is no finite point.
    """
    lines = [line if line.spreads else replace(line, points=_thin(line.points)) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for spread in line.spreads for y in spread]
    x_ticks, y_ticks = ticks(0, max(xs), 4), ticks(*_range(ys, percent), 5)
    x_low, x_high = 0.0, max(max(xs), 1e-9)
    if counts:
        x_ticks = [float(x) for x in range(math.ceil(min(xs)), math.floor(max(xs)) + 1)]
        x_low, x_high = min(xs) - 0.4, max(xs) + 0.4
    y_low, y_high = y_ticks[0], y_ticks[-1]
    right = NAMED_RIGHT if named else RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - right)
        return round(across, 1), round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    show = _percent if percent else _number
    parts = []
    for y in y_ticks:
        _, down = place(0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - right}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down + 3.5}" text-anchor="end">{show(y)}</text>')
    for x in (x for x in x_ticks if x <= x_high):
        across, _ = place(x, y_low)
        down = HEIGHT - BOTTOM + 15
        parts.append(f'<text class="tick" x="{across}" y="{down}" text-anchor="middle">{_number(x)}</text>')
    middle = (LEFT + WIDTH - right) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_title)}</text>')
    for number, line in enumerate(lines):
        # Intervals at the same x are drawn side by side.
        aside = 4 * (number - (len(lines) - 1) / 2) if line.spreads else 0
        placed = [(round(across + aside, 1), down) for across, down in (place(*point) for point in line.points)]
        path = " ".join(f"{across},{down}" for across, down in placed)
        parts.append(f'<polyline class="curve {escape(line.kind)}" points="{path}"/>')
        for (across, _), (low, high) in zip(placed, line.spreads, strict=bool(line.spreads)):
            (_, bottom), (_, top) = place(0, low), place(0, high)
            parts.append(
                f'<line class="spread {escape(line.kind)}" x1="{across}" x2="{across}" y1="{bottom}" y2="{top}"/>'
            )
        for (across, down), (x, _) in zip(placed, line.points, strict=True):
            if x == line.marked or x in line.rings or line.spreads:
                parts.append(f'<circle class="mark {escape(line.kind)}" cx="{across}" cy="{down}" r="4"/>')
    if named:
        parts += _names(lines, [place(*line.points[-1]) for line in lines])
    spoken = "; ".join(f"{line.title}: from {show(line.points[0][1])} to {show(line.points[-1][1])}" for line in lines)
    described = escape(f"{title}. {spoken}.")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg>'


def _names(lines: Sequence[Line], ends: Sequence[tuple[float, float]]) -> list[str]:
    """Return the titles of curves beside their last points, moved apart where they would overlap."""
    parts, last = [], -math.inf
    order = sorted(range(len(lines)), key=lambda number: ends[number][1])
    for place, number in enumerate(order):
        lowest = HEIGHT - BOTTOM + 4 - NAME_HEIGHT * (len(order) - 1 - place)
        down = max(last + NAME_HEIGHT, min(ends[number][1] + 4, lowest))
        title = lines[number].title
        shown = title if len(title) <= NAME_LETTERS else title[: NAME_LETTERS - 1] + "…"
        parts.append(
            f'<text class="end {escape(lines[number].kind)}" x="{round(ends[number][0] + 7, 1)}" '
            f'y="{round(down, 1)}">{escape(shown)}</text>'
        )
        last = down
    return parts


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers, from the last at or below `low` to the first at or above `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _range(ys: Sequence[float], percent: bool) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    # Losses fall towards 0, so show it unless that would squeeze the curve into the upper half.
    if not percent and 0 <= low < 0.5 * high:
        low = 0.0
    return low, high


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the finite points, averaged in runs where there are more than fit."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(finite) / POINTS)
    runs = [finite[start : start + size] for start in range(0, len(finite), size)] if finite else []
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", "\u202f")


def _percent(value: float) -> str:
    return f"{100 * value:.3g}\u202f%"

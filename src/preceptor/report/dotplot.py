"""Small plots of rows as inline SVG: dots about a line of no difference, and boxes of how cases are spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from preceptor.report.figures import WIDTH, ticks
from preceptor.report.words import percent, points

LEFT, RIGHT, TOP, BOTTOM = 66, 12, 8, 36
LETTERS = 10  # of a row's name
DOT_ROW, STRIP_ROW = 30, 15


@dataclass(frozen=True)
class Dot:
    """A difference of shares, with its interval where there is one; `kind` is its class in the style sheet."""

    kind: str
    title: str
    value: float
    low: float | None = None
    high: float | None = None


def dot_plot(title: str, rows: Sequence[tuple[str, Sequence[Dot]]], *, x_title: str) -> str:
    """Return rows (name, dots) about zero, in percentage points; "" without dots. Screen readers get the numbers."""
    rows = [row for row in rows if row[1]]
    if not rows:
        return ""
    values = [100 * v for _, dots in rows for d in dots for v in (d.value, d.low, d.high) if v is not None]
    shown = ticks(min(0.0, *values), max(0.0, *values), 5)
    height = TOP + DOT_ROW * len(rows) + BOTTOM
    across = _across(shown[0] / 100, shown[-1] / 100, LEFT)
    parts = _axis([tick / 100 for tick in shown], across, height, x_title, _signed)
    spoken = []
    for number, (name, dots) in enumerate(rows):
        centre = TOP + DOT_ROW * (number + 0.5)
        parts.append(f'<text class="label" x="{LEFT - 8}" y="{centre + 4}" text-anchor="end">{_short(name)}</text>')
        for place, dot in enumerate(dots):
            y = round(centre + 8 * (place - (len(dots) - 1) / 2), 1)
            kind = escape(dot.kind)
            if dot.low is not None and dot.high is not None:
                low, high = across(dot.low), across(dot.high)
                parts.append(f'<line class="spread {kind}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
            else:
                parts.append(f'<line class="stem {kind}" x1="{across(0)}" x2="{across(dot.value)}" y1="{y}" y2="{y}"/>')
            parts.append(f'<circle class="mark {kind}" cx="{across(dot.value)}" cy="{y}" r="4"/>')
            within = f" ({points(dot.low)} to {points(dot.high)})" if dot.low is not None else ""
            spoken.append(f"{name}, {dot.title}: {points(dot.value)}{within}")
    return _svg(height, f"{title}, in percentage points. {'; '.join(spoken)}.", parts)


@dataclass(frozen=True)
class Strip:
    """How the values of cases are spread in one row; `on` says which modalities are there, `other` is the median of
    another model."""

    title: str
    on: tuple[bool, ...]
    values: Sequence[float]
    other: float | None = None


def quartiles(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Return the least value, the quartiles and the largest, quartiles interpolated linearly."""
    low, first, median, third, high = np.quantile(np.asarray(values, float), [0, 0.25, 0.5, 0.75, 1]).tolist()
    return low, first, median, third, high


def strip_plot(title: str, strips: Sequence[Strip], *, kind: str, other: str, x_title: str) -> str:
    """Return a row of box, median and range per strip, shares in [0, 1]; `kind` and `other` are classes."""
    strips = [strip for strip in strips if strip.values]
    if not strips:
        return ""
    left = 14 + 9 * max(len(strip.on) for strip in strips)
    height = TOP + STRIP_ROW * len(strips) + BOTTOM
    across = _across(0, 1, left)
    parts = _axis([0, 0.25, 0.5, 0.75, 1], across, height, x_title, lambda share: f"{100 * share:.0f}")
    spoken, size = [], sum(strips[0].on)
    for number, strip in enumerate(strips):
        top = TOP + STRIP_ROW * number
        y = top + STRIP_ROW / 2
        if sum(strip.on) > size:
            parts.append(f'<line class="grid" x1="2" x2="{WIDTH - RIGHT}" y1="{top}" y2="{top}"/>')
        size = sum(strip.on)
        for place, there in enumerate(strip.on):
            kept = "on" if there else "off"
            parts.append(f'<circle class="dot {kept}" cx="{6 + 9 * place}" cy="{y}" r="3"/>')
        low, first, median, third, high = quartiles(strip.values)
        parts.append(f'<line class="range {kind}" x1="{across(low)}" x2="{across(high)}" y1="{y}" y2="{y}"/>')
        width = round(max(across(third) - across(first), 1), 1)
        parts.append(f'<rect class="box {kind}" x="{across(first)}" y="{y - 4.5}" width="{width}" height="9"/>')
        x = across(median)
        parts.append(f'<line class="median" x1="{x}" x2="{x}" y1="{y - 5.5}" y2="{y + 5.5}"/>')
        if strip.other is not None:
            parts.append(f'<circle class="mark {other}" cx="{across(strip.other)}" cy="{y}" r="2.8"/>')
        spoken.append(f"{strip.title}: {percent(median)}")
    return _svg(height, f"{title}. Medians: {'; '.join(spoken)}.", parts)


def _across(low: float, high: float, left: float) -> Callable[[float], float]:
    return lambda share: round(left + (share - low) / (high - low) * (WIDTH - left - RIGHT), 1)


def _axis(
    at: Sequence[float], across: Callable[[float], float], height: float, x_title: str, show: Callable[[float], str]
) -> list[str]:
    floor, parts = height - BOTTOM, []
    for tick in at:
        x, kind = across(tick), "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{floor + 14}" text-anchor="middle">{show(tick)}</text>')
    middle = (across(at[0]) + across(at[-1])) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 5}" text-anchor="middle">{escape(x_title)}</text>')
    return parts


def _signed(share: float) -> str:
    return f"{100 * share:+g}".replace("-", "\u2212") if share else "0"


def _short(name: str) -> str:
    return escape(name if len(name) <= LETTERS else name[: LETTERS - 1] + "…")


def _svg(height: float, described: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(described)}">{"".join(parts)}</svg>'

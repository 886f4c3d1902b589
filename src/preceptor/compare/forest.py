"""A forest plot as inline SVG: differences with their intervals about the line of no difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from preceptor.report.figures import WIDTH, ticks
from preceptor.report.words import points

LEFT, RIGHT, TOP, ROW, BOTTOM = 12, 12, 6, 34, 34
MOST_LETTERS = 50


@dataclass(frozen=True)
class Mark:
    """One row: a difference of shares with its interval; a significant one is filled."""

    title: str
    kind: str
    difference: float
    low: float
    high: float
    significant: bool


def forest(title: str, marks: Sequence[Mark], *, x_title: str) -> str:
    """Return the SVG, in percentage points; its description for screen readers holds the numbers. "" without marks."""
    if not marks:
        return ""
    shown = ticks(min(0.0, *(100 * mark.low for mark in marks)), max(0.0, *(100 * mark.high for mark in marks)), 5)
    height = TOP + ROW * len(marks) + BOTTOM
    floor = height - BOTTOM

    def across(share: float) -> float:
        return round(LEFT + (100 * share - shown[0]) / (shown[-1] - shown[0]) * (WIDTH - LEFT - RIGHT), 1)

    parts = []
    for tick in shown:
        x, zero = across(tick / 100), ' class="zero"' if tick == 0 else ' class="grid"'
        parts.append(f'<line{zero} x1="{x}" x2="{x}" y1="{TOP}" y2="{floor}"/>')
        label = f"{tick:+g}".replace("-", "\u2212") if tick else "0"
        parts.append(f'<text class="tick" x="{x}" y="{floor + 14}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="tick" x="{WIDTH / 2}" y="{height - 4}" text-anchor="middle">{escape(x_title)}</text>')
    for number, mark in enumerate(marks):
        y = TOP + ROW * number + 25
        kind = escape(mark.kind) + (" sure" if mark.significant else "")
        parts.append(f'<text class="label" x="{LEFT + 5}" y="{y - 11}">{escape(_short(mark.title))}</text>')
        parts.append(
            f'<line class="spread {kind}" x1="{across(mark.low)}" x2="{across(mark.high)}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle class="mark {kind}" cx="{across(mark.difference)}" cy="{y}" r="4"/>')
    spoken = "; ".join(_spoken(mark) for mark in marks)
    described = escape(f"{title}, in percentage points with 95 % intervals. {spoken}.")
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{described}">{"".join(parts)}</svg>'


def _short(title: str) -> str:
    """Return the title without its middle where it does not fit: its ends tell groups apart."""
    half = MOST_LETTERS // 2
    return title if len(title) <= MOST_LETTERS else f"{title[:half].rstrip()} … {title[3 - half :].lstrip()}"


def _spoken(mark: Mark) -> str:
    sure = ", significant" if mark.significant else ""
    return f"{mark.title} {points(mark.difference)}, {points(mark.low)} to {points(mark.high)}{sure}"

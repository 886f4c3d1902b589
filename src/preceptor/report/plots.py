"""Every figure of the reports, drawn with matplotlib.

On a page a figure is inline SVG whose colours are variables of the style sheet, so that it follows light and dark and
print; text is text in the font of the page. The same axes can be saved as a file for papers and slides.
matplotlib is imported inside functions because it is slow to import.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from preceptor.report.format import interval, percent, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "text": "#16202a",
    "soft": "#55626f",
    "line": "#d9dfe4",
    "card": "#ffffff",
    "teacher": "#6d4ab5",
    "baseline": "#b85c00",
    "distilled": "#00756f",
    "guided": "#2f5d9b",
    "clinkd": "#a3195b",
    "blind": "#8b97a2",
    "other": "#3a6ea5",
    "v1": "#2f6d9b",
    "v2": "#a1307a",
    "v3": "#5f6b00",
    "v4": "#8a4b2f",
    "m0": "#b3261e",
    "m1": "#1f5fa8",
    "m2": "#00756e",
    "m3": "#8a5a00",
    "m4": "#7a3fa8",
    "m5": "#4a5560",
}
"""The colours of the light style sheet. Each is unique: in an SVG it stands for the variable of its name."""

DASHES = {
    "teacher": (0, (5, 2)),
    "baseline": (0, (1, 1.6)),
    "guided": (0, (6, 2, 1, 2)),
    "m1": (0, (5, 2)),
    "m2": (0, (1, 1.6)),
    "m3": (0, (6, 2, 1, 2)),
    "m4": (0, (5, 2)),
    "m5": (0, (1, 1.6)),
    "v1": (0, (5, 2)),
    "v2": (0, (1, 1.6)),
    "v3": (0, (6, 2, 1, 2)),
}
WIDTH, HEIGHT = 340, 210  # pixels of a chart at its natural size
MOST_POINTS = 160  # of a line; more are averaged in runs
LABEL_LETTERS = 44  # of a row's label, per line


@dataclass(frozen=True)
class Line:
    """A curve of (x, y) points; `key` is its colour. Points whose x is in `marked` get a ring.

    `spreads` are the (low, high) of each point's interval.
    """

    title: str
    key: str
    points: Sequence[tuple[float, float]]
    marked: Sequence[float] = ()
    spreads: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """A difference of shares with its interval, if there is one; `key` is its colour, `filled` marks significance."""

    title: str
    key: str
    value: float
    low: float | None = None
    high: float | None = None
    filled: bool = True


@dataclass(frozen=True)
class Box:
    """The distribution of shares in one row. `present` says which modalities there are; `other` is another median."""

    title: str
    key: str
    present: Sequence[bool]
    values: Sequence[float]
    other: float | None = None


def line_chart(
    title: str, lines: Sequence[Line], *, x_title: str, as_percent: bool = False, integers: bool = False
) -> Markup:
    """Draw curves over a common x axis as SVG.

    `as_percent` labels shares in [0, 1] in percent; `integers` puts a tick at every whole x. Points that are not finite
    are left out. Returns an empty string if no finite point remains.
    """
    lines = [line for line in map(_thin, lines) if line.points]
    if not lines:
        return Markup()
    show = (lambda y: percent(y, unit=True)) if as_percent else (lambda y: f"{y:.3g}")
    ends = "; ".join(f"{one.title}: from {show(one.points[0][1])} to {show(one.points[-1][1])}" for one in lines)
    with figure(WIDTH, HEIGHT) as (canvas, axes):
        draw_lines(axes, lines, as_percent=as_percent, integers=integers)
        axes.set_xlabel(x_title)
        return to_svg(canvas, f"{title}. {ends}.")


def interval_plot(title: str, rows: Sequence[tuple[str, Sequence[Dot]]], *, x_title: str) -> Markup:
    """Draw rows (label, dots) of differences about zero, in percentage points, as SVG.

    Short labels stand left of the axis, long ones above their row. Returns an empty string without dots.
    """
    rows = [(label, dots) for label, dots in rows if dots]
    if not rows:
        return Markup()
    spoken = [
        f"{label}{f', {dot.title}' if dot.title else ''}: {points(dot.value)}"
        + (f" ({interval(dot.low, dot.high, points)})" if dot.low is not None else "")
        for label, dots in rows
        for dot in dots
    ]
    above = max(len(label) for label, _ in rows) > 18
    with figure(WIDTH, 46 + (38 if above else 30) * len(rows)) as (canvas, axes):
        draw_intervals(axes, rows, labels_above=above)
        axes.set_xlabel(x_title)
        return to_svg(canvas, f"{title}, in percentage points. {'; '.join(spoken)}.")


def box_plot(title: str, boxes: Sequence[Box], *, x_title: str, other: str = "baseline") -> Markup:
    """Draw a box (quartiles), median and range (minimum to maximum) per row, shares in [0, 1], as SVG.

    `other` is the colour of the rings at the medians of another model. Returns an empty string without values.
    """
    boxes = [box for box in boxes if box.values]
    if not boxes:
        return Markup()
    import numpy as np

    with figure(WIDTH, 42 + 15 * len(boxes)) as (canvas, axes):
        quartiles = [np.quantile(box.values, [0, 0.25, 0.5, 0.75, 1]).tolist() for box in boxes]
        columns = max(len(box.present) for box in boxes)
        step = 0.034
        for y, (box, (low, first, median, third, high)) in enumerate(zip(boxes, quartiles, strict=True)):
            color = PALETTE.get(box.key, PALETTE["other"])
            axes.hlines(y, low, high, color=color, linewidth=1.2)
            axes.barh(y, third - first, left=first, height=0.6, facecolor=color, alpha=0.4, edgecolor="none")
            axes.vlines(median, y - 0.36, y + 0.36, color=PALETTE["text"], linewidth=2)
            if box.other is not None:
                axes.plot(
                    box.other,
                    y,
                    "o",
                    markersize=5,
                    markerfacecolor=PALETTE["card"],
                    markeredgecolor=PALETTE.get(other, PALETTE["other"]),
                    markeredgewidth=1.6,
                )
            for place, there in enumerate(box.present):
                axes.plot(
                    step * (place - columns) - 0.02,
                    y,
                    "o",
                    markersize=4.5,
                    markeredgewidth=0.8,
                    clip_on=False,
                    markerfacecolor=PALETTE["text"] if there else PALETTE["card"],
                    markeredgecolor=PALETTE["text"] if there else PALETTE["blind"],
                )
        axes.set(xlim=(-step * (columns + 1), 1.02), ylim=(len(boxes) - 0.4, -0.6), xlabel=x_title, yticks=[])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axes.grid(axis="x")
        spoken = "; ".join(f"{b.title}: {percent(q[2], unit=True)}" for b, q in zip(boxes, quartiles, strict=True))
        return to_svg(canvas, f"{title}. Medians: {spoken}.")


# --- axes -------------------------------------------------------------------------------------------------------------


def draw_lines(axes: Axes, lines: Sequence[Line], *, as_percent: bool = False, integers: bool = False) -> None:
    """Draw curves on given axes, intervals at the same x side by side."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    xs = [x for line in lines for x, _ in line.points]
    aside = 0.03 * (max(xs) - min(xs) or 1)
    for number, line in enumerate(lines):
        color = PALETTE.get(line.key, PALETTE["other"])
        shift = aside * (number - (len(lines) - 1) / 2) if line.spreads else 0
        x, y = [x + shift for x, _ in line.points], [y for _, y in line.points]
        axes.plot(x, y, color=color, linestyle=DASHES.get(line.key, "-"), linewidth=2, label=escape_math(line.title))
        if line.spreads:
            axes.vlines(x, *zip(*line.spreads, strict=True), color=color, linewidth=1.6, alpha=0.75)
        ringed = [(a, b) for a, b, (at, _) in zip(x, y, line.points, strict=True) if line.spreads or at in line.marked]
        if ringed:
            axes.plot(*zip(*ringed, strict=True), "o", color=color, markerfacecolor=PALETTE["card"], markersize=6.5)
    # A loss falls towards 0, so its axis begins there unless that would squeeze the curve into the upper half.
    if not as_percent and 0 <= min(y for line in lines for _, y in line.points) < 0.5 * axes.get_ylim()[1]:
        axes.set_ylim(bottom=0)
    if integers:
        axes.set_xticks(sorted({round(x) for x in xs}))
        axes.margins(x=0.12)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    scale = 100 if as_percent else 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{scale * y:.3g}{' %' if as_percent else ''}"))
    axes.grid(axis="y")


def draw_intervals(
    axes: Axes, rows: Sequence[tuple[str, Sequence[Dot]]], *, labels_above: bool = False, zero: bool = True
) -> None:
    """Draw rows of dots with their intervals on given axes, shares as percent or percentage points.

    Without `zero` the values are not differences, and no line of no difference is drawn.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if zero:
        axes.axvline(0, color=PALETTE["soft"], linewidth=1.4)
    for place, (label, dots) in enumerate(rows):
        if labels_above:
            axes.annotate(
                escape_math(textwrap.shorten(label, 52, placeholder=" …")),
                (0, place - 0.36),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=11,
                color=PALETTE["text"],
                bbox={"facecolor": PALETTE["card"], "edgecolor": "none", "pad": 1},
            )
        for number, dot in enumerate(dots):
            y = place + (0.14 if labels_above else 0) + 0.26 * (number - (len(dots) - 1) / 2)
            color = PALETTE.get(dot.key, PALETTE["other"])
            start, end = (dot.low, dot.high) if dot.low is not None and dot.high is not None else (0, dot.value)
            axes.hlines(y, 100 * start, 100 * end, color=color, linewidth=2, alpha=0.75)
            face = color if dot.filled else PALETTE["card"]
            axes.plot(100 * dot.value, y, "o", markeredgecolor=color, markerfacecolor=face, markersize=6.5)
    labels = [] if labels_above else [textwrap.fill(escape_math(label), LABEL_LETTERS) for label, _ in rows]
    axes.set_yticks(range(len(labels)), labels, color=PALETTE["text"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if zero:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "\u2212") if x else "0"))
    axes.grid(axis="x")


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of `width` x `height` pixels with one pair of axes, in the style of the pages."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style()):
        canvas = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield canvas, canvas.subplots()


def style() -> dict[Any, Any]:
    """Return matplotlib's settings for all figures."""
    soft, line = PALETTE["soft"], PALETTE["line"]
    return {
        "svg.fonttype": "none",
        "font.size": 11,
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.spines.bottom": False,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 1,
        "axes.labelcolor": soft,
        "text.color": PALETTE["text"],
        "xtick.labelcolor": soft,
        "ytick.labelcolor": soft,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
        "figure.facecolor": PALETTE["card"],
        "axes.facecolor": PALETTE["card"],
    }


def to_svg(canvas: Figure, description: str) -> Markup:
    """Return a figure as SVG to stand inside HTML, with a description for screen readers.

    Colours become variables of the style sheet, text takes the font of the page. The same figure gives the same bytes.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": description}):
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = _plain(ElementTree.fromstring(buffer.getvalue()))
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-label": description,
        "style": f"max-width:{1.5 * float(width):.0f}px",
    }
    text = ElementTree.tostring(root, "unicode")
    for name, color in PALETTE.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    return Markup(re.sub(r"(\d\.\d\d)\d+", r"\1", text))


def _plain(element: ElementTree.Element) -> ElementTree.Element:
    """Strip namespaces, metadata, style rules, clipping and the names of groups from an SVG element, in place."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    attributes.pop("clip-path", None)  # all data lie within the axes
    if element.tag == "g":
        attributes.pop("id", None)
    element.attrib.clear()
    element.attrib.update(attributes)
    for child in list(element):
        _plain(child)
        if child.tag in ("metadata", "style", "clipPath") or (child.tag == "defs" and len(child) == 0):
            element.remove(child)
    element.text, element.tail = (element.text or "").strip() or None, None
    return element


def escape_math(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _thin(line: Line) -> Line:
    """Return a line without points that are not finite; many points are averaged in runs of equal length."""
    if line.spreads:
        return line
    known: list[tuple[float, float]] = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, math.ceil(len(known) / MOST_POINTS))
    runs = [known[start : start + size] for start in range(0, len(known), size)]
    mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    return replace(line, points=[(mean([x for x, _ in run]), mean([y for _, y in run])) for run in runs])

"""A comparison as a PNG, for slides and papers: accuracies, differences, learning curves."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path
from typing import Any

from preceptor.compare.run import Comparison
from preceptor.files import flush

COLOURS = {"teacher": "#6d4ab5", "baseline": "#b85c00", "distilled": "#00756f"}
VARIANTS = ("#2f5d9b", "#a1307a", "#5f6b00", "#8a4b2f")
MOST_LETTERS = 44


def draw(comparison: Comparison, path: Path) -> None:
    """Write the figure atomically, as PNG, SVG or PDF by the suffix of `path`."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = max(2, len(comparison.groups))
    heights = [0.9 + 0.36 * rows] + ([3.6] if comparison.curves else [])
    above = ["accuracies", "differences" if comparison.contrasts else "accuracies"]
    figure = Figure(figsize=(11.5, 0.5 + sum(heights)), layout="constrained")
    mosaic: Any = [above, ["curves", "names"]] if comparison.curves else [above]
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    _accuracies(comparison, axes["accuracies"])
    if comparison.contrasts:
        _differences(comparison, axes["differences"])
    if comparison.curves:
        _curves(comparison, axes["curves"])
        axes["names"].axis("off")
        axes["names"].legend(*axes["curves"].get_legend_handles_labels(), loc="center left", fontsize=8, frameon=False)
    figure.suptitle(f"{comparison.protocol}, n = {comparison.categories[0].n}", fontsize=11)
    buffer = io.BytesIO()
    # Without version and date, so that the same comparison gives the same bytes.
    metadata = {
        "png": {"Software": "Preceptor"},
        "svg": {"Date": None, "Creator": "Preceptor"},
        "pdf": {"CreationDate": None, "Creator": "Preceptor", "Producer": None},
    }
    kind = path.suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "preceptor"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    flush(temporary)
    os.replace(temporary, path)


def _accuracies(comparison: Comparison, axes: Any) -> None:
    for y, group in enumerate(comparison.groups):
        score = comparison.score(group)
        colour = _colour(group.stage, group.variant)
        _spread(axes, y, score.low, score.high, colour)
        axes.plot(100 * score.mean, y, "o", color=colour)
    _rows(axes, [f"{g.name} ({len(g.models)} seed{'s' if len(g.models) > 1 else ''})" for g in comparison.groups])
    axes.set_xlabel(f"{comparison.metrics[0]}, % (95 % interval)")


def _differences(comparison: Comparison, axes: Any) -> None:
    axes.axvline(0, color="black", linewidth=1)
    for y, c in enumerate(comparison.contrasts):
        colour, d = _colour(c.group.stage, c.group.variant), c.overall
        _spread(axes, y, d.low, d.high, colour)
        face = colour if d.significant else "white"
        axes.plot(100 * d.difference, y, "o", markeredgecolor=colour, markerfacecolor=face)
    _rows(axes, [c.title for c in comparison.contrasts])
    axes.set_xlabel("difference, points (filled: significant)")


def _curves(comparison: Comparison, axes: Any) -> None:
    for number, curve in enumerate(comparison.curves):
        scores = [comparison.score(group) for group in curve.groups]
        aside = 0.8 * (number - (len(comparison.curves) - 1) / 2)
        below = [0.0 if score.low is None else max(0.0, 100 * (score.mean - score.low)) for score in scores]
        above = [0.0 if score.high is None else max(0.0, 100 * (score.high - score.mean)) for score in scores]
        axes.errorbar(
            [100 * group.share + aside for group in curve.groups],
            [100 * score.mean for score in scores],
            yerr=[below, above],
            color=_colour(curve.stage, curve.variant),
            marker="o",
            markersize=4,
            capsize=2,
            linestyle=("-", "--", ":", "-.")[curve.variant % 4],
            label=_folded(curve.method, 60),
        )
    axes.set_xlabel("share of training data, %")
    axes.set_ylabel(f"{comparison.metrics[0]}, %")
    axes.set_xlim(left=0)


def _spread(axes: Any, y: int, low: float | None, high: float | None, colour: str) -> None:
    if low is not None and high is not None:
        axes.hlines(y, 100 * low, 100 * high, color=colour, linewidth=2)


def _rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_folded(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4)


def _folded(text: str, letters: int = MOST_LETTERS) -> str:
    """Return text in lines, in which matplotlib sees no formula."""
    return textwrap.fill(text, letters, max_lines=3, placeholder=" …").replace("$", "\\$")


def _colour(stage: str, variant: int) -> str:
    if variant == 0:
        return COLOURS.get(stage, VARIANTS[0])
    return VARIANTS[(variant - 1) % len(VARIANTS)]

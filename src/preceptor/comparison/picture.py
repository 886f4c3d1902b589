"""The figure of a comparison for papers and slides: scores, differences and learning curves of the main metric."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.comparison.summary import color, score_of
from preceptor.files import write_bytes
from preceptor.report.plots import Dot, Line, draw_intervals, draw_lines, escape_math, style

METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": "Preceptor"},
    "svg": {"Date": None, "Creator": "Preceptor"},
    "pdf": {"CreationDate": None, "Creator": "Preceptor", "Producer": None},
}
"""No version and no date, so that the same comparison gives the same bytes."""


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the figure atomically, as PNG, SVG or PDF by the suffix of `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    metric, groups = document["metrics"][0], document["groups"]
    differences = [d for d in document["differences"] if d["metric"] == metric]
    curves = [curve for curve in document["curves"] if curve["metric"] == metric]
    heights = [0.9 + 0.42 * max(2, len(groups))] + ([3.6] if curves else [])
    top = ["scores", "differences" if differences else "scores"]
    mosaic: Any = [top, ["curves", "legend"]] if curves else [top]
    with rc_context({**style(), "svg.hashsalt": "preceptor", "font.size": 9}):
        figure = Figure(figsize=(11.5, 0.5 + sum(heights)), layout="constrained")
        axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
        rows = []
        for group in groups:
            score, seeds = score_of(group, metric), len(group["seeds"])
            low, high = _bounds(score)
            title = f"{group['name']} ({seeds} seed{'s' if seeds > 1 else ''})"
            rows.append((title, [Dot("", color(group), score["mean"], low, high)]))
        draw_intervals(axes["scores"], rows, zero=False)
        axes["scores"].set_xlabel(f"{escape_math(metric)}, % (95 % interval)")
        if differences:
            colors = {group["name"]: color(group) for group in groups}
            rows = [
                (
                    d["title"],
                    [Dot("", colors[d["group"]], d["difference"], *_bounds(d, "difference"), d["significant"])],
                )
                for d in differences
            ]
            draw_intervals(axes["differences"], rows)
            axes["differences"].set_xlabel("difference, points (filled: significant)")
        if curves:
            lines = [
                Line(
                    curve["method"],
                    color(curve),
                    [(100 * point["train_share"], point["mean"]) for point in curve["points"]],
                    spreads=[_bounds(point) for point in curve["points"]],
                )
                for curve in curves
            ]
            draw_lines(axes["curves"], lines, as_percent=True)
            axes["curves"].set(xlabel="share of training data, %", ylabel=escape_math(metric))
            axes["legend"].axis("off")
            axes["legend"].legend(*axes["curves"].get_legend_handles_labels(), loc="center left", frameon=False)
        figure.suptitle(escape_math(f"{document['protocol']}, n = {document['n']}"), fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=METADATA[path.suffix[1:]])
    write_bytes(path, buffer.getvalue())


def _bounds(entry: Mapping[str, Any], value: str = "mean") -> tuple[float, float]:
    """Return the interval of a score, or the score itself if it has no interval."""
    return (entry[value], entry[value]) if entry["low"] is None else (entry["low"], entry["high"])

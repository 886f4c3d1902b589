"""The table of what other images change, for the reports and cards of all tasks that answer questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preceptor.report.contents import get_nested, stage_kind
from preceptor.report.format import SPACE, bounds, interval, percent, points
from preceptor.report.tables import Table


def image_reliance_table(title: str, metric: str, found: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Table:
    """Return the table; it is empty if nothing was measured.

    Args:
        title: what was asked: a protocol.
        metric: name of the score.
        found: by stage its title and what `pipeline.image_reliance.image_reliance` found.
    """
    columns = ["Model", "Images", metric, "Minus real", f"95{SPACE}% interval", "Other answers", f"95{SPACE}% interval"]
    rows, keys, notes = [], [], []
    for name, (stage, kinds) in found.items():
        for kind, entry in kinds.items():
            changed = get_nested(entry, "changed")
            rows.append(
                [
                    stage,
                    kind,
                    percent(get_nested(entry, "score")),
                    points(get_nested(entry, "difference")),
                    interval(*bounds(entry), points),
                    percent(get_nested(changed, "share")),
                    interval(*bounds(changed)),
                ]
            )
            keys.append(stage_kind(name))
        notes += _reliance(stage, kinds)
    return Table(f"{title}: asked about other images. In{SPACE}%.", columns, rows, notes, keys)


def _reliance(title: str, found: Mapping[str, Any]) -> list[str]:
    """Return sentences about a model that does not show that it uses the image, and about left and right."""
    notes = []
    for kind, said in (("blank", "plain images"), ("shuffled", "the images of others")):
        entry = found.get(kind)
        if entry is not None and not str(get_nested(entry, "verdict")).startswith("worse"):
            notes.append(f"{title}: with {said}, the score is not shown to be lower than with the real ones.")
    sides = get_nested(found, "mirrored", "sides") or {}
    if n := get_nested(sides, "n"):
        low, high = bounds(get_nested(sides, "switched"))
        within = f" ({interval(low, high)}{SPACE}%)" if low is not None else ""
        notes.append(
            f"{title}: {n} answers name one side, left or right. In mirrored images, "
            f"{percent(get_nested(sides, 'switched', 'share'), unit=True)}{within} switch to the other side and "
            f"{percent(get_nested(sides, 'stayed'), unit=True)} stay."
        )
    return notes

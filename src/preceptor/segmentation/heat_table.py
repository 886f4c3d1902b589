"""The table of all combinations of modalities in the report of a segmentation run, with a colour for every score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preceptor.report.format import SPACE, percent, points, signed
from preceptor.report.page import Fragment
from preceptor.segmentation.subset_scores import Scores, Subject, column_mean
from preceptor.segmentation.subsets import name_of, sort_subsets, subset_title

LEVELS = 9
"""Colours: h0 is the worst score, h8 the best."""
LONG_NAME, MANY_MODALITIES = 6, 5  # from here on the names of modalities are rotated


@dataclass(frozen=True)
class Column:
    """The scores of one stage; `kind` is its colour."""

    kind: str
    title: str
    table: Scores


@dataclass(frozen=True)
class Scale:
    """The range of a combination table: shares (shown in percent, more is better) or millimetres (less is better)."""

    low: float
    high: float
    unit: Literal["%", "mm"]

    @classmethod
    def over(cls, columns: Sequence[Column], unit: Literal["%", "mm"]) -> Scale:
        """Return the scale over all scores of a table, its ends rounded outwards."""
        values = [value for column in columns for row in column.table.values() for value in row.values()]
        step = 0.1 if unit == "%" else 5.0
        low, high = (math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step)
        return cls(low, max(high, low + step), unit)

    def level(self, value: float) -> int:
        """Return the colour of a value, from 0 (worst) to 8 (best)."""
        share = (value - self.low) / (self.high - self.low)
        share = share if self.unit == "%" else 1 - share
        return min(LEVELS - 1, max(0, int(LEVELS * share)))

    def show(self, value: float) -> str:
        return percent(value) if self.unit == "%" else f"{value:.1f}"

    def difference(self, value: float) -> str:
        return points(value) if self.unit == "%" else signed(value)

    def worse(self, difference: float) -> bool:
        """Whether a difference, as it is printed, is for the worse."""
        shown = self.difference(difference)
        return shown != "0.0" and (shown.startswith("+") == (self.unit == "mm"))

    @property
    def ends(self) -> list[str]:
        """The worst and the best end of the scale."""
        if self.unit == "mm":
            return [f"{self.high:g}{SPACE}mm", f"{self.low:g}{SPACE}mm"]
        return [f"{100 * end:.0f}{SPACE}%" for end in (self.low, self.high)]


def heat_table(
    title: str, subject: Subject, columns: Sequence[Column], unit: Literal["%", "mm"] = "%"
) -> Fragment | None:
    """Return the table of combinations: rows in published order, columns are stages within regions, then the means.

    The cells of the distilled stage hold the difference to the baseline too and are marked if it is for the worse.
    Returns None without a score.
    """
    columns = [column for column in columns if column.table]
    if not columns:
        return None
    scale = Scale.over(columns, unit)
    subsets = sort_subsets((subset for column in columns for subset in column.table), subject.modalities)
    rows = [
        {
            "name": subset_title(subset),
            "present": [modality in subset for modality in subject.modalities],
            "larger": before is not None and len(subset) > len(before),
            "cells": _cells(subject, columns, [column.table.get(subset, {}) for column in columns], scale),
        }
        for before, subset in zip([None, *subsets], subsets, strict=False)
    ]
    means = [{key: column_mean(column.table, key) for key in subject.columns} for column in columns]
    names = [name_of(modality) for modality in subject.modalities]
    data = {
        "title": title,
        "modalities": names,
        "many": len(names) >= MANY_MODALITIES,
        "tall": len(names) >= MANY_MODALITIES or any(len(name) >= LONG_NAME for name in names),
        "columns": [name_of(key) for key in subject.columns],
        "stages": [(column.kind, column.title) for column in columns],
        "rows": rows,
        "means": _cells(subject, columns, means, scale),
        "ends": scale.ends,
    }
    return Fragment("segmentation/templates/heat.html.j2", data)


def _cells(
    subject: Subject, columns: Sequence[Column], scores: Sequence[Mapping[str, float | None]], scale: Scale
) -> list[dict[str, Any] | None]:
    """Return the cells of a row; `scores` are those of each column by region."""
    kinds = [column.kind for column in columns]
    reference = scores[kinds.index("baseline")] if "baseline" in kinds else {}
    cells: list[dict[str, Any] | None] = []
    for key in subject.columns:
        for place, (kind, row) in enumerate(zip(kinds, scores, strict=True)):
            value, other = row.get(key), reference.get(key) if kind == "distilled" else None
            if value is None:
                cells.append(None)
                continue
            cell = {"text": scale.show(value), "level": scale.level(value), "first": place == 0}
            delta = None if other is None else value - other
            difference = "" if delta is None else scale.difference(delta)
            cells.append({**cell, "difference": difference, "worse": delta is not None and scale.worse(delta)})
    return cells

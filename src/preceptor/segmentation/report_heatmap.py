"""The combination table: a score by combination of modalities, region and stage, coloured by how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from preceptor.report.markup import chip, escape, scrolling
from preceptor.report.words import NONE, percent, points
from preceptor.segmentation.combinations import Subject, Subset, Table, column_mean, in_order, name_of, named

LEVELS = 9
"""Colours of the scale: h0 is the worst score of a table, h8 the best."""

TALL, MANY = 6, 5  # letters of a modality's name, number of modalities, from which on the names stand upright


@dataclass(frozen=True)
class Column:
    """The scores of one stage: `kind` is its class in the style sheet."""

    kind: str
    title: str
    table: Table


@dataclass(frozen=True)
class Scale:
    """What is printed, and which end of it is good: shares as percentages, or millimetres."""

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
        share = (value - self.low) / (self.high - self.low)
        share = share if self.unit == "%" else 1 - share
        return min(LEVELS - 1, max(0, int(LEVELS * share)))

    def show(self, value: float) -> str:
        return percent(value, unit=False) if self.unit == "%" else f"{value:.1f}"

    def difference(self, value: float) -> str:
        if self.unit == "%":
            return points(value)
        text = f"{value:+.1f}"
        return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")

    def worse(self, difference: float) -> bool:
        """Return whether a difference, as it is printed, is for the worse."""
        shown = self.difference(difference)
        return shown != "0.0" and (shown.startswith("+") == (self.unit == "mm"))

    def legend(self) -> str:
        """Return the colours with their ends, the worst on the left."""
        ends = [self.low, self.high] if self.unit == "%" else [self.high, self.low]
        texts = [f"{percent(end).replace('.0', '')}" if self.unit == "%" else f"{end:g}\u00a0mm" for end in ends]
        colours = "".join(f'<i class="h{level}"></i>' for level in range(LEVELS))
        return f'<span class="ramp" aria-hidden="true"><span>{texts[0]}</span>{colours}<span>{texts[1]}</span></span>'


def heat_table(caption: str, subject: Subject, columns: Sequence[Column], unit: Literal["%", "mm"] = "%") -> str:
    """Return the table: rows are combinations in published order, columns stages within regions, the last row means.

    `caption` is HTML. A distilled stage's cells hold the difference to the undistilled one's too, and are marked where
    it is for the worse. Returns "" where there is no score.
    """
    columns = [column for column in columns if column.table]
    if not columns:
        return ""
    scale = Scale.over(columns, unit)
    subsets = in_order((subset for column in columns for subset in column.table), subject.modalities)
    rows, size = [], 0
    for subset in subsets:
        larger = ' class="larger"' if size and len(subset) > size else ""
        size = len(subset)
        held = [column.table.get(subset, {}) for column in columns]
        rows.append(f"<tr{larger}>{_dots(subset, subject)}{_cells(subject, columns, held, scale)}</tr>")
    means = [{key: column_mean(column.table, key) for key in subject.columns} for column in columns]
    head = f"<caption><span>{caption} {scale.legend()}</span></caption><thead>{_heads(subject, columns)}</thead>"
    last = f'<tr><th scope="row">Mean of {len(subsets)}</th>{_cells(subject, columns, means, scale)}</tr>'
    body = f"<tbody>{''.join(rows)}</tbody><tfoot>{last}</tfoot>"
    kind = "heat many" if len(subject.modalities) >= MANY else "heat"
    table = f'<table class="{kind}" style="--n:{len(subject.modalities)}">{head}{body}</table>'
    return scrolling(table, "Scores by combination of modalities")


def _heads(subject: Subject, columns: Sequence[Column]) -> str:
    long = any(len(name_of(modality)) >= TALL for modality in subject.modalities)
    tall = " tall" if long or len(subject.modalities) >= MANY else ""
    names = "".join(f"<span>{escape(name_of(modality))}</span>" for modality in subject.modalities)
    spread = ' rowspan="2"' if len(columns) > 1 else ""
    first = f'<th scope="col"{spread}><span class="dots{tall}">{names}</span></th>'
    group = f'scope="colgroup" colspan="{len(columns)}"' if len(columns) > 1 else 'scope="col"'
    groups = "".join(f'<th {group} class="first">{escape(name_of(key))}</th>' for key in subject.columns)
    if len(columns) == 1:
        return f"<tr>{first}{groups}</tr>"
    kinds = ["stage first", *["stage"] * (len(columns) - 1)]
    stages = "".join(
        f'<th scope="col" class="{kind}">{chip(column.kind, column.title)}</th>'
        for _ in subject.columns
        for kind, column in zip(kinds, columns, strict=True)
    )
    return f"<tr>{first}{groups}</tr><tr>{stages}</tr>"


def _dots(subset: Subset, subject: Subject) -> str:
    """Return the head of a row: a filled dot for every modality that is there, and its name for who cannot see it."""
    dots = "".join(f'<i class="{"on" if modality in subset else "off"}"></i>' for modality in subject.modalities)
    return (
        f'<th scope="row"><span class="dots" aria-hidden="true">{dots}</span>'
        f'<span class="unseen">{escape(named(subset))}</span></th>'
    )


def _cells(
    subject: Subject, columns: Sequence[Column], held: Sequence[Mapping[str, float | None]], scale: Scale
) -> str:
    """Return the cells of a row, of which `held` are the scores by region, per column."""
    kinds = [column.kind for column in columns]
    against = held[kinds.index("baseline")] if "baseline" in kinds else {}
    cells = []
    for key in subject.columns:
        for place, (kind, scores) in enumerate(zip(kinds, held, strict=True)):
            value, other = scores.get(key), against.get(key) if kind == "distilled" else None
            first = " first" if place == 0 else ""
            if value is None:
                cells.append(f'<td class="none{first}">{NONE}</td>')
                continue
            text, worse = scale.show(value), ""
            if other is not None:
                worse = " worse" if scale.worse(value - other) else ""
                text = f"<b>{text}</b><small>{scale.difference(value - other)}</small>"
            cells.append(f'<td class="h{scale.level(value)}{first}{worse}">{text}</td>')
    return "".join(cells)

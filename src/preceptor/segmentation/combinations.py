"""Combinations of modalities: their order, their names, and the scores that a run has of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from preceptor.report.contents import RunRecord, StageRecord, get_nested

Subset = tuple[str, ...]
Table = dict[Subset, dict[str, float]]
"""A score by combination and region."""

POST = "-post"  # ends the id of a protocol that scores post-processed masks
MEAN = "mean"

_NAMES = {
    "flair": "FLAIR",
    "t1": "T1",
    "t1ce": "T1ce",
    "t1c": "T1c",
    "t2": "T2",
    "ct": "CT",
    "pet": "PET",
    "adc": "ADC",
    "dwi": "DWI",
    "swi": "SWI",
    "pd": "PD",
    "et": "ET",
    "tc": "TC",
    "wt": "WT",
    MEAN: "Mean",
}
LONG = {"et": "enhancing tumour", "tc": "tumour core", "wt": "whole tumour"}


def name_of(key: str) -> str:
    """Return a modality or region as the field writes it."""
    return _NAMES.get(key, key)


def named(subset: Iterable[str], joint: str = " + ") -> str:
    return joint.join(name_of(modality) for modality in subset)


def listed(words: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def in_order(subsets: Iterable[Subset], modalities: Sequence[str]) -> list[Subset]:
    """Return combinations in the order of the published tables: by size, then as `modalities` come."""
    places = {modality: place for place, modality in enumerate(modalities)}
    return sorted(set(subsets), key=lambda subset: (len(subset), [places[modality] for modality in subset]))


def every(modalities: Sequence[str]) -> list[Subset]:
    """Return all combinations of at least one modality, in the order of the published tables."""
    return [subset for size in range(1, len(modalities) + 1) for subset in combinations(modalities, size)]


def parse(name: str, modalities: Sequence[str]) -> Subset | None:
    """Return the combination that ``flair+t1`` names, None where it is none of `modalities`."""
    parts = set(name.split("+"))
    return tuple(m for m in modalities if m in parts) if parts <= set(modalities) else None


def mean(values: Iterable[float]) -> float | None:
    """Return the mean of the finite values, None where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def number(value: Any) -> float | None:
    """Return a finite number of a document, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


@dataclass(frozen=True)
class Subject:
    """What a run is about: its modalities and regions in their order, and the main protocol's id."""

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    protocol: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The regions, and their mean where there are several."""
        return (*self.regions, MEAN) if len(self.regions) > 1 else self.regions


def subject_of(run: RunRecord) -> Subject:
    """Return what a run is about, as its results say, or as the names of its scores do."""
    plain = [id for id in run.protocols if not _is_post(id, run.protocols)]
    protocol = next(iter(plain or run.protocols), None)
    tables = [get_nested(stage.results, "protocols", id, "subsets") for stage in run.stages for id in run.protocols]
    tables += [get_nested(stage.results, "validation_subsets") for stage in run.stages]
    names = [name for table in tables for name in table or {}]
    modalities = _strings(run.first("modalities")) or dict.fromkeys(m for name in names for m in name.split("+"))
    regions = _strings(run.first("regions")) or dict.fromkeys(run.first("protocols", protocol or "", "regions") or {})
    if not regions:
        scored = (get_nested(scores, "dice") for table in tables for scores in (table or {}).values())
        regions = dict.fromkeys(region for scores in scored if isinstance(scores, Mapping) for region in scores)
    return Subject(tuple(modalities), tuple(regions), protocol)


def _strings(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _is_post(id: str, ids: Sequence[str]) -> bool:
    return id.endswith(POST) and id.removesuffix(POST) in ids


def table_of(stage: StageRecord, protocol: str, subject: Subject, score: str = "dice") -> Table:
    """Return the `score` of a stage by combination and region, with the mean over regions; what is missing is not in.

    The mean of a combination is there where all its regions are.
    """
    subsets = get_nested(stage.results, "protocols", protocol, "subsets") or {}
    return _table({name: get_nested(scores, score) for name, scores in subsets.items()}, subject)


def validation_table(stage: StageRecord, subject: Subject) -> Table:
    """Return the Dice on validation cases by combination and region, as `table_of`."""
    return _table(get_nested(stage.results, "validation_subsets") or {}, subject)


def _table(found: Mapping[str, Any], subject: Subject) -> Table:
    table: Table = {}
    for name, scores in found.items():
        subset = parse(name, subject.modalities)
        known = {region: number(get_nested(scores, region)) for region in subject.regions}
        row = {region: value for region, value in known.items() if value is not None}
        if not subset or not row:
            continue
        if len(subject.regions) > 1 and len(row) == len(subject.regions):
            row[MEAN] = math.fsum(row.values()) / len(row)
        table[subset] = row
    return {subset: table[subset] for subset in in_order(table, subject.modalities)}


def column_mean(table: Table, column: str, subsets: Iterable[Subset] | None = None) -> float | None:
    """Return the mean of a column over the combinations, or over those of `subsets` that it has."""
    chosen = table if subsets is None else [subset for subset in subsets if subset in table]
    return mean(table[subset][column] for subset in chosen if column in table[subset])


def gain(table: Table, modality: str, column: str) -> float | None:
    """Return what a modality adds: the mean score with less without it, over all combinations of the others.

    None where a combination lacks its counterpart everywhere.
    """
    differences = []
    for subset, row in table.items():
        without = tuple(other for other in subset if other != modality)
        if modality in subset and without in table and column in row and column in table[without]:
            differences.append(row[column] - table[without][column])
    return mean(differences)

"""The scores that results hold for each subset of the modalities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from preceptor.report.contents import first_value, get_nested, protocols_of, stages_of
from preceptor.report.format import finite
from preceptor.segmentation.subsets import MEAN, Subset, parse_subset, sort_subsets

Scores = dict[Subset, dict[str, float]]
"""A score by combination and region."""

POST = "-post"  # ends the id of a protocol that scores post-processed masks


def mean(values: Iterable[float]) -> float | None:
    """Return the mean of the finite values, or None without any."""
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


@dataclass(frozen=True)
class Subject:
    """The modalities and regions of a run in their order, and the id of its main protocol."""

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    protocol: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The regions, and their mean if there are several."""
        return (*self.regions, MEAN) if len(self.regions) > 1 else self.regions


def subject_of(results: Mapping[str, Any]) -> Subject:
    """Return modalities, regions and main protocol as the results name them, or as the names of their scores do."""
    protocols = protocols_of(results)
    plain = [id for id in protocols if not (id.endswith(POST) and id.removesuffix(POST) in protocols)]
    protocol = next(iter(plain or protocols), None)
    stages = list(stages_of(results).values())
    tables = [get_nested(stage, "protocols", id, "subsets") for stage in stages for id in protocols]
    tables += [get_nested(stage, "validation_subsets") for stage in stages]
    names = [name for table in tables for name in table or {}]
    modalities = _strings(first_value(results, "modalities")) or dict.fromkeys(m for n in names for m in n.split("+"))
    regions = _strings(first_value(results, "regions"))
    regions = regions or list(first_value(results, "protocols", protocol or "", "regions") or {})
    if not regions:
        scored = (get_nested(scores, "dice") for table in tables for scores in (table or {}).values())
        regions = list(dict.fromkeys(region for scores in scored if isinstance(scores, Mapping) for region in scores))
    return Subject(tuple(modalities), tuple(regions), protocol)


def _strings(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def scores_of(stage: Mapping[str, Any], protocol: str | None, subject: Subject, score: str = "dice") -> Scores:
    """Return the `score` of a stage's results by combination and region, with the mean over regions.

    Missing scores are left out. A combination has a mean only if it has all regions.
    """
    subsets = get_nested(stage, "protocols", protocol or "", "subsets") or {}
    return _scores({name: get_nested(scores, score) for name, scores in subsets.items()}, subject)


def validation_scores(stage: Mapping[str, Any], subject: Subject) -> Scores:
    """Return the Dice on validation cases by combination and region, as `scores_of` does."""
    return _scores(get_nested(stage, "validation_subsets") or {}, subject)


def _scores(found: Mapping[str, Any], subject: Subject) -> Scores:
    table: Scores = {}
    for name, scores in found.items():
        subset = parse_subset(name, subject.modalities)
        known = {region: finite(get_nested(scores, region)) for region in subject.regions}
        row = {region: value for region, value in known.items() if value is not None}
        if not subset or not row:
            continue
        if len(subject.regions) > 1 and len(row) == len(subject.regions):
            row[MEAN] = math.fsum(row.values()) / len(row)
        table[subset] = row
    return {subset: table[subset] for subset in sort_subsets(table, subject.modalities)}


def column_mean(table: Scores, column: str, subsets: Iterable[Subset] | None = None) -> float | None:
    """Return the mean of a column over the combinations, or over those of `subsets` that the table has."""
    chosen = table if subsets is None else [subset for subset in subsets if subset in table]
    return mean(table[subset][column] for subset in chosen if column in table[subset])


def gain(table: Scores, modality: str, column: str) -> float | None:
    """Return the mean score with a modality minus that without it, over all combinations of the other modalities.

    Returns None if no combination has its counterpart.
    """
    differences = []
    for subset, row in table.items():
        without = tuple(other for other in subset if other != modality)
        if modality in subset and without in table and column in row and column in table[without]:
            differences.append(row[column] - table[without][column])
    return mean(differences)

"""Paired comparison of the stages of one run, the same for every task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from preceptor.pipeline.run_dir import predictions_file, read_predictions
from preceptor.scores import Metrics, UnitScore, align, unit_means
from preceptor.statistics import MINIMUM_UNITS, Difference, adjust_holm, compare_scores

TEACHER, BASELINE = "teacher", "baseline"
SELECTED = "selected"


def compare_stages(folders: Mapping[str, Path], protocols: Iterable[str], metrics: Metrics) -> dict[str, Any]:
    """Compare the students of a run with the baseline and each with the one before, on the same units.

    Args:
        folders: of the finished stages by name, in the order of the recipe.
        protocols: ids of the protocols that all stages were scored under.
        metrics: module ``preceptor.<task>.metrics``.

    Returns:
        ``{protocol: {"distilled - baseline": entry, ...}}``. If the last stage also selected among several answers,
        ``"STAGE selected - STAGE"`` is included. If ``metrics.RATIO_TO_TEACHER``, ``"distilled / teacher"`` is the
        student's score divided by the teacher's.

        An entry is ``{"metric", "difference", "low", "high", "p", "p_holm", "n", "groups", "seeds", "interval",
        "verdict"}`` and, for each kind of category, ``{name: {"difference", "low", "high", "n", "groups", "p_holm",
        "verdict"}}``; see `statistics.Difference`. ``p_holm`` is adjusted for all overall differences under the
        protocol, or for all those by category. If the task consists of several tasks (metrics ``TASK/METRIC``), it is
        ``{task: such an entry}``.
    """
    students = [stage for stage in folders if stage.partition("-")[0] != TEACHER]
    pairs = [(stage, BASELINE) for stage in students if BASELINE in students and stage != BASELINE]
    pairs += [(later, earlier) for earlier, later in pairwise(students) if (later, earlier) not in pairs]
    comparison: dict[str, Any] = {}
    for protocol in protocols if students else []:
        scores = {
            stage: metrics.unit_scores(read_predictions(folders[stage], protocol), protocol)
            for stage in folders
            if stage in students or (stage == TEACHER and metrics.RATIO_TO_TEACHER)
        }
        found = {f"{a} - {b}": _compare(scores[a], scores[b]) for a, b in pairs}
        last = students[-1]
        selected = f"{protocol}/{SELECTED}"
        if predictions_file(folders[last], selected).is_file():
            chosen = metrics.unit_scores(read_predictions(folders[last], selected), protocol)
            found[f"{last} {SELECTED} - {last}"] = _compare(chosen, scores[last])
        entry: dict[str, Any] = _entries(found, metrics.UNIT)
        if TEACHER in scores and last != BASELINE:
            means = [_mean(unit_means(scores[stage])[0]) for stage in (last, TEACHER)]
            if means[1]:
                entry[f"{last} / {TEACHER}"] = means[0] / means[1]
        comparison[protocol] = entry
    return comparison


def difference(a: Sequence[UnitScore], b: Sequence[UnitScore], unit: str) -> dict[str, Any]:
    """Return the entry of a single pair of models, a - b, as `compare_stages` does. `unit`: word for a unit."""
    return _entries({"": _compare(a, b)}, unit)[""]


@dataclass(frozen=True)
class _Compared:
    """The difference of two models under a metric, on all units and by (kind, name) of category."""

    overall: Difference
    parts: dict[tuple[str, str], Difference]


def _compare(a: Sequence[UnitScore], b: Sequence[UnitScore]) -> dict[str, _Compared]:
    """Return what is compared by metric. Raises UserError if the two were not scored on the same units."""
    b = align(b, a, "The two models")
    found = {}
    for metric in dict.fromkeys(score.metric for score in a):
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.metric == metric]
        parts = {}
        for kind in dict.fromkeys(kind for x, _ in pairs for kind in x.categories):
            for name in sorted({x.categories[kind] for x, _ in pairs if kind in x.categories}):
                parts[kind, name] = _difference([p for p in pairs if p[0].categories.get(kind) == name])
        found[metric] = _Compared(_difference(pairs), parts)
    return found


def _difference(pairs: Sequence[tuple[UnitScore, UnitScore]]) -> Difference:
    (of_a, groups), (of_b, _) = unit_means(x for x, _ in pairs), unit_means(y for _, y in pairs)
    return compare_scores([list(of_a.values())], [list(of_b.values())], paired=True, groups=groups)


def _entries(found: Mapping[str, Mapping[str, _Compared]], unit: str) -> dict[str, Any]:
    """Return the entry of each pair, with p-values adjusted in two families: all overall differences, all others."""
    flat = [compared for by_metric in found.values() for compared in by_metric.values()]
    overall = iter(adjust_holm([compared.overall for compared in flat]))
    parts = iter(adjust_holm([part for compared in flat for part in compared.parts.values()]))
    entries: dict[str, Any] = {}
    for pair, by_metric in found.items():
        of_pair: dict[str, Any] = {}
        for metric, compared in by_metric.items():
            whole = next(overall)
            entry = {"metric": metric.rpartition("/")[2], **_as_dict(whole), "p": whole.p, "seeds": whole.seeds}
            entry["interval"] = _describe(whole, unit)
            for kind, name in compared.parts:
                entry.setdefault(kind, {})[name] = _as_dict(next(parts))
            of_pair[metric.partition("/")[0]] = entry
        of_tasks = any("/" in metric for metric in by_metric)
        entries[pair] = of_pair if of_tasks else next(iter(of_pair.values()), {})
    return entries


def _as_dict(one: Difference) -> dict[str, Any]:
    keys = ("difference", "low", "high", "n", "groups", "p_holm", "verdict")
    return {key: getattr(one, key) for key in keys}


def _describe(one: Difference, unit: str) -> str:
    """Return how the interval was obtained and what it covers, or why there is none."""
    shared = one.groups < one.n
    if one.low is None:
        few = f"fewer than {MINIMUM_UNITS}"
        return f"no interval, {few} groups of {unit}s" if shared else f"no interval, {few} {unit}s"
    how = "paired bootstrap" if one.crossed is None else "the wider of paired bootstrap and analysis of variance"
    return f"95 %, {how} over {unit}s{f' in {one.groups} groups' if shared else ''}, one seed"


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0

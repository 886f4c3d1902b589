"""Paired comparison of the stages of one run, the same for every task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from preceptor.pipeline.run_dir import predictions_file, read_predictions
from preceptor.scores import Metrics, UnitScore, align, unit_means
from preceptor.statistics import ALPHA, MINIMUM_UNITS, mcnemar, paired_bootstrap, verdict

TEACHER, BASELINE = "teacher", "baseline"
SELECTED = "selected"


def compare_stages(folders: Mapping[str, Path], protocols: Iterable[str], metrics: Metrics) -> dict[str, Any]:
    """Compare the students of a run with the baseline and each with the one before, on the same units.

    Args:
        folders: of the finished stages by name, in the order of the recipe.
        protocols: ids of the protocols that all stages were scored under.
        metrics: module ``preceptor.<task>.metrics``.

    Returns:
        ``{protocol: {"distilled - baseline": difference(...), ...}}``. If the last stage also selected among several
        answers, ``"STAGE selected - STAGE"`` is included. If ``metrics.RATIO_TO_TEACHER``, ``"distilled / teacher"`` is
        the student's score divided by the teacher's.
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
        entry: dict[str, Any] = {f"{a} - {b}": difference(scores[a], scores[b], metrics.UNIT) for a, b in pairs}
        last = students[-1]
        selected = f"{protocol}/{SELECTED}"
        if predictions_file(folders[last], selected).is_file():
            chosen = metrics.unit_scores(read_predictions(folders[last], selected), protocol)
            entry[f"{last} {SELECTED} - {last}"] = difference(chosen, scores[last], metrics.UNIT)
        if TEACHER in scores and last != BASELINE:
            means = [_mean(unit_means(scores[stage])[0]) for stage in (last, TEACHER)]
            if means[1]:
                entry[f"{last} / {TEACHER}"] = means[0] / means[1]
        comparison[protocol] = entry
    return comparison


def difference(a: Sequence[UnitScore], b: Sequence[UnitScore], unit: str) -> dict[str, Any]:
    """Return the paired difference a - b of two models, in total and by category.

    Args:
        a: values of a model.
        b: values of the other model for the same units.
        unit: what a unit is, in the singular.

    Returns:
        ``{"metric", "difference", "low", "high", "p", "n", "seeds", "interval", "verdict"}`` and, for each kind of
        category, ``{name: {"difference", "low", "high", "n", "verdict"}}``. Bounds are of the 95 % interval, None for
        fewer than `MINIMUM_UNITS` units. p is McNemar's for right and wrong, otherwise the bootstrap's. If the task
        consists of several tasks (metrics ``TASK/METRIC``), ``{task: such an entry}``.
    """
    b = align(b, a, "The two models")
    entries = {metric: _entry(a, b, metric, unit) for metric in dict.fromkeys(score.metric for score in a)}
    if any("/" in metric for metric in entries):
        return {metric.partition("/")[0]: entry for metric, entry in entries.items()}
    return next(iter(entries.values()), {})


def _entry(a: Sequence[UnitScore], b: Sequence[UnitScore], metric: str, unit: str) -> dict[str, Any]:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.metric == metric]
    entry: dict[str, Any] = {"metric": metric.rpartition("/")[2], **_interval(pairs, with_p=True)}
    if entry["low"] is None:
        entry["interval"] = f"no interval, fewer than {MINIMUM_UNITS} {unit}s"
    else:
        entry["interval"] = f"95 %, paired bootstrap over {unit}s, one seed"
    for kind in dict.fromkeys(kind for x, _ in pairs for kind in x.categories):
        names = sorted({x.categories[kind] for x, _ in pairs if kind in x.categories})
        entry[kind] = {name: _interval([p for p in pairs if p[0].categories.get(kind) == name]) for name in names}
    return entry


def _interval(pairs: Sequence[tuple[UnitScore, UnitScore]], *, with_p: bool = False) -> dict[str, Any]:
    """Return the difference of the pairs, with its interval if there are enough units."""
    (of_a, groups), (of_b, _) = unit_means(x for x, _ in pairs), unit_means(y for _, y in pairs)
    x, y = list(of_a.values()), list(of_b.values())
    low = high = p = None
    mean = _mean(of_a) - _mean(of_b)
    if len(x) >= MINIMUM_UNITS:
        clusters = groups if len(set(groups)) < len(groups) else None
        interval = paired_bootstrap(x, y, groups=clusters)
        mean, low, high = interval.mean, interval.low, interval.high
        p = mcnemar(x, y) if set(x) | set(y) <= {0.0, 1.0} else interval.p
    conclusion = verdict(low, high, seeds=1, significant=p is not None and p < ALPHA)
    entry = {"difference": mean, "low": low, "high": high, "n": len(x), "verdict": conclusion}
    return entry | ({"p": p, "seeds": 1} if with_p else {})


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0

"""Compare run folders of any task, and write the comparison to files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.comparison.deltas import (
    ALL,
    RESAMPLES,
    Category,
    Contrast,
    Delta,
    Score,
    adjust,
    categories,
    contrast,
    score_group,
)
from preceptor.comparison.groups import Group, baseline_of, choose_baseline, group_models, shown_value
from preceptor.comparison.models import read_models
from preceptor.comparison.summary import headline
from preceptor.comparison.tables import as_csv, as_latex
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.report.contents import get_nested
from preceptor.statistics import ALPHA, MINIMUM_SEEDS, MINIMUM_UNITS, Interval
from preceptor.tasks import module

FIGURES = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Curve:
    """A learning curve: the groups of a method over rising shares of the training data."""

    method: str
    stage: str
    variant: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Groups of runs, their scores by category (all units first), and their differences from a baseline.

    `unit` is what is scored (question, case, answer). If a task has several metrics, `categories` and `scores` list one
    metric after the other, and each metric has its own contrasts.
    """

    task: str
    unit: str
    protocol: str
    groups: tuple[Group, ...]
    baseline: Group
    categories: tuple[Category, ...]
    scores: dict[str, tuple[Score, ...]]
    contrasts: tuple[Contrast, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """The metrics, the main one first."""
        return list(dict.fromkeys(category.metric for category in self.categories))

    def score(self, group: Group, metric: str | None = None) -> Score:
        """Return a group's score on all units, under the main metric by default."""
        wanted = metric or self.metrics[0]
        scores = self.scores[group.name]
        return next(s for s in scores if s.category.metric == wanted and s.category.kind == ALL)

    @property
    def describes(self) -> str:
        return get_nested(self.groups[0].models[0].results, "describes", self.protocol) or ""

    @property
    def data(self) -> dict[str, Any]:
        return dict(self.groups[0].models[0].results["data"])

    @property
    def leaks(self) -> bool:
        return "leaks" in self.describes

    def __repr__(self) -> str:
        return "\n".join(headline(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of compare.json. Scores and differences are shares from 0 to 1, group minus baseline."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            "describes": self.describes,
            "metrics": self.metrics,
            "unit": self.unit,
            "n": self.categories[0].n,
            "level": 0.95,
            "alpha": ALPHA,
            "correction": "Holm",
            "minimum_units": MINIMUM_UNITS,
            "minimum_seeds": MINIMUM_SEEDS,
            "baseline": self.baseline.name,
            "leaks": self.leaks,
            "data": {key: self.data.get(key) for key in ("name", "variant", "test_sha256")},
            "notes": list(self.notes),
            "groups": [_group(self, group) for group in self.groups],
            "differences": [_contrast(c) for c in self.contrasts],
            "curves": [_curve(self, curve, metric) for curve in self.curves for metric in self.metrics],
        }


def compare_runs(
    runs: Sequence[Path], *, baseline: str | None = None, protocol: str | None = None, resamples: int = RESAMPLES
) -> Comparison:
    """Compare trained models of one task under one protocol, on the same units.

    Args:
        runs: run folders, or folders of their stages.
        baseline: name of a group, or one of the runs; default: the stage `baseline`.
        protocol: id of a protocol; default: the main one of the first run.
        resamples: number of bootstrap samples, raised if there are many tests.

    Raises:
        UserError: no run is given, one cannot be read, or the runs must not be compared.
    """
    if not runs:
        raise UserError("no run was given; give the output folder of at least one training")
    models, repeats = read_models(runs, protocol)
    first = models[0]
    unit = module(first.task, "metrics").UNIT
    groups = group_models(models)
    reference = choose_baseline(groups, baseline)
    parts = categories(first.scores, unit)
    if not parts:
        raise UserError(
            f"{first.folder} has no scored {unit} under protocol {first.protocol}; evaluate it on other data"
        )
    pairs = [(group, other) for group in groups if (other := baseline_of(group, reference, groups)) is not None]
    # The smallest p of a bootstrap is 2 / (resamples + 1). It must stay well below alpha when it is adjusted.
    resamples = max(resamples, math.ceil(10 * len(pairs) * len(parts) / ALPHA))
    metrics = dict.fromkeys(part.metric for part in parts)
    contrasts = adjust(
        [
            contrast(group, other, [part for part in parts if part.metric == metric], resamples, unit)
            for metric in metrics
            for group, other in pairs
        ]
    )
    scores = {group.name: tuple(score_group(group, part, resamples) for part in parts) for group in groups}
    recorded = (note for model in models for note in get_nested(model.results, "notes") or [])
    # Of several shares, each is part of a group's name.
    named = len({model.share for model in models}) > 1
    notes = dict.fromkeys(note for note in recorded if not (named and note.endswith("(data.train_share).")))
    return Comparison(
        first.task,
        unit,
        first.protocol,
        tuple(groups),
        reference,
        tuple(parts),
        scores,
        tuple(contrasts),
        _curves(groups),
        (*notes, *repeats, *_cautions(groups, parts, unit)),
    )


def compare_seeds(runs: Sequence[Path], *, protocol: str | None = None) -> Comparison:
    """Compare the stages of one recipe over the seeds that it was trained with.

    The comparison has one group per stage. Its scores are means over the seeds with an interval over seeds and units
    and Student's t interval over the seeds; its differences are those to the stage `baseline`.

    Args:
        runs: run folders of the same recipe with different seeds.
        protocol: id of a protocol; default: the main one.

    Raises:
        UserError: the recipes differ in more than their seeds.
    """
    comparison = compare_runs(runs, protocol=protocol)
    for group in comparison.groups:
        if group.differs:
            settings = ", ".join(f"{key}={shown_value(value)}" for key, value in group.differs.items())
            raise UserError(
                f"the runs differ in more than their seeds ({settings}); use `preceptor compare` to compare recipes"
            )
    return comparison


def write_comparison(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write compare.json, .csv, .tex, .html and the figures into `folder`; return the content of compare.json."""
    from preceptor.comparison.page import render
    from preceptor.comparison.picture import draw

    document = comparison.to_dict()
    write_text(folder / "compare.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(folder / "compare.csv", as_csv(document))
    write_text(folder / "compare.tex", as_latex(document))
    write_text(folder / "compare.html", render(document))
    for kind in FIGURES:
        draw(document, folder / f"compare.{kind}")
    return document


def _curves(groups: Sequence[Group]) -> tuple[Curve, ...]:
    methods: dict[str, list[Group]] = {}
    for group in groups:
        methods.setdefault(group.method, []).append(group)
    return tuple(
        Curve(method, of_method[0].stage, of_method[0].variant, tuple(of_method))
        for method, of_method in methods.items()
        if len(of_method) > 1
    )


def _cautions(groups: Sequence[Group], parts: Sequence[Category], unit: str) -> list[str]:
    cautions = []
    few = [part for part in parts if part.kind == ALL and part.independent < MINIMUM_UNITS]
    if few:
        part = min(few, key=lambda part: part.independent)
        kind = unit if part.groups is None else f"group of {unit}s that share an image or patient"
        kind = kind if part.independent == 1 else kind.replace("group", "groups", 1) if part.groups else f"{unit}s"
        verb = "is only" if part.independent == 1 else "are only"
        cautions.append(
            f"There {verb} {part.independent} {kind}: below {MINIMUM_UNITS}, no interval, test or verdict is given."
        )
    if not all(model.grouped for group in groups for model in group.models):
        cautions.append(
            f"The predictions of an earlier version do not tell which {unit}s share an image or patient, so intervals "
            "may be too narrow; `preceptor evaluate RUN` writes them again."
        )
    single = [group.name for group in groups if len(group.models) < MINIMUM_SEEDS]
    if single:
        which = "Every group" if len(single) == len(groups) else ", ".join(single)
        verb = "has" if len(single) == 1 or len(single) == len(groups) else "have"
        cautions.append(
            f"{which} {verb} one seed: intervals do not cover another training, and a verdict is about these models."
        )
    return cautions


# --- compare.json -----------------------------------------------------------------------------------------------------


def _group(comparison: Comparison, group: Group) -> dict[str, Any]:
    first = group.models[0].results
    whole = comparison.categories[0]
    return {
        "name": group.name,
        "stage": group.stage,
        "method": group.method,
        "variant": group.variant,
        "train_share": group.share,
        "settings": {key: shown_value(value) for key, value in group.differs.items()},
        "seeds": group.seeds,
        "parameters": get_nested(first, "parameters"),
        "data_sha256": get_nested(first, "data", "sha256"),
        "scores": [_score(score) for score in comparison.scores[group.name]],
        "runs": [
            {
                "run": model.name,
                "seed": model.seed,
                "mean": float(scores.mean()),
                "weights_sha256": get_nested(model.results, "weights_sha256"),
            }
            for model, scores in zip(group.models, whole.scores(group), strict=True)
        ],
    }


def _category(category: Category) -> dict[str, Any]:
    return {"metric": category.metric, "kind": category.kind, "category": category.name}


def _score(score: Score) -> dict[str, Any]:
    return {
        **_category(score.category),
        "n": score.n,
        "groups": score.category.independent,
        "mean": score.mean,
        "low": score.low,
        "high": score.high,
        "over_seeds": _interval(score.over_seeds),
    }


def _contrast(c: Contrast) -> dict[str, Any]:
    return {
        "group": c.group.name,
        "baseline": c.baseline.name,
        "title": c.title,
        "covers": c.covers,
        "paired_seeds": c.paired_seeds,
        **_delta(c.overall),
        "categories": [_delta(delta) for delta in c.parts],
        "per_seed": [
            {"seed": pair.seed, "difference": pair.difference, "p_mcnemar": pair.p_mcnemar} for pair in c.pairs
        ],
    }


def _delta(delta: Delta) -> dict[str, Any]:
    return {
        **_category(delta.category),
        "n": delta.n,
        "groups": delta.groups,
        "seeds": delta.seeds,
        "differing": delta.differing,
        "difference": delta.difference,
        "low": delta.low,
        "high": delta.high,
        "p": delta.p,
        "p_holm": delta.p_holm,
        "significant": delta.significant,
        "verdict": delta.verdict,
        "bootstrap": _interval(delta.bootstrap, with_p=True),
        "crossed": _interval(delta.crossed, with_p=True),
        "p_mcnemar": delta.p_mcnemar,
        "over_seeds": _interval(delta.over_seeds),
    }


def _interval(interval: Interval | None, *, with_p: bool = False) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {"low": interval.low, "high": interval.high} | ({"p": interval.p} if with_p else {})


def _curve(comparison: Comparison, curve: Curve, metric: str) -> dict[str, Any]:
    scores = [(group, comparison.score(group, metric)) for group in curve.groups]
    return {
        "method": curve.method,
        "stage": curve.stage,
        "variant": curve.variant,
        "metric": metric,
        "points": [
            {
                "train_share": group.share,
                "train": get_nested(group.models[0].results, "data", "train"),
                "seeds": len(group.models),
                "mean": score.mean,
                "low": score.low,
                "high": score.high,
                "n": score.n,
            }
            for group, score in scores
        ],
    }

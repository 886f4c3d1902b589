"""Runs from folders to a comparison, and the comparison to files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.compare.deltas import (
    ALPHA,
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
from preceptor.compare.groups import Group, baseline_of, choose_baseline, group_models, shown_value
from preceptor.compare.models import read_models
from preceptor.files import write_text
from preceptor.report.contents import get_nested
from preceptor.statistics import Interval


@dataclass(frozen=True)
class Curve:
    """A learning curve: a method's groups over rising shares of the training data."""

    method: str
    stage: str
    variant: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, their scores per category (all questions first), and their differences from a baseline."""

    protocol: str
    groups: tuple[Group, ...]
    baseline: Group
    categories: tuple[Category, ...]
    scores: dict[str, tuple[Score, ...]]
    contrasts: tuple[Contrast, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]

    def score(self, group: Group) -> Score:
        """Return a group's score on all questions."""
        return self.scores[group.name][0]

    @property
    def describes(self) -> str:
        return get_nested(self.groups[0].models[0].results, "describes", self.protocol) or ""

    @property
    def data(self) -> dict[str, Any]:
        return dict(self.groups[0].models[0].results["data"])

    @property
    def leaks(self) -> bool:
        return "leaks" in self.describes


def compare_runs(
    runs: Sequence[Path], *, baseline: str | None = None, protocol: str | None = None, resamples: int = RESAMPLES
) -> Comparison:
    """Compare trained models under one protocol, on the same questions.

    `runs` are run folders of one stage or of several, `baseline` a group or one of the runs (default: the student
    alone), `protocol` an id (default: the main one of the first run). Raises UserError for what cannot be read and
    for runs that must not be compared.
    """
    models, repeats = read_models(runs, protocol)
    groups = group_models(models)
    reference = choose_baseline(groups, baseline)
    parts = categories(models[0].rows)
    against = [(group, other) for group in groups if (other := baseline_of(group, reference, groups)) is not None]
    # The smallest p of a bootstrap is 2 / (resamples + 1); it must stay well below alpha when it is adjusted.
    resamples = max(resamples, math.ceil(10 * len(against) * len(parts) / ALPHA))
    contrasts = adjust([contrast(group, other, parts, resamples) for group, other in against])
    scores = {group.name: tuple(score_group(group, part, resamples) for part in parts) for group in groups}
    said = (note for model in models for note in get_nested(model.results, "notes") or [])
    # The share is part of a group's name.
    notes = dict.fromkeys(note for note in said if not note.endswith("(data.train_share)"))
    return Comparison(
        models[0].protocol,
        tuple(groups),
        reference,
        tuple(parts),
        scores,
        tuple(contrasts),
        _curves(groups),
        (*notes, *repeats, *_cautions(groups)),
    )


def write_comparison(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write compare.json, compare.html and compare.png into `folder`; return what compare.json holds."""
    from preceptor.compare.page import render
    from preceptor.compare.picture import draw

    document = as_dict(comparison)
    write_text(folder / "compare.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(folder / "compare.html", render(comparison))
    draw(comparison, folder / "compare.png")
    return document


def _curves(groups: Sequence[Group]) -> tuple[Curve, ...]:
    methods: dict[str, list[Group]] = {}
    for group in groups:
        methods.setdefault(group.method, []).append(group)
    return tuple(
        Curve(method, found[0].stage, found[0].variant, tuple(found))
        for method, found in methods.items()
        if len(found) > 1
    )


def _cautions(groups: Sequence[Group]) -> list[str]:
    single = [group.name for group in groups if len(group.models) == 1]
    if not single:
        return []
    which = "Every group" if len(single) == len(groups) else ", ".join(single)
    verb = "has" if len(single) == 1 or len(single) == len(groups) else "have"
    return [f"{which} {verb} one seed: such an interval says nothing about another training of the same recipe."]


# --- compare.json -----------------------------------------------------------------------------------------------------


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return what compare.json holds. Accuracies and differences are shares, differences group minus baseline."""
    all_questions = comparison.categories[0]
    return {
        "protocol": comparison.protocol,
        "describes": comparison.describes,
        "n": len(all_questions.columns),
        "level": 0.95,
        "alpha": ALPHA,
        "correction": "Holm",
        "baseline": comparison.baseline.name,
        "data": {key: comparison.data.get(key) for key in ("name", "variant", "test_sha256")},
        "notes": list(comparison.notes),
        "groups": [_group(comparison, group) for group in comparison.groups],
        "differences": [_contrast(c) for c in comparison.contrasts],
        "curves": [_curve(comparison, curve) for curve in comparison.curves],
    }


def _group(comparison: Comparison, group: Group) -> dict[str, Any]:
    first = group.models[0].results
    return {
        "name": group.name,
        "stage": group.stage,
        "method": group.method,
        "train_share": group.share,
        "settings": {key: shown_value(value) for key, value in group.differs.items()},
        "seeds": group.seeds,
        "parameters": get_nested(first, "parameters"),
        "data_sha256": get_nested(first, "data", "sha256"),
        "scores": [_score(score) for score in comparison.scores[group.name]],
        "runs": [
            {
                "run": m.name,
                "seed": m.seed,
                "accuracy": m.accuracy,
                "weights_sha256": get_nested(m.results, "weights_sha256"),
            }
            for m in group.models
        ],
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        "kind": score.category.kind,
        "category": score.category.name,
        "n": score.n,
        "accuracy": score.accuracy,
        "low": score.low,
        "high": score.high,
        "over_seeds": _interval(score.over_seeds) if score.over_seeds else None,
    }


def _contrast(c: Contrast) -> dict[str, Any]:
    return {
        "group": c.group.name,
        "baseline": c.baseline.name,
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
        "kind": delta.category.kind,
        "category": delta.category.name,
        "n": delta.n,
        "differing": delta.differing,
        "difference": delta.difference,
        "low": delta.low,
        "high": delta.high,
        "p": delta.p,
        "p_holm": delta.p_holm,
        "significant": delta.significant,
        "verdict": delta.verdict,
        "bootstrap": {**_interval(delta.bootstrap), "p": delta.bootstrap.p},
        "crossed": {**_interval(delta.crossed), "p": delta.crossed.p} if delta.crossed else None,
        "p_mcnemar": delta.p_mcnemar,
        "over_seeds": _interval(delta.over_seeds) if delta.over_seeds else None,
    }


def _interval(interval: Interval) -> dict[str, Any]:
    return {"low": interval.low, "high": interval.high}


def _curve(comparison: Comparison, curve: Curve) -> dict[str, Any]:
    scores = [(group, comparison.score(group)) for group in curve.groups]
    return {
        "method": curve.method,
        "points": [
            {
                "train_share": g.share,
                "train": get_nested(g.models[0].results, "data", "train"),
                "seeds": len(g.models),
                "accuracy": s.accuracy,
                "low": s.low,
                "high": s.high,
                "n": s.n,
            }
            for g, s in scores
        ],
    }

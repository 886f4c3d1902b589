"""Scores of groups and differences between them, each with its interval, its n and its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from preceptor.comparison.groups import Group
from preceptor.scores import UnitScore
from preceptor.statistics import (
    MINIMUM_UNITS,
    RESAMPLES,
    Difference,
    Interval,
    adjust_holm,
    compare_scores,
    mcnemar,
    mean_interval,
    score_interval,
)

MOST_NAMES = 12
"""Names of a kind of category that are shown; the rarer ones are merged."""
ALL = "all"


@dataclass(frozen=True)
class Category:
    """Units that are scored together under one metric.

    Args:
        metric: of the values.
        kind: `all`, or a kind of the units' categories such as `question_types`.
        name: of the category.
        rows: places of the values among a model's scores.
        units: for each of them, the number of its unit within this category.
        groups: the group of each unit, such as its image or patient, or None if no two units share one.
    """

    metric: str
    kind: str
    name: str
    rows: np.ndarray
    units: np.ndarray
    groups: tuple[str, ...] | None

    @property
    def n(self) -> int:
        return int(self.units.max()) + 1

    @property
    def independent(self) -> int:
        """The number of groups of units that share nothing."""
        return self.n if self.groups is None else len(set(self.groups))

    def scores(self, group: Group) -> np.ndarray:
        """Return the scores (seeds, n) of a group: the mean of each unit's values."""
        counts_N = np.bincount(self.units)
        return np.stack([np.bincount(self.units, row[self.rows]) / counts_N for row in group.values])


@dataclass(frozen=True)
class Score:
    """Mean score of a group over its seeds and the `n` units of a category.

    `low` to `high` is `statistics.score_interval`, None for fewer than `MINIMUM_UNITS` independent groups of units.
    `over_seeds` is Student's t interval of the seeds' means on these units, cut to the scale from 0 to 1.
    """

    category: Category
    n: int
    mean: float
    low: float | None
    high: float | None
    over_seeds: Interval | None


@dataclass(frozen=True)
class SeedPair:
    """Two models that were trained with the same seed: the difference of their means and McNemar's exact p.

    p is None unless all scores are right or wrong and there are `MINIMUM_UNITS` independent groups of units.
    """

    seed: int
    difference: float
    p_mcnemar: float | None


@dataclass(frozen=True, kw_only=True)
class Delta(Difference):
    """Mean score of a group minus that of its baseline on a category of units."""

    category: Category


@dataclass(frozen=True)
class Contrast:
    """A group against its baseline under one metric: `overall`, `parts` by category, `pairs` by common seed.

    `paired_seeds`: whether both have the same seeds, which are then paired like the units. `unit` is its name.
    """

    group: Group
    baseline: Group
    unit: str
    paired_seeds: bool
    overall: Delta
    parts: tuple[Delta, ...]
    pairs: tuple[SeedPair, ...]

    @property
    def metric(self) -> str:
        return self.overall.category.metric

    @property
    def title(self) -> str:
        """The groups in the order of the subtraction; a common share of the training data is written once."""
        task = self.metric.partition("/")[0] + ": " if "/" in self.metric else ""
        if self.group.share == self.baseline.share and self.group.name != self.group.method:
            return f"{task}{self.group.method} \u2212 {self.baseline.method} at {100 * self.group.share:g} %"
        return f"{task}{self.group.name} \u2212 {self.baseline.name}"

    @property
    def covers(self) -> str:
        """The sources of variation that the interval covers."""
        seeds, others = len(self.group.models), len(self.baseline.models)
        units = f"{self.unit}s"
        if self.overall.groups < self.overall.n:
            units += f" in {self.overall.groups} groups"
        if seeds == others == 1:
            return f"{units}; these two models only"
        if self.paired_seeds:
            return f"{units} and {seeds} paired seeds"
        return f"{units} and seeds ({seeds} against {others}, not paired)"


def categories(scores: Sequence[UnitScore], unit: str = "question") -> list[Category]:
    """Return for each metric the category of all units, then the others by kind, those with more units first.

    A category with all units is omitted. Names beyond the `MOST_NAMES` most frequent ones of a kind are merged.
    """
    found = []
    for metric in dict.fromkeys(score.metric for score in scores):
        rows = [i for i, score in enumerate(scores) if score.metric == metric]
        found.append(_category(scores, rows, ALL, f"all {unit}s"))
        for kind in dict.fromkeys(kind for i in rows for kind in scores[i].categories):
            of_kind = [(i, scores[i].categories[kind]) for i in rows if kind in scores[i].categories]
            counts = Counter(name for _, name in {(scores[i].id, name) for i, name in of_kind})
            ordered = sorted(counts, key=lambda name: (-counts[name], name))
            names: list[tuple[str, set[str]]] = [(name, {name}) for name in ordered[:MOST_NAMES]]
            if rare := set(ordered[MOST_NAMES:]):
                names.append((f"{len(rare)} rarer {kind.replace('_', ' ')}", rare))
            for name, members in names:
                selected = [i for i, own in of_kind if own in members]
                if len(selected) < len(rows):
                    found.append(_category(scores, selected, kind, name))
    return found


def _category(scores: Sequence[UnitScore], rows: Sequence[int], kind: str, name: str) -> Category:
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(scores[i].id, len(numbers)) for i in rows]
    groups = tuple({scores[i].id: scores[i].group for i in rows}.values())
    clustered = groups if len(set(groups)) < len(groups) else None
    return Category(scores[rows[0]].metric, kind, name, np.array(rows), np.array(units), clustered)


def score_group(group: Group, category: Category, resamples: int = RESAMPLES) -> Score:
    """Return the mean score of a group on the units of a category."""
    scores = category.scores(group)
    found = score_interval(scores, groups=category.groups, resamples=resamples)
    n, mean = scores.shape[1], float(scores.mean())
    if found is None:
        return Score(category, n, mean, None, None, None)
    over_seeds = None
    if len(scores) > 1:
        spread = mean_interval(scores.mean(axis=1).tolist())
        over_seeds = replace(spread, low=max(0.0, spread.low), high=min(1.0, spread.high))
    return Score(category, n, mean, found.low, found.high, over_seeds)


def contrast(
    group: Group, baseline: Group, parts: Sequence[Category], resamples: int = RESAMPLES, unit: str = "question"
) -> Contrast:
    """Return the differences of two groups on the categories of one metric, of which the first has all units.

    p-values are not adjusted yet: that needs all contrasts, see `adjust`.
    """
    first, *others = (_delta(group, baseline, category, resamples) for category in parts)
    models = {model.seed: i for i, model in enumerate(baseline.models)}
    a, b, groups = parts[0].scores(group), parts[0].scores(baseline), parts[0].groups
    tested = parts[0].independent >= MINIMUM_UNITS and all(np.isin(scores, (0.0, 1.0)).all() for scores in (a, b))
    pairs = tuple(
        SeedPair(
            model.seed,
            float(a[i].mean() - b[models[model.seed]].mean()),
            mcnemar(a[i], b[models[model.seed]], groups) if tested else None,
        )
        for i, model in enumerate(group.models)
        if model.seed in models
    )
    return Contrast(group, baseline, unit, group.seeds == baseline.seeds, first, tuple(others), pairs)


def adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Return the contrasts with p-values after Holm, in two families: the overall differences, and all others."""
    overall = adjust_holm([c.overall for c in contrasts])
    parts = iter(adjust_holm([delta for c in contrasts for delta in c.parts]))
    return [
        replace(c, overall=delta, parts=tuple(next(parts) for _ in c.parts))
        for c, delta in zip(contrasts, overall, strict=True)
    ]


def _delta(group: Group, baseline: Group, category: Category, resamples: int) -> Delta:
    found = compare_scores(
        category.scores(group),
        category.scores(baseline),
        paired=group.seeds == baseline.seeds,
        groups=category.groups,
        resamples=resamples,
    )
    return Delta(**vars(found), category=category)

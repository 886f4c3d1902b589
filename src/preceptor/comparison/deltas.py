"""Scores of groups and differences between them, each with its interval, its n and its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from preceptor.comparison.groups import Group
from preceptor.scores import UnitScore
from preceptor.statistics import (
    ALPHA,
    MINIMUM_UNITS,
    Interval,
    bootstrap_unpaired_seeds,
    crossed_test,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap_runs,
    verdict,
    welch,
    wilson,
)

RESAMPLES = 10_000
MOST_NAMES = 12
"""Names of a kind of category that are shown; the rarer ones are merged."""
FEWEST_DIFFERING = 10
"""Below this many units with a difference, no test over seeds is made, because a bootstrap of so few is too certain.
McNemar's test between two models is exact and needs no such bound."""
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
        groups: the group of each unit, or None if no two units share one.
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

    def scores(self, group: Group) -> np.ndarray:
        """Return the scores (seeds, n) of a group: the mean of each unit's values."""
        counts_N = np.bincount(self.units)
        return np.stack([np.bincount(self.units, row[self.rows]) / counts_N for row in group.values])


@dataclass(frozen=True)
class Score:
    """Mean score of a group over its seeds and the `n` units of a category.

    `low` to `high` covers units and, if there are several seeds, seeds. For one seed it is Wilson's interval if the
    scores are right or wrong, otherwise the bootstrap's. It is None for fewer than `MINIMUM_UNITS` units.
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

    p is None unless all scores are right or wrong.
    """

    seed: int
    difference: float
    p_mcnemar: float | None


@dataclass(frozen=True)
class Delta:
    """Mean score of a group minus that of its baseline on `n` units, of which `differing` have a difference.

    `low` to `high` covers units and seeds: the hull of the intervals `bootstrap` and `crossed` (analysis of variance),
    because the bootstrap is too narrow for few seeds on many units, and the analysis of variance for few units that
    differ. `p` is the larger p-value of the two; between single models with right and wrong answers it is that of the
    bootstrap and McNemar's exact test. All are None for fewer than `MINIMUM_UNITS` units, p also for fewer than
    `FEWEST_DIFFERING` differing ones. `p_holm` is adjusted for the other differences of the same family. `over_seeds`
    is the t interval of the seeds' differences on these units and does not enter the verdict. `seeds` is the number of
    seeds of the side that has fewer.
    """

    category: Category
    n: int
    seeds: int
    differing: int
    difference: float
    low: float | None = None
    high: float | None = None
    bootstrap: Interval | None = None
    crossed: Interval | None = None
    p_mcnemar: float | None = None
    over_seeds: Interval | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        if self.low is not None and self.p is None:
            return "too few differ"
        return verdict(self.low, self.high, seeds=self.seeds, significant=self.significant)


@dataclass(frozen=True)
class Contrast:
    """A group against its baseline under one metric: `overall`, `parts` by category, `pairs` by common seed.

    `paired_seeds`: whether both have the same seeds, which are then paired like the units. `unit` is what a unit is.
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
        if seeds == others == 1:
            return f"{self.unit}s; these two models only"
        if self.paired_seeds:
            return f"{self.unit}s and {seeds} paired seeds"
        return f"{self.unit}s and seeds ({seeds} against {others}, not paired)"


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
    n, mean = scores.shape[1], float(scores.mean())
    if n < MINIMUM_UNITS:
        return Score(category, n, mean, None, None, None)
    over_seeds = None
    if len(scores) > 1:
        spread = mean_interval(scores.mean(axis=1).tolist())
        over_seeds = replace(spread, low=max(0.0, spread.low), high=min(1.0, spread.high))
    if len(scores) == 1 and _binary(scores) and category.groups is None:
        spread = wilson(int(scores.sum()), n)
        return Score(category, n, mean, spread.low, spread.high, None)
    zeros = np.zeros_like(scores)
    bootstrap = paired_bootstrap_runs(scores, zeros, resamples=resamples, groups=category.groups)
    low, high = _hull(bootstrap, crossed_test(scores, zeros, paired=True))
    return Score(category, n, mean, max(0.0, low), min(1.0, high), over_seeds)


def contrast(
    group: Group, baseline: Group, parts: Sequence[Category], resamples: int = RESAMPLES, unit: str = "question"
) -> Contrast:
    """Return the differences of two groups on the categories of one metric, of which the first has all units.

    p-values are not adjusted yet: that needs all contrasts, see `adjust`.
    """
    first, *others = (_delta(group, baseline, category, resamples) for category in parts)
    models = {model.seed: i for i, model in enumerate(baseline.models)}
    a, b = parts[0].scores(group), parts[0].scores(baseline)
    pairs = tuple(
        SeedPair(
            model.seed,
            float(a[i].mean() - b[models[model.seed]].mean()),
            mcnemar(a[i], b[models[model.seed]]) if _binary(a, b) else None,
        )
        for i, model in enumerate(group.models)
        if model.seed in models
    )
    return Contrast(group, baseline, unit, group.seeds == baseline.seeds, first, tuple(others), pairs)


def adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Return the contrasts with p-values after Holm, in two families: the overall differences, and all others."""
    overall = _holm([c.overall for c in contrasts])
    parts = iter(_holm([delta for c in contrasts for delta in c.parts]))
    return [
        replace(c, overall=delta, parts=tuple(next(parts) for _ in c.parts))
        for c, delta in zip(contrasts, overall, strict=True)
    ]


def _delta(group: Group, baseline: Group, category: Category, resamples: int) -> Delta:
    a, b = category.scores(group), category.scores(baseline)
    n, fewest = a.shape[1], min(len(a), len(b))
    paired = group.seeds == baseline.seeds
    differing = int((np.abs(a.mean(axis=0) - b.mean(axis=0)) > 1e-12).sum())
    delta = Delta(category, n, fewest, differing, float(a.mean() - b.mean()))
    if n < MINIMUM_UNITS:
        return delta
    over_seeds = None
    if fewest > 1 and paired:
        over_seeds = mean_interval((a - b).mean(axis=1).tolist())
    elif fewest > 1:
        over_seeds = welch(a.mean(axis=1).tolist(), b.mean(axis=1).tolist())
    draw = paired_bootstrap_runs if paired else bootstrap_unpaired_seeds
    bootstrap = draw(a, b, resamples=resamples, groups=category.groups)
    exact = len(a) == len(b) == 1 and _binary(a, b)
    p_mcnemar = mcnemar(a[0], b[0]) if exact else None
    crossed = None if exact else crossed_test(a, b, paired=paired)
    low, high = _hull(bootstrap, crossed)
    tests = [bootstrap.p, p_mcnemar, crossed.p if crossed else None]
    # A difference of exactly 0 needs no test to be undecided.
    tested = exact or differing == 0 or differing >= FEWEST_DIFFERING
    return replace(
        delta,
        difference=bootstrap.mean,
        low=max(-1.0, low),
        high=min(1.0, high),
        bootstrap=bootstrap,
        crossed=crossed,
        p_mcnemar=p_mcnemar,
        over_seeds=over_seeds,
        p=max(value for value in tests if value is not None) if tested else None,
    )


def _binary(*scores: np.ndarray) -> bool:
    """Return whether all scores are right (1) or wrong (0)."""
    return all(bool(np.isin(array, (0.0, 1.0)).all()) for array in scores)


def _hull(one: Interval, other: Interval | None) -> tuple[float, float]:
    return (one.low, one.high) if other is None else (min(one.low, other.low), max(one.high, other.high))


def _holm(deltas: Sequence[Delta]) -> list[Delta]:
    tested = [delta for delta in deltas if delta.p is not None]
    adjusted = iter(holm([delta.p for delta in tested if delta.p is not None]))
    return [replace(delta, p_holm=next(adjusted)) if delta.p is not None else delta for delta in deltas]

"""Scores of groups and differences between them, each with its interval, its n and what may be concluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from preceptor.compare.groups import Group
from preceptor.statistics import (
    Interval,
    bootstrap_unpaired_seeds,
    crossed_test,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap_runs,
    welch,
    wilson,
)
from preceptor.vqa.metrics import Row

ALPHA = 0.05
RESAMPLES = 10_000
MOST_QUESTION_TYPES = 12
FEWEST_DIFFERING = 10
"""Below this many questions with a difference, no test over seeds is made: a bootstrap of so few is too sure of them.
McNemar's test between two models is exact and needs no such bound."""


@dataclass(frozen=True)
class Category:
    """Questions that are scored together: `kind` is all, open, closed or type; `columns` their places."""

    kind: str
    name: str
    columns: np.ndarray


@dataclass(frozen=True)
class Score:
    """Accuracy of a group on `n` questions, the mean over its seeds.

    `low` to `high` covers questions and, of several seeds, seeds (as `Delta`'s); of one seed questions alone (Wilson).
    `over_seeds` is Student's t interval of the seeds' accuracies on these very questions.
    """

    category: Category
    n: int
    accuracy: float
    low: float
    high: float
    over_seeds: Interval | None


@dataclass(frozen=True)
class SeedPair:
    """Two models that were trained with the same seed: the difference of their accuracies, McNemar's exact p."""

    seed: int
    difference: float
    p_mcnemar: float


@dataclass(frozen=True)
class Delta:
    """Accuracy of a group minus its baseline's on `n` questions, of which `differing` have a difference.

    `low` to `high` covers questions and seeds: the hull of the intervals `bootstrap` and, of several seeds, `crossed`
    (analysis of variance), since the former is too narrow for few seeds on many questions, the latter for few questions
    that differ. `p` is the larger p-value of the two, between single models that of the bootstrap and McNemar's exact
    test; None where none is made. `p_holm` is adjusted for the other differences of the same family. `over_seeds` is
    the t interval of the seeds' differences on these very questions; it decides nothing.
    """

    category: Category
    n: int
    differing: int
    difference: float
    low: float
    high: float
    bootstrap: Interval
    crossed: Interval | None
    p_mcnemar: float | None
    over_seeds: Interval | None
    p: float | None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        if self.p_holm is None:
            return "not tested"
        if not self.significant:
            return "undecided"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Contrast:
    """A group against its baseline: `overall`, `parts` per category, `pairs` per common seed.

    `paired_seeds` says whether both have the same seeds, which then are paired as the questions are.
    """

    group: Group
    baseline: Group
    paired_seeds: bool
    overall: Delta
    parts: tuple[Delta, ...]
    pairs: tuple[SeedPair, ...]

    @property
    def title(self) -> str:
        """The groups in the order of the subtraction, a common share of the training data said once."""
        if self.group.share == self.baseline.share and self.group.name != self.group.method:
            return f"{self.group.method} \u2212 {self.baseline.method} at {100 * self.group.share:g} %"
        return f"{self.group.name} \u2212 {self.baseline.name}"

    @property
    def covers(self) -> str:
        """What the interval speaks for."""
        mine, theirs = len(self.group.models), len(self.baseline.models)
        if mine == theirs == 1:
            return "questions; these two models alone"
        if self.paired_seeds:
            return f"questions and {mine} paired seeds"
        return f"questions and seeds ({mine} against {theirs}, not paired)"


def categories(rows: Sequence[Row]) -> list[Category]:
    """Return all questions, then open and closed ones, then the types of question, the frequent ones first.

    What has the same questions as all of them is left out; types beyond the `MOST_QUESTION_TYPES` most frequent ones
    are put together.
    """
    found = [Category("all", "all questions", np.arange(len(rows)))]
    for kind in ("open", "closed"):
        found.append(Category(kind, kind, _columns([row["answer_type"] == kind for row in rows])))
    counts = Counter(row["question_type"] for row in rows if row["question_type"])
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    for name in ordered[:MOST_QUESTION_TYPES]:
        found.append(Category("type", name, _columns([row["question_type"] == name for row in rows])))
    if rare := set(ordered[MOST_QUESTION_TYPES:]):
        columns = _columns([row["question_type"] in rare for row in rows])
        found.append(Category("type", f"{len(rare)} rarer types", columns))
    return [found[0], *(c for c in found[1:] if 0 < len(c.columns) < len(rows))]


def score_group(group: Group, category: Category, resamples: int = RESAMPLES) -> Score:
    """Return the accuracy of a group on the questions of a category."""
    hits = group.hits[:, category.columns]
    n = hits.shape[1]
    if len(hits) == 1:
        spread = wilson(int(hits.sum()), n)
        return Score(category, n, spread.mean, spread.low, spread.high, None)
    nothing = np.zeros_like(hits)
    low, high = _hull(
        paired_bootstrap_runs(hits, nothing, resamples=resamples),
        crossed_test(hits, nothing, paired=True) if n > 1 else None,
    )
    over_seeds = mean_interval(hits.mean(axis=1).tolist())
    return Score(category, n, float(hits.mean()), max(0.0, low), min(1.0, high), over_seeds)


def contrast(group: Group, baseline: Group, parts: Sequence[Category], resamples: int = RESAMPLES) -> Contrast:
    """Return the differences of two groups on the categories, of which the first holds all questions.

    p-values are not yet adjusted: that needs all contrasts, see `adjust`.
    """
    paired = group.seeds == baseline.seeds
    first, *others = (_delta(group, baseline, category, paired, resamples) for category in parts)
    common = {model.seed: model for model in baseline.models}
    pairs = tuple(
        SeedPair(m.seed, m.accuracy - common[m.seed].accuracy, mcnemar(m.hits, common[m.seed].hits))
        for m in group.models
        if m.seed in common
    )
    return Contrast(group, baseline, paired, first, tuple(others), pairs)


def adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Return the contrasts with p-values after Holm, in two families: the overall differences, and all others."""
    overall = _holm([c.overall for c in contrasts])
    parts = iter(_holm([delta for c in contrasts for delta in c.parts]))
    return [
        replace(c, overall=delta, parts=tuple(next(parts) for _ in c.parts))
        for c, delta in zip(contrasts, overall, strict=True)
    ]


def _delta(group: Group, baseline: Group, category: Category, paired: bool, resamples: int) -> Delta:
    a, b = group.hits[:, category.columns], baseline.hits[:, category.columns]
    draw = paired_bootstrap_runs if paired else bootstrap_unpaired_seeds
    spread = draw(a, b, resamples=resamples)
    differing = int((np.abs(a.mean(axis=0) - b.mean(axis=0)) > 1e-12).sum())
    single = len(a) == len(b) == 1
    p_mcnemar = mcnemar(a[0], b[0]) if single else None
    over_seeds = None
    if min(len(a), len(b)) > 1:
        if paired:
            over_seeds = mean_interval((a - b).mean(axis=1).tolist())
        else:
            over_seeds = welch(a.mean(axis=1).tolist(), b.mean(axis=1).tolist())
    crossed = None if single or a.shape[1] < 2 else crossed_test(a, b, paired=paired)
    low, high = _hull(spread, crossed)
    tests = [spread.p, p_mcnemar, crossed.p if crossed else None]
    # A difference of nothing at all needs no test to be undecided.
    tested = single or differing == 0 or differing >= FEWEST_DIFFERING
    p = max(value for value in tests if value is not None) if tested else None
    return Delta(
        category,
        a.shape[1],
        differing,
        spread.mean,
        max(-1.0, low),
        min(1.0, high),
        spread,
        crossed,
        p_mcnemar,
        over_seeds,
        p,
    )


def _hull(one: Interval, other: Interval | None) -> tuple[float, float]:
    return (one.low, one.high) if other is None else (min(one.low, other.low), max(one.high, other.high))


def _holm(deltas: Sequence[Delta]) -> list[Delta]:
    tested = [delta for delta in deltas if delta.p is not None]
    adjusted = iter(holm([delta.p for delta in tested if delta.p is not None]))
    return [replace(delta, p_holm=next(adjusted)) if delta.p is not None else delta for delta in deltas]


def _columns(selected: Sequence[bool]) -> np.ndarray:
    return np.flatnonzero(np.asarray(selected, dtype=bool))

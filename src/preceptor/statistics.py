"""Confidence intervals and tests for models that are scored on the same units (questions, cases, answers)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from preceptor.errors import UserError

ALPHA = 0.05
"""A difference is called significant if its p-value, corrected for the number of tests, is below."""
MINIMUM_UNITS = 10
"""Below this number of units no interval and no verdict is given: their spread is not known well enough. Units that
share an image or a patient count once."""
MINIMUM_SEEDS = 2
"""Below this number of seeds a verdict is about the trained models at hand, not about the recipe."""
FEWEST_DIFFERING = 10
"""Below this many units with a difference, no test is made, because a bootstrap of so few is too certain. McNemar's
test between two models is exact and needs no such bound."""
SMALLEST_SHOWN = 0.0005
"""Differences are shown in tenths of a point. An interval with a bound that is shown as 0.0 does not exclude 0."""
RESAMPLES = 10_000
_ELEMENTS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval. `p` is the two-sided p-value of the hypothesis that the mean is 0."""

    mean: float
    low: float
    high: float
    p: float | None = None


def verdict(low: float | None, high: float | None, *, seeds: int, significant: bool = True) -> str:
    """Return what a difference allows to conclude.

    Args:
        low: lower bound of the interval, None if there are too few units for an interval.
        high: upper bound of the interval.
        seeds: number of seeds of the side that has fewer.
        significant: whether the tests reject the hypothesis of no difference, after correction.

    Returns:
        ``too few units``; ``undecided``, if the interval includes 0 or the tests do not reject; else ``better`` or
        ``worse``. With fewer than `MINIMUM_SEEDS` seeds, ``for this seed`` is added.
    """
    if low is None or high is None:
        return "too few units"
    if not significant or not excludes_zero(low, high):
        return "undecided"
    direction = "better" if low > 0 else "worse"
    return direction if seeds >= MINIMUM_SEEDS else f"{direction} for this seed"


def excludes_zero(low: float, high: float) -> bool:
    """Return whether an interval of a difference excludes 0 as it is shown, in tenths of a point."""
    return low >= SMALLEST_SHOWN or high <= -SMALLEST_SHOWN


@dataclass(frozen=True)
class Difference:
    """Mean score of a minus that of b, each on the same units and over one model per seed.

    `n` units are in `groups` that share an image or a patient; `differing` of these groups have a difference. `seeds`
    is the number of seeds of the side that has fewer.

    `low` to `high` covers groups and seeds: the wider of the intervals `bootstrap` and `crossed` (analysis of
    variance), from the lower `low` to the higher `high`, because the bootstrap is too narrow for few seeds or few
    groups, and the analysis of variance for few units that differ. `p` is the largest p-value of the tests. Between two
    single models with right and wrong answers, McNemar's exact test is one of them; if no units share a group, the
    analysis of variance is not. All are None for fewer than `MINIMUM_UNITS` groups, p also for fewer than
    `FEWEST_DIFFERING` differing ones. `p_holm` is adjusted for the other differences of the same family
    (`adjust_holm`). `over_seeds` is the t interval of the seeds' differences on these units and does not enter the
    verdict.
    """

    n: int
    groups: int
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
        """Whether the corrected tests reject the hypothesis of no difference, and the interval excludes 0."""
        rejected = self.p_holm is not None and self.p_holm < ALPHA
        return rejected and self.low is not None and self.high is not None and excludes_zero(self.low, self.high)

    @property
    def verdict(self) -> str:
        """``too few differ``, or that of `verdict`."""
        if self.low is not None and self.p is None:
            return "too few differ"
        return verdict(self.low, self.high, seeds=self.seeds, significant=self.significant)


DifferenceT = TypeVar("DifferenceT", bound=Difference)


def compare_scores(
    a: ArrayLike, b: ArrayLike, *, paired: bool, groups: Sequence[Hashable] | None = None, resamples: int = RESAMPLES
) -> Difference:
    """Return the difference a - b of two models or recipes with its interval and p, before the correction for others.

    Every difference that the package shows is made here.

    Args:
        a: (seeds of a, n) scores.
        b: (seeds of b, n) scores on the same units.
        paired: whether row s of both was trained with the same seed.
        groups: (n,) the group of each unit, such as its image or patient; default: each unit is on its own.
        resamples: number of bootstrap samples.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n, fewest = x.shape[1], min(len(x), len(y))
    apart = _clusters(groups)
    number = len(set(apart)) if apart else n
    differing = int((_by_group(np.abs(x.mean(axis=0) - y.mean(axis=0))[None], apart)[0] > 1e-12).sum())
    found = Difference(n, number, fewest, differing, float(x.mean() - y.mean()) if n else 0.0)
    if number < MINIMUM_UNITS:
        return found
    over_seeds = None
    if fewest > 1 and paired:
        over_seeds = mean_interval((x - y).mean(axis=1).tolist())
    elif fewest > 1:
        over_seeds = welch(x.mean(axis=1).tolist(), y.mean(axis=1).tolist())
    draw = paired_bootstrap if paired else bootstrap_unpaired_seeds
    bootstrap = draw(x, y, resamples=resamples, groups=apart)
    exact = len(x) == len(y) == 1 and _binary(x, y)
    p_mcnemar = mcnemar(x[0], y[0], apart) if exact else None
    crossed = None if exact and apart is None else crossed_test(x, y, paired=paired, groups=apart)
    low, high = _wider(bootstrap, crossed)
    tests = [bootstrap.p, p_mcnemar, crossed.p if crossed else None]
    # A difference of exactly 0 needs no test to be undecided.
    tested = exact or differing == 0 or differing >= FEWEST_DIFFERING
    return replace(
        found,
        difference=bootstrap.mean,
        low=max(-1.0, low),
        high=min(1.0, high),
        bootstrap=bootstrap,
        crossed=crossed,
        p_mcnemar=p_mcnemar,
        over_seeds=over_seeds,
        p=max(value for value in tests if value is not None) if tested else None,
    )


def adjust_holm(differences: Sequence[DifferenceT]) -> list[DifferenceT]:
    """Return the differences of one family of tests with their p-values adjusted after Holm."""
    adjusted = iter(holm([one.p for one in differences if one.p is not None]))
    return [replace(one, p_holm=next(adjusted)) if one.p is not None else one for one in differences]


def score_interval(
    scores: ArrayLike, *, groups: Sequence[Hashable] | None = None, resamples: int = RESAMPLES
) -> Interval | None:
    """Return the mean score with an interval over units and seeds; None for fewer than `MINIMUM_UNITS` groups.

    `scores`: (seeds, n) from 0 to 1. For one seed with right and wrong answers it is Wilson's interval, otherwise the
    wider of bootstrap and analysis of variance.
    """
    x = np.asarray(scores, dtype=float)
    apart = _clusters(groups)
    if (len(set(apart)) if apart else x.shape[1]) < MINIMUM_UNITS:
        return None
    same = _binary(x) and float(x.min()) == float(x.max())  # no spread: every resample is alike
    if _binary(x) and (len(x) == 1 or same):
        return wilson_clustered(x[0], apart)
    zeros = np.zeros_like(x)
    bootstrap = paired_bootstrap(x, zeros, resamples=resamples, groups=apart)
    low, high = _wider(bootstrap, crossed_test(x, zeros, paired=True, groups=apart))
    return Interval(float(x.mean()), max(0.0, low), min(1.0, high))


def _clusters(groups: Sequence[Hashable] | None) -> list[Hashable] | None:
    """Return the groups, or None if each unit has its own."""
    return None if groups is None or len(set(groups)) == len(groups) else list(groups)


def _binary(*scores: np.ndarray) -> bool:
    """Return whether all scores are right (1) or wrong (0)."""
    return all(bool(np.isin(array, (0.0, 1.0)).all()) for array in scores)


def _wider(one: Interval, other: Interval | None) -> tuple[float, float]:
    """Return the lower `low` and the higher `high` of two intervals."""
    return (one.low, one.high) if other is None else (min(one.low, other.low), max(one.high, other.high))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the mean of a - b over training seeds and units, with an interval that covers both.

    `a`, `b`: (seeds, n), or (n,) for one seed. Row s of both was trained with the same seed; column q is the same unit
    everywhere. Each resample draws seeds and, independently, units with replacement: the pigeonhole bootstrap for
    crossed factors (Owen 2007, Annals of Applied Statistics 1:386-411). p is 2 min(P(d* <= 0), P(d* >= 0)), with one
    resample added so that it is never 0. `groups` are those of the units, (n,), such as their images: whole groups are
    then drawn, because their units are not independent (cluster bootstrap, Field and Welsh 2007).

    The interval is conservative if single units vary between seeds, because that variance counts twice. It is too
    narrow if whole seeds differ: few draws understate their variance by (seeds - 1) / seeds.
    """
    assert np.shape(a) == np.shape(b), f"two models on the same questions, not {np.shape(a)} and {np.shape(b)}"
    differences_SN = np.atleast_2d(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))
    return _bootstrap([differences_SN], resamples, seed, level, groups)


def bootstrap_unpaired_seeds(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the mean of a - b on the same units if the seeds of `a` are not those of `b`.

    `a`: (seeds of a, n), `b`: (seeds of b, n). As `paired_bootstrap`, but the seeds of `a` and `b` are drawn
    independently; only the units are paired. A model with one seed adds no variance of seeds.
    """
    assert np.shape(a)[1] == np.shape(b)[1], f"the same questions, not {np.shape(a)} and {np.shape(b)}"
    return _bootstrap([np.asarray(a, dtype=float), -np.asarray(b, dtype=float)], resamples, seed, level, groups)


def _bootstrap(
    terms: list[np.ndarray], resamples: int, seed: int, level: float, groups: Sequence[Hashable] | None
) -> Interval:
    """Return the interval of the sum of the terms' means. Seeds are drawn for each term, units once for all.

    `scipy.stats.bootstrap` resamples one axis only, so it knows neither crossed seeds and units nor clusters.
    """
    for term in terms:
        assert term.ndim == 2, f"(seeds, n), not {term.shape}"
        assert term.size > 0, "at least one seed and one question"
    grouped = [_by_group(term, groups) for term in terms]
    sizes_G = grouped[0][1]
    clusters = len(sizes_G)
    rng = np.random.default_rng(seed)
    draws: list[np.ndarray] = []
    step = max(1, _ELEMENTS_AT_ONCE // clusters)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        sums_RG = np.zeros((count, clusters))
        for sums_SG, _ in grouped:
            seeds = len(sums_SG)
            sums_RG += rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds @ sums_SG
        index_RG = rng.integers(clusters, size=(count, clusters))
        totals_R = np.take_along_axis(sums_RG, index_RG, axis=1).sum(axis=1)
        draws.append(totals_R / sizes_G[index_RG].sum(axis=1))
    statistics = np.concatenate(draws)
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    # With few discordant units many resamples are exactly 0; rounding must not move them to one side.
    tail = min((statistics <= 1e-12).sum(), (statistics >= -1e-12).sum())
    p = min(1.0, 2 * (float(tail) + 1) / (resamples + 1))
    return Interval(float(sum(term.mean() for term in terms)), float(low), float(high), p)


def _by_group(difference_SN: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums (seeds, groups) of the differences in each group, and the sizes of the groups."""
    n = difference_SN.shape[1]
    if groups is None:
        return difference_SN, np.ones(n)
    assert len(groups) == n, f"{len(groups)} groups for {n} questions"
    number: dict[Hashable, int] = {}
    member = np.array([number.setdefault(group, len(number)) for group in groups])
    sums_SG = np.stack([np.bincount(member, row, len(number)) for row in difference_SN])
    return sums_SG, np.bincount(member, minlength=len(number)).astype(float)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike, groups: Sequence[Hashable] | None = None) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) that two models are equally often right.

    Only the discordant units count: of b + c of them, the number that model a alone gets right is binomial with
    probability 1/2. With `groups`, the (n,) groups of the units, this is not so, because units of a group tend to be
    decided together. Instead the two models are swapped in whole groups: every group's surplus of right answers of
    model a keeps its size and has either sign with probability 1/2. The p-value is the chance of a total at least as
    far from 0, computed exactly. With one unit in each group both are the same test.

    `correct_a`, `correct_b`: (n,) booleans. 1.0 if the models never differ.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert a.shape == b.shape, f"two models on the same questions, not {a.shape} and {b.shape}"
    if _clusters(groups) is None:
        from scipy.stats import binomtest

        only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
        return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    surplus_G = np.rint(_by_group((a.astype(float) - b)[None], groups)[0][0]).astype(int)
    sizes = np.abs(surplus_G[surplus_G != 0])
    chances = np.ones(1)  # of every total of the groups so far, from -sizes.sum() to sizes.sum()
    for size in sizes.tolist():
        either = np.zeros(2 * size + 1)
        either[0] = either[-1] = 0.5
        chances = np.convolve(chances, either)
    totals = np.arange(len(chances)) - int(sizes.sum())
    return min(1.0, float(chances[np.abs(totals) >= abs(int(surplus_G.sum()))].sum()))


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of `values` (one per seed) with its Student t interval: mean +- t s / sqrt(n).

    p is of the t test that the mean is 0. For differences between models trained with the same seeds this is the
    paired test. Raises UserError for fewer than two values, which have no spread.
    """
    if len(values) < MINIMUM_SEEDS:
        raise UserError(f"an interval over seeds needs at least two of them, not {len(values)}; train with more seeds")
    x = np.asarray(values, dtype=float)
    return _t_interval(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)), len(x) - 1, level)


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Return the difference of the means of `a` and `b`, one value per seed, with Welch's t interval (1947).

    For seeds that are not paired. The Welch-Satterthwaite degrees of freedom are rounded down, which widens the
    interval. Raises UserError for fewer than two values on either side.
    """
    if min(len(a), len(b)) < MINIMUM_SEEDS:
        raise UserError(f"an interval over seeds needs two of them on each side, not {len(a)} and {len(b)}")
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    u, v = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    smallest = min(len(x), len(y)) - 1
    spread = u * u / (len(x) - 1) + v * v / (len(y) - 1)
    # Never below the smaller sample's degrees; rounding must not turn an exact 4 into 3.
    degrees = max(smallest, math.floor((u + v) ** 2 / spread + 1e-9)) if spread > 0 else smallest
    return _t_interval(float(x.mean() - y.mean()), math.sqrt(u + v), degrees, level)


def crossed_test(
    a: ArrayLike, b: ArrayLike, *, paired: bool, level: float = 0.95, groups: Sequence[Hashable] | None = None
) -> Interval:
    """Return the mean of a - b with its interval and p for new seeds and new units, by analysis of variance.

    `a`: (seeds of a, n), `b`: (seeds of b, n) scores on the same n units; `paired` if row s of both was trained with
    the same seed. Seeds and units are random and crossed, as readers and cases are in studies of diagnostic accuracy:
    the method of Dorfman, Berbaum and Metz (1992, Investigative Radiology 27:723-731) with the degrees of freedom of
    Hillis (2007, Statistics in Medicine 26:596-619), applied to the scores themselves. The variance of the mean is
    that of the seeds' means plus that of the units' means minus their common residual. If seeds differ it is a t test
    over the seeds; if they do not, it has the power of all units. So it is exact where `paired_bootstrap` is too
    narrow: few seeds, many units.

    With `groups`, the (n,) groups of the units, each group enters as one unit, by its linearised contribution to the
    mean (`_contributions`); n is then their number.

    A model with one seed adds no variance of seeds. Degrees of freedom are rounded down and are at most n - 1. Needs
    two units.
    """
    x, y = (_contributions(np.asarray(scores, dtype=float), groups) for scores in (a, b))
    terms = [x - y] if paired else [x, -y]
    n = x.shape[1]
    assert n > 1, "a variance of one question"
    means_N = sum(term.mean(axis=0) for term in terms)
    assert isinstance(means_N, np.ndarray)
    variance_of_seeds, residual, spread = 0.0, 0.0, 0.0
    for term in (term for term in terms if len(term) > 1):
        seeds = len(term)
        means_S = term.mean(axis=1)
        residual_SN = term - means_S[:, None] - term.mean(axis=0) + term.mean()
        share = float(means_S.var(ddof=1)) / seeds
        variance_of_seeds += share
        spread += share**2 / (seeds - 1)
        residual += float((residual_SN**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n)
    variance = variance_of_seeds + max(0.0, float(means_N.var(ddof=1)) / n - residual)
    degrees = n - 1
    if spread > 0:
        degrees = min(degrees, math.floor(variance**2 / spread + 1e-9))
    return _t_interval(float(means_N.mean()), math.sqrt(variance), max(1, degrees), level)


def _t_interval(mean: float, error: float, degrees: int, level: float) -> Interval:
    """Return the interval of a mean with standard error `error` and the p-value of the mean being 0."""
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, degrees)) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 2 * float(t.sf(abs(mean) / error, degrees))
    return Interval(mean, mean - half, mean + half, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, adjusted after Holm (1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, none falls below a smaller one's, none exceeds 1. If a
    difference is called significant when its adjusted p is below alpha, the chance of even one false call is at most
    alpha, however the tests depend on each other.
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = floor
    return adjusted


def _contributions(scores_SN: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Return one value (seeds, groups) per group, whose mean and variance give those of the mean over units.

    The mean over units is a ratio, the sum of scores by the number of units. A group with sum s and size m contributes
    mean + (G / n) (s - m mean): the linearisation of survey statistics (Taylor series; Obuchowski 1998, Statistics in
    Medicine 17:1495-1507, for the difference of two proportions in clustered data).
    """
    if _clusters(groups) is None:
        return scores_SN
    sums_SG, sizes_G = _by_group(scores_SN, groups)
    mean_S1 = scores_SN.mean(axis=1, keepdims=True)
    return mean_S1 + len(sizes_G) / sizes_G.sum() * (sums_SG - sizes_G * mean_S1)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Return the share k / n with Wilson's score interval (1927), for the accuracy of one model on n questions."""
    from scipy.stats import binomtest

    assert n > 0, "a share of no questions"
    assert 0 <= k <= n, f"{k} of {n} is no share"
    bounds = binomtest(k, n).proportion_ci(level, method="wilson")
    share = k / n
    # At k = 0 and k = n the bounds are exactly 0 and 1; rounding must not step over the share itself.
    return Interval(share, min(float(bounds.low), share), max(float(bounds.high), share))


def wilson_clustered(correct: ArrayLike, groups: Sequence[Hashable] | None, level: float = 0.95) -> Interval:
    """Return the share of right answers with Wilson's interval, for units of which some share a group.

    n is replaced by the effective number of units (Dean and Pagano 2015, Journal of Survey Statistics and Methodology
    3:484-503): the share's binomial variance by its variance between groups, times the squared ratio of the normal
    quantile to that of Student's t with groups - 1 degrees of freedom. It is at most n, and the number of groups if all
    answers are right or all are wrong. `correct`: (n,) booleans.
    """
    from scipy.stats import norm, t

    x = np.asarray(correct, dtype=float)
    n, share = float(len(x)), float(x.mean())
    if _clusters(groups) is None:
        return wilson(int(x.sum()), len(x), level)
    contributions_G = _contributions(x[None], groups)[0]
    number, z = len(contributions_G), float(norm.ppf((1 + level) / 2))
    variance = float(contributions_G.var(ddof=1)) / number
    if share in (0.0, 1.0):
        n = number
    elif variance > 0:
        n = min(n, share * (1 - share) / variance * (z / float(t.ppf((1 + level) / 2, number - 1))) ** 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))

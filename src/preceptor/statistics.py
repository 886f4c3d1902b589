"""Confidence intervals and tests for models that are scored on the same units (questions, cases, answers)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from preceptor.errors import UserError

ALPHA = 0.05
"""A difference is called significant if its p-value, corrected for the number of tests, is below."""
MINIMUM_UNITS = 10
"""Below this number of units no interval and no verdict is given: their spread is not known well enough."""
MINIMUM_SEEDS = 2
"""Below this number of seeds a verdict is about the trained models at hand, not about the recipe."""
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
    if not significant or low <= 0 <= high:
        return "undecided"
    direction = "better" if low > 0 else "worse"
    return direction if seeds >= MINIMUM_SEEDS else f"{direction} for this seed"


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the mean of a - b over the same units with its percentile bootstrap interval.

    Args:
        a: (n,) scores of a model, for example 0 or 1 for wrong and right answers.
        b: (n,) scores of the other model on the same units in the same order.
        resamples: number of bootstrap samples.
        seed: of the random numbers.
        level: of the interval.
        groups: (n,) the group of each unit, such as its image. Whole groups are then drawn, because their units are
            not independent (cluster bootstrap, Field and Welsh 2007).
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return paired_bootstrap_runs(x[None], y[None], resamples=resamples, seed=seed, level=level, groups=groups)


def paired_bootstrap_runs(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the mean of a - b over training seeds and units, with an interval that covers both.

    `a`, `b`: (seeds, n). Row s of both was trained with the same seed; column q is the same unit everywhere. Each
    resample draws seeds and, independently, units (or whole `groups`) with replacement: the pigeonhole bootstrap for
    crossed factors (Owen 2007, Annals of Applied Statistics 1:386-411). p is 2 min(P(d* <= 0), P(d* >= 0)), with one
    resample added so that it is never 0.

    The interval is conservative if single units vary between seeds, because that variance counts twice. It is too
    narrow if whole seeds differ: few draws understate their variance by (seeds - 1) / seeds.
    """
    assert np.shape(a) == np.shape(b), f"two models on the same questions, not {np.shape(a)} and {np.shape(b)}"
    return _bootstrap([np.asarray(a, dtype=float) - np.asarray(b, dtype=float)], resamples, seed, level, groups)


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

    `a`: (seeds of a, n), `b`: (seeds of b, n). As `paired_bootstrap_runs`, but the seeds of `a` and `b` are drawn
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


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) that two models are equally often right.

    Only the discordant units count: of b + c of them, the number that model a alone gets right is binomial with
    probability 1/2. `correct_a`, `correct_b`: (n,) booleans. 1.0 if the models never differ.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert a.shape == b.shape, f"two models on the same questions, not {a.shape} and {b.shape}"
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


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


def crossed_test(a: ArrayLike, b: ArrayLike, *, paired: bool, level: float = 0.95) -> Interval:
    """Return the mean of a - b with its interval and p for new seeds and new units, by analysis of variance.

    `a`: (seeds of a, n), `b`: (seeds of b, n) scores on the same n units; `paired` if row s of both was trained with
    the same seed. Seeds and units are random and crossed, as readers and cases are in studies of diagnostic accuracy:
    the method of Dorfman, Berbaum and Metz (1992, Investigative Radiology 27:723-731) with the degrees of freedom of
    Hillis (2007, Statistics in Medicine 26:596-619), applied to the scores themselves. The variance of the mean is
    that of the seeds' means plus that of the units' means minus their common residual. If seeds differ it is a t test
    over the seeds; if they do not, it has the power of all units. So it is exact where `paired_bootstrap_runs` is too
    narrow: few seeds, many units.

    A model with one seed adds no variance of seeds. Degrees of freedom are rounded down and are at most n - 1. Needs
    two units.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
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


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Return the share k / n with Wilson's score interval (1927), for the accuracy of one model on n questions."""
    from scipy.stats import binomtest

    assert n > 0, "a share of no questions"
    assert 0 <= k <= n, f"{k} of {n} is no share"
    bounds = binomtest(k, n).proportion_ci(level, method="wilson")
    share = k / n
    # At k = 0 and k = n the bounds are exactly 0 and 1; rounding must not step over the share itself.
    return Interval(share, min(float(bounds.low), share), max(float(bounds.high), share))

"""Intervals and tests for comparing models on the same questions. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from preceptor.errors import UserError

_ELEMENTS_AT_ONCE = 1_000_000
_MOST_DEGREES = 1000  # of Student's t; beyond, it is the normal distribution to three digits


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `p` is the two-sided p-value of "no difference", where there is one."""

    mean: float
    low: float
    high: float
    p: float | None = None


def paired_bootstrap(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[object] | None = None,
) -> Interval:
    """Return the mean of a - b over the same questions, with its percentile bootstrap interval.

    `correct_a`, `correct_b`: (n,) hits (0/1) or scores of two models on the same n questions in the same order.
    `groups`: (n,) what each question belongs to (its image); whole groups are then drawn, because questions about one
    image are not independent (Field and Welsh 2007, cluster bootstrap). Use `paired_bootstrap_runs` where each model
    was trained more than once.
    """
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    return paired_bootstrap_runs(a[None], b[None], resamples=resamples, seed=seed, level=level, groups=groups)


def paired_bootstrap_runs(
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[object] | None = None,
) -> Interval:
    """Return the mean of a - b over training seeds and questions, with an interval that covers both.

    `a`, `b`: (seeds, n) hits or scores; row s of both was trained with seed s, column q is the same question
    everywhere. Each resample draws seeds and, independently, questions (or whole `groups` of them) with replacement:
    the pigeonhole bootstrap for crossed factors (Owen 2007, Annals of Applied Statistics 1:386-411). p is
    2 min(P(d* <= 0), P(d* >= 0)), counted with one resample added so that it is never 0.

    It is on the wide side where single answers vary between seeds (they count as a seed's and as a question's
    variance), and on the narrow side where whole seeds differ: few draws understate that variance by
    (seeds - 1) / seeds, so give `mean_interval` of the per-seed differences beside it.
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
    groups: Sequence[object] | None = None,
) -> Interval:
    """Return the mean of a - b on the same questions, where the seeds of `a` are not those of `b`.

    `a`: (seeds of a, n), `b`: (seeds of b, n) hits or scores. As `paired_bootstrap_runs`, but each resample draws the
    seeds of `a` and of `b` apart; only the questions are paired. A model with one seed adds no variance of seeds: the
    interval then speaks for that one training of it.
    """
    assert np.shape(a)[1] == np.shape(b)[1], f"the same questions, not {np.shape(a)} and {np.shape(b)}"
    return _bootstrap([np.asarray(a, dtype=float), -np.asarray(b, dtype=float)], resamples, seed, level, groups)


def _bootstrap(
    parts: list[np.ndarray], resamples: int, seed: int, level: float, groups: Sequence[object] | None
) -> Interval:
    """Return the interval of the sum of the parts' means; seeds are drawn per part, questions once for all."""
    for part in parts:
        assert part.ndim == 2, f"(seeds, n), not {part.shape}"
        assert part.size > 0, "at least one seed and one question"
    grouped = [_by_group(part, groups) for part in parts]
    sizes_G = grouped[0][1]
    clusters = len(sizes_G)
    rng = np.random.default_rng(seed)
    drawn: list[np.ndarray] = []
    step = max(1, _ELEMENTS_AT_ONCE // clusters)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        sums_RG = np.zeros((count, clusters))
        for sums_SG, _ in grouped:
            seeds = len(sums_SG)
            sums_RG += rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds @ sums_SG
        index_RG = rng.integers(clusters, size=(count, clusters))
        totals_R = np.take_along_axis(sums_RG, index_RG, axis=1).sum(axis=1)
        drawn.append(totals_R / sizes_G[index_RG].sum(axis=1))
    statistics = np.concatenate(drawn)
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    # Ties at zero are common with few discordant questions; rounding of sums must not push them to one side.
    tail = min((statistics <= 1e-12).sum(), (statistics >= -1e-12).sum())
    p = min(1.0, 2 * (float(tail) + 1) / (resamples + 1))
    return Interval(float(sum(part.mean() for part in parts)), float(low), float(high), p)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) that two models are equally often right.

    Only the discordant questions count: of b + c of them, the number that model a alone gets right is binomial with
    probability 1/2. `correct_a`, `correct_b`: (n,) booleans. 1.0 if the models never differ.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    assert a.shape == b.shape, f"two models on the same questions, not {a.shape} and {b.shape}"
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of `values` (one per seed) with its Student t interval: mean +- t s / sqrt(n).

    p is of the t test that the mean is 0: of differences between models trained with the same seeds, the paired test.
    Raises UserError for fewer than two values, which have no spread.
    """
    if len(values) < 2:
        raise UserError(f"an interval over seeds needs at least two of them, not {len(values)}; train with more seeds")
    x = np.asarray(values, dtype=float)
    mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x))
    return _t_interval(mean, error, len(x) - 1, level)


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Return the difference of the means of `a` and `b`, one value per seed, with Welch's t interval (1947).

    For seeds that are not paired. The Welch-Satterthwaite degrees of freedom are rounded down, which widens the
    interval. Raises UserError for fewer than two values on either side.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"an interval over seeds needs two of them on each side, not {len(a)} and {len(b)}")
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    u, v = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    smallest = min(len(x), len(y)) - 1
    spread = u * u / (len(x) - 1) + v * v / (len(y) - 1)
    # Never below the smaller sample's degrees; rounding must not turn an exact 4 into 3.
    degrees = max(smallest, math.floor((u + v) ** 2 / spread + 1e-9)) if spread > 0 else smallest
    return _t_interval(float(x.mean() - y.mean()), math.sqrt(u + v), degrees, level)


def crossed_test(a: ArrayLike, b: ArrayLike, *, paired: bool, level: float = 0.95) -> Interval:
    """Return the mean of a - b with its interval and p for new seeds and new questions, by analysis of variance.

    `a`: (seeds of a, n), `b`: (seeds of b, n) hits or scores on the same n questions, `paired` if row s of both was
    trained with seed s. Seeds and questions are random and crossed, as readers and cases are in studies of diagnostic
    accuracy: the method of Dorfman, Berbaum and Metz (1992, Investigative Radiology 27:723-731) with the degrees of
    freedom of Hillis (2007, Statistics in Medicine 26:596-619), applied to the hits themselves. The variance of the
    mean is that of the seeds' means plus that of the questions' means less what both hold of the residual. Where seeds
    differ it is a t test over the seeds, where they do not it has the power of all questions, which makes it exact
    where `paired_bootstrap_runs` is too narrow: few seeds, many questions.

    A model with one seed adds no variance of seeds. Degrees are rounded down and are at most n - 1. Needs two
    questions.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    parts = [x - y] if paired else [x, -y]
    n = x.shape[1]
    assert n > 1, "a variance of one question"
    mean_of_questions_N = sum(part.mean(axis=0) for part in parts)
    assert isinstance(mean_of_questions_N, np.ndarray)
    of_seeds, residual, by_degrees = 0.0, 0.0, 0.0
    for part in (part for part in parts if len(part) > 1):
        seeds = len(part)
        means_S = part.mean(axis=1)
        left_SN = part - means_S[:, None] - part.mean(axis=0) + part.mean()
        share = float(means_S.var(ddof=1)) / seeds
        of_seeds += share
        by_degrees += share**2 / (seeds - 1)
        residual += float((left_SN**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n)
    variance = of_seeds + max(0.0, float(mean_of_questions_N.var(ddof=1)) / n - residual)
    degrees = min(n - 1, _MOST_DEGREES)
    if by_degrees > 0:
        degrees = min(degrees, math.floor(variance**2 / by_degrees + 1e-9))
    return _t_interval(float(mean_of_questions_N.mean()), math.sqrt(variance), max(1, degrees), level)


def _t_interval(mean: float, error: float, degrees: int, level: float) -> Interval:
    half = student_t(level, degrees) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 1 - _central_probability(math.atan(abs(mean) / error / math.sqrt(degrees)), degrees)
    return Interval(mean, mean - half, mean + half, max(0.0, p))


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, adjusted after Holm (1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, none falls below a smaller one's, none exceeds 1. Calling a
    difference significant where its adjusted p is below alpha keeps the chance of even one false call at alpha,
    however the tests depend on each other.
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = floor
    return adjusted


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Return the share k / n with Wilson's score interval (1927), for the accuracy of one model on n questions."""
    assert n > 0, "a share of no questions"
    assert 0 <= k <= n, f"{k} of {n} is no share"
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At k = 0 and k = n the bounds are exactly 0 and 1; rounding must not step over the share itself.
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def student_t(level: float, degrees: int) -> float:
    """Return the t with P(|T| <= t) = `level` for Student's distribution with `degrees` degrees of freedom.

    With theta = atan(t / sqrt(degrees)) the probability is a finite sum (Abramowitz and Stegun 26.7.3, 26.7.4);
    theta is found by bisection.
    """
    low, high = 0.0, math.pi / 2
    while low < (theta := (low + high) / 2) < high:
        if _central_probability(theta, degrees) < level:
            low = theta
        else:
            high = theta
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(theta: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) tan(theta))."""
    odd = degrees % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(degrees // 2):
        total += term
        term *= math.cos(theta) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def _by_group(difference_SN: np.ndarray, groups: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums (seeds, groups) of the differences in each group, and the groups' sizes."""
    n = difference_SN.shape[1]
    if groups is None:
        return difference_SN, np.ones(n)
    assert len(groups) == n, f"{len(groups)} groups for {n} questions"
    number: dict[object, int] = {}
    member = np.array([number.setdefault(group, len(number)) for group in groups])
    sums_SG = np.stack([np.bincount(member, row, len(number)) for row in difference_SN])
    return sums_SG, np.bincount(member, minlength=len(number)).astype(float)

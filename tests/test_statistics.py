"""Intervals and tests against scipy, closed forms and simulated coverage. All simulations are seeded."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from preceptor.errors import UserError
from preceptor.statistics import (
    adjust_holm,
    bootstrap_unpaired_seeds,
    compare_scores,
    crossed_test,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    score_interval,
    welch,
    wilson,
    wilson_clustered,
)


def test_mean_interval_against_scipy():
    values = [61.2, 62.9, 60.4, 63.3, 62.0]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    interval = mean_interval(values)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((np.mean(values), low, high), rel=1e-10)


def test_mean_interval_of_one_seed():
    with pytest.raises(UserError, match="at least two"):
        mean_interval([0.5])


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 1), (45, 123), (272, 451)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_against_scipy(k, n, level):
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    interval = wilson(k, n, level)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval.low <= interval.mean == k / n <= interval.high


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_against_scipy(only_a, only_b, both):
    a = [True] * only_a + [False] * only_b + [True] * both
    b = [False] * only_a + [True] * only_b + [True] * both
    discordant = only_a + only_b
    expected = stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_with_thousands_of_questions():
    assert mcnemar([True] * 2100 + [False] * 1900, [False] * 2100 + [True] * 1900) == pytest.approx(
        stats.binomtest(2100, 4000).pvalue, rel=1e-9
    )


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one():
    rng = np.random.default_rng(1)
    a, b = rng.random(2000) < 0.7, rng.random(2000) < 0.6
    difference = a.astype(float) - b
    error = difference.std() / np.sqrt(2000)
    interval = paired_bootstrap(a, b)
    assert interval.mean == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.05 * error)
    assert interval.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.05 * error)


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.random(150) < 0.6, rng.random(150) < 0.5
    difference = a.astype(float) - b
    expected = stats.bootstrap((difference,), np.mean, n_resamples=20_000, method="percentile", rng=3)
    interval = paired_bootstrap(a, b, resamples=20_000)
    # one question is 1/150 = 0.0067: the quantiles may differ by about one
    assert interval.low == pytest.approx(expected.confidence_interval.low, abs=0.007)
    assert interval.high == pytest.approx(expected.confidence_interval.high, abs=0.007)


def test_p_value_by_enumeration():
    """a - b = (1, 0): of the four draws one has a mean of 0 or less and all have one of 0 or more, so p is 2/4."""
    assert paired_bootstrap([1, 1], [0, 1], resamples=40_000).p == pytest.approx(0.5, abs=0.02)
    assert paired_bootstrap([1, 1], [0, 0], resamples=999).p == pytest.approx(2 / 1000)
    assert paired_bootstrap([1, 0], [1, 0], resamples=999).p == 1


def test_p_value_shrinks_with_the_difference_like_mcnemar():
    a, b = np.zeros(300, bool), np.zeros(300, bool)
    a[:40], b[40:60] = True, True
    assert paired_bootstrap(a, b).p == pytest.approx(mcnemar(a, b), abs=0.01)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_invariants(pairs, seed):
    a, b = np.array(pairs).T
    there = paired_bootstrap(a, b, resamples=200, seed=seed)
    back = paired_bootstrap(b, a, resamples=200, seed=seed)
    assert there == paired_bootstrap(a, b, resamples=200, seed=seed)
    assert -1 <= there.low <= there.high <= 1
    assert 0 < there.p <= 1
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert there.p == back.p
    alone = paired_bootstrap(a, b, resamples=200, seed=seed, groups=[f"image {i}" for i in range(len(a))])
    assert alone == there


def test_one_group_leaves_nothing_to_draw():
    interval = paired_bootstrap([1, 1, 0], [0, 1, 0], groups=["x"] * 3, resamples=50)
    assert interval.low == interval.high == pytest.approx(1 / 3)


def test_groups_of_unequal_size_by_enumeration():
    """Groups of 3 and 1 questions with differences (1, 1, 1) and 0: the mean is 1, 3/4 (twice) or 0, a quarter each."""
    arguments = ([1, 1, 1, 0], [0, 0, 0, 0])
    low = paired_bootstrap(*arguments, groups="aaab", level=0.48, resamples=20_000)
    wide = paired_bootstrap(*arguments, groups="aaab", level=0.52, resamples=20_000)
    assert (low.low, low.high) == pytest.approx((0.75, 0.75))
    assert (wide.low, wide.high) == pytest.approx((0, 1))


def test_runs_that_all_agree_are_one_run():
    rng = np.random.default_rng(4)
    a, b = rng.random(80) < 0.6, rng.random(80) < 0.5
    runs = paired_bootstrap(np.tile(a, (4, 1)), np.tile(b, (4, 1)), resamples=20_000)
    one = paired_bootstrap(a, b, resamples=20_000)
    assert runs.mean == pytest.approx(one.mean)
    assert (runs.low, runs.high) == pytest.approx((one.low, one.high), abs=0.013)  # one question of 80


def test_runs_with_one_question_resample_seeds_only():
    a = np.array([[0.1], [0.2], [0.6], [0.3], [0.8]])
    expected = stats.bootstrap((a[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=0)
    interval = paired_bootstrap(a, np.zeros_like(a), resamples=20_000)
    assert interval.low == pytest.approx(expected.confidence_interval.low, abs=0.01)
    assert interval.high == pytest.approx(expected.confidence_interval.high, abs=0.01)


def test_more_resamples_than_fit_at_once(monkeypatch):
    """The chunks change nothing but the memory: interval and p stay those of one large draw, up to sampling error."""
    rng = np.random.default_rng(5)
    a, b = rng.random((3, 60)) < 0.6, rng.random((3, 60)) < 0.5
    whole = paired_bootstrap(a, b)
    monkeypatch.setattr("preceptor.statistics._ELEMENTS_AT_ONCE", 7 * 60)
    chunked = paired_bootstrap(a, b)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), abs=0.01)


def test_misaligned_models_are_refused():
    with pytest.raises(AssertionError, match="same questions"):
        paired_bootstrap([1, 0, 1], [1])
    with pytest.raises(AssertionError, match="groups"):
        paired_bootstrap([1, 0, 1], [1, 0, 0], groups=["x"])


def test_coverage_of_the_paired_bootstrap():
    """Independent questions: the true difference of 0.1 lies in about 95 % of the 95 % intervals."""
    rng = np.random.default_rng(6)
    covered = 0
    for repeat in range(400):
        a, b = rng.random(200) < 0.6, rng.random(200) < 0.5
        interval = paired_bootstrap(a, b, resamples=400, seed=repeat)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_coverage_needs_groups_where_questions_share_images():
    """Ten questions an image with a shared effect: groups keep the coverage, drawing single questions loses it."""
    rng = np.random.default_rng(7)
    covered = {"questions": 0, "images": 0}
    groups = np.repeat(np.arange(60), 10)
    for repeat in range(250):
        a = rng.random(600) < np.repeat(rng.choice([0.1, 0.9], 60), 10)
        b = rng.random(600) < 0.5
        for name, given_groups in (("questions", None), ("images", groups.tolist())):
            interval = paired_bootstrap(a, b, resamples=400, seed=repeat, groups=given_groups)
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["images"] / 250 >= 0.91
    assert covered["questions"] / 250 <= 0.75


def test_coverage_of_runs_with_seed_effects():
    """Five seeds, each with its own gain around 0.05: an interval over questions of the mean alone is too narrow."""
    rng = np.random.default_rng(8)
    covered = {"runs": 0, "questions": 0}
    for repeat in range(300):
        skill = rng.random(200)
        gain = 0.05 + 0.04 * rng.standard_normal(5)
        a = np.clip(0.15 + 0.6 * skill + gain[:, None], 0, 1) > rng.random((5, 200))
        b = np.clip(0.15 + 0.6 * skill, 0, 1) > rng.random((5, 200))
        runs = paired_bootstrap(a, b, resamples=400, seed=repeat)
        mean = paired_bootstrap(a.mean(0), b.mean(0), resamples=400, seed=repeat)
        covered["runs"] += runs.low <= 0.05 <= runs.high
        covered["questions"] += mean.low <= 0.05 <= mean.high
    assert covered["runs"] / 300 >= 0.90
    assert covered["questions"] < covered["runs"] - 0.08 * 300


def test_p_of_the_mean_interval_is_the_paired_t_test():
    a, b = [0.61, 0.63, 0.60, 0.64], [0.60, 0.60, 0.59, 0.62]
    assert mean_interval([x - y for x, y in zip(a, b, strict=True)]).p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert mean_interval([0.0, 0.0]).p == 1
    assert mean_interval([0.25, 0.25]).p == 0


def test_welch_against_scipy():
    """Equal sizes and spreads give whole degrees; else rounding them down may only widen the interval."""
    a, b = [0.0, 1.0, 2.0], [5.0, 6.0, 7.0]
    expected = stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval()
    interval = welch(a, b)
    assert (interval.mean, interval.low, interval.high, interval.p) == pytest.approx((-5, low, high, expected.pvalue))
    rng = np.random.default_rng(9)
    for _ in range(50):
        a, b = rng.normal(0, 1, rng.integers(2, 8)), rng.normal(0.5, 3, rng.integers(2, 8))
        expected = stats.ttest_ind(a, b, equal_var=False)
        low, high = expected.confidence_interval()
        interval = welch(a.tolist(), b.tolist())
        assert interval.low <= low + 1e-12
        assert interval.high >= high - 1e-12
        assert interval.p >= expected.pvalue - 1e-12
    with pytest.raises(UserError, match="two of them on each side"):
        welch([0.5], [0.4, 0.6])


def test_holm_by_hand():
    """Holm's rule on four tests: 4 x 0.01, 3 x 0.013, 2 x 0.03, 0.04; none below a smaller p's, none above 1."""
    assert holm([0.03, 0.01, 0.04, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.3))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps, alpha):
    rejected, order = set(), sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, index in enumerate(order):
        if (len(ps) - rank) * ps[index] > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(ps)) if p <= alpha} == rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(ps):
    for p, adjusted in zip(ps, holm(ps), strict=True):
        assert p <= adjusted <= min(1, len(ps) * p) + 1e-12


def test_unpaired_seeds_draw_both_sides():
    """One question: the difference of two bootstrapped means, whose variance is the sum of theirs."""
    a, b = np.array([[0.1], [0.5], [0.9], [0.4]]), np.array([[0.2], [0.3], [0.1]])
    expected = stats.bootstrap(
        (a[:, 0], b[:, 0]),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        n_resamples=20_000,
        method="percentile",
        vectorized=True,
        rng=0,
    ).confidence_interval
    interval = bootstrap_unpaired_seeds(a, b, resamples=20_000)
    assert interval.mean == pytest.approx(0.475 - 0.2)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_unpaired_seeds_pair_the_questions():
    """Two models with the same answers differ by nothing, however many seeds say so."""
    hits = np.random.default_rng(10).random(50) < 0.5
    interval = bootstrap_unpaired_seeds(np.tile(hits, (3, 1)), np.tile(hits, (2, 1)))
    assert (interval.mean, interval.p) == (pytest.approx(0), 1)
    assert (interval.low, interval.high) == pytest.approx((0, 0))


def test_one_seed_leaves_the_t_test_over_questions():
    rng = np.random.default_rng(11)
    a, b = rng.random((1, 80)), rng.random((1, 80))
    expected = stats.ttest_rel(a[0], b[0])
    low, high = expected.confidence_interval()
    for paired in (True, False):
        interval = crossed_test(a, b, paired=paired)
        assert (interval.low, interval.high, interval.p) == pytest.approx((low, high, expected.pvalue))


def test_questions_without_variance_leave_the_t_test_over_seeds():
    rng = np.random.default_rng(12)
    skill = rng.random(40)
    a, b = rng.random((4, 1)) + skill, rng.random((4, 1)) + skill
    expected = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    low, high = expected.confidence_interval()
    interval = crossed_test(a, b, paired=True)
    assert (interval.low, interval.high, interval.p) == pytest.approx((low, high, expected.pvalue))
    unpaired, by_welch = crossed_test(a, b, paired=False), welch(a.mean(axis=1).tolist(), b.mean(axis=1).tolist())
    assert (unpaired.low, unpaired.high) == pytest.approx((by_welch.low, by_welch.high))


def test_crossed_test_by_its_definition():
    """Mean squares by loops, Hillis' degrees: what a study with S readers and n cases would report."""
    rng = np.random.default_rng(13)
    seeds, n = 4, 30
    d = 0.3 + 0.4 * rng.normal(size=(seeds, 1)) + rng.normal(size=n) + rng.normal(size=(seeds, n))
    mean = d.mean()
    of_seeds = sum(n * (d[s].mean() - mean) ** 2 for s in range(seeds)) / (seeds - 1)
    of_questions = sum(seeds * (d[:, q].mean() - mean) ** 2 for q in range(n)) / (n - 1)
    both = sum((d[s, q] - d[s].mean() - d[:, q].mean() + mean) ** 2 for s in range(seeds) for q in range(n)) / (
        (seeds - 1) * (n - 1)
    )
    assert of_questions > both
    total = of_seeds + of_questions - both
    degrees = int(total**2 / (of_seeds**2 / (seeds - 1)))
    half = stats.t.ppf(0.975, degrees) * np.sqrt(total / (seeds * n))
    interval = crossed_test(d, np.zeros_like(d), paired=True)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((mean, mean - half, mean + half))
    assert interval.p == pytest.approx(2 * stats.t.sf(mean / np.sqrt(total / (seeds * n)), degrees))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 12), st.integers(0, 1000))
def test_crossed_test_invariants(of_a, of_b, n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((of_a, n)) < 0.6, rng.random((of_b, n)) < 0.5
    there, back = crossed_test(a, b, paired=False), crossed_test(b, a, paired=False)
    assert there.low <= there.mean <= there.high
    assert 0 <= there.p <= 1
    assert (there.mean, there.low, there.high, there.p) == pytest.approx((-back.mean, -back.high, -back.low, back.p))
    same = crossed_test(a, a, paired=True)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


# --- units in groups --------------------------------------------------------------------------------------------------


def test_mcnemar_of_single_units_is_the_same_with_groups_of_one():
    a, b = np.arange(60) < 25, (np.arange(60) > 15) & (np.arange(60) < 22)
    assert mcnemar(a, b, list(range(60))) == mcnemar(a, b)


def test_mcnemar_of_groups_by_counting_every_exchange():
    """All 2^8 ways to exchange the two models in whole groups, counted one by one."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 4)
    a, b = rng.random(32) < 0.7, rng.random(32) < 0.4
    surplus = np.bincount(groups, a.astype(float) - b)
    totals = [abs(sum(s * x for s, x in zip(signs, surplus, strict=True))) for signs in product((1, -1), repeat=8)]
    expected = np.mean(np.array(totals) >= abs(surplus.sum()) - 1e-9)
    assert mcnemar(a, b, groups.tolist()) == pytest.approx(expected)


def test_groups_that_are_decided_together_count_once():
    """Six images, all 20 questions of each won: 120 discordant questions, but six throws of a coin."""
    a, b, groups = np.ones(120, bool), np.zeros(120, bool), np.repeat(np.arange(6), 20).tolist()
    assert mcnemar(a, b) < 1e-30
    assert mcnemar(a, b, groups) == pytest.approx(2 / 2**6)
    assert compare_scores([a], [b], paired=True, groups=groups).verdict == "too few units"


def test_the_variance_between_groups_of_equal_size_is_that_of_their_means():
    """With groups of one size the linearised test is Student's paired t test over the means of the groups."""
    rng = np.random.default_rng(1)
    a, b, groups = rng.random(60), rng.random(60), np.repeat(np.arange(15), 4).tolist()
    found = crossed_test(a[None], b[None], paired=True, groups=groups)
    expected = stats.ttest_rel(a.reshape(15, 4).mean(1), b.reshape(15, 4).mean(1))
    low, high = expected.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))


def test_wilson_of_groups():
    """Equal answers within groups of one size: as many units as groups, up to Student's quantile; and at the ends."""
    correct, groups = np.repeat(np.arange(20) < 12, 5), np.repeat(np.arange(20), 5).tolist()
    alone, clustered = wilson(60, 100), wilson_clustered(correct, groups)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    assert wilson_clustered(correct, list(range(100))) == alone
    for value in (0, 1):
        ends = wilson_clustered(np.full(100, bool(value)), groups)
        assert (ends.low, ends.high) == pytest.approx((wilson(20 * value, 20).low, wilson(20 * value, 20).high))


def test_seeds_that_are_all_right_have_wilsons_interval():
    """A bootstrap has no spread there."""
    for right in (0, 1):
        assert score_interval(np.full((3, 40), right)) == wilson(40 * right, 40)


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_too_few_units_or_groups_have_no_interval(n: int):
    assert score_interval(np.ones((1, n))) is None
    assert score_interval(np.ones((3, 5 * n)), groups=[i // 5 for i in range(5 * n)]) is None
    found = compare_scores(np.ones((2, n)), np.zeros((2, n)), paired=True)
    assert (found.low, found.p, found.over_seeds, found.verdict) == (None, None, None, "too few units")


@pytest.mark.parametrize("graded", [False, True])
def test_a_bound_that_is_shown_as_zero_is_no_verdict(graded: bool):
    """Ties are undecided, and so is an interval that starts below a twentieth of a point, shown as 0.0."""
    scores = np.full((2, 40), 0.5) if graded else np.arange(80).reshape(2, 40) % 2
    (tie,) = adjust_holm([compare_scores(scores, scores, paired=True)])
    assert (tie.low, tie.high, tie.verdict) == (0, 0, "undecided")
    (tiny,) = adjust_holm([compare_scores(np.full((2, 40), 0.5004), np.full((2, 40), 0.5), paired=True)])
    assert tiny.low == pytest.approx(0.0004)
    assert (tiny.p_holm < 0.05, tiny.significant, tiny.verdict) == (True, False, "undecided")


@pytest.mark.slow
@pytest.mark.parametrize("images", [10, 30, 150])
def test_intervals_and_tests_hold_for_questions_about_one_image(images: int):
    """Two models without a true difference, 2 to 20 questions an image that share its chance of being answered.

    Of 400 repeats, at least 95 % less three standard errors (1.1 points each) must hold the truth, less a point for as
    few as ten images; at most 5 % plus as much may be significant. As if questions were independent, many more fail.
    """
    rng = np.random.default_rng(images)
    repeats, held, alarms, naive, naive_alarms, accuracy = 400, 0, 0, 0, 0, 0
    for repeat in range(repeats):
        groups = np.repeat(np.arange(images), np.minimum(1 + rng.geometric(0.2, images), 20))
        skill = rng.uniform(0.25, 0.75, images)
        shifted = np.clip(skill + 0.25 * rng.standard_normal(images), 0, 1)
        a, b = (chance[groups] > rng.random(len(groups)) for chance in (shifted, skill))
        (found,) = adjust_holm([compare_scores([a], [b], paired=True, groups=groups.tolist(), resamples=500)])
        alone, share = paired_bootstrap(a, b, resamples=500, seed=repeat), score_interval([b], groups=groups.tolist())
        held += found.low <= 0 <= found.high
        alarms += found.significant
        naive += alone.low <= 0 <= alone.high
        naive_alarms += mcnemar(a, b) < 0.05
        accuracy += share.low <= 0.5 <= share.high
    assert held / repeats >= 0.95 - 0.033 - 0.01 * (images == 10)
    assert accuracy / repeats >= 0.95 - 0.033
    assert alarms / repeats <= 0.05 + 0.033
    assert naive / repeats < 0.90
    assert naive_alarms / repeats > 0.10

"""Differences with known answers, what must hold for any of them, and the coverage of their intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.comparison.deltas import MOST_NAMES, adjust, categories, contrast, score_group
from preceptor.comparison.groups import Group
from preceptor.comparison.models import TrainedModel
from preceptor.scores import UnitScore
from preceptor.statistics import MINIMUM_UNITS, crossed_test, mcnemar, paired_bootstrap, wilson

FEW = 200


def make_group(name: str, hits: np.ndarray, seeds: list[int] | None = None, types: int = 3) -> Group:
    """Return a group with one model per row of `hits`."""
    hits = np.atleast_2d(np.asarray(hits, dtype=float))
    models = []
    for seed, row in zip(seeds or range(len(hits)), hits, strict=True):
        scores = tuple(
            UnitScore(
                f"{i:04}",
                f"{i:04}",
                "accuracy",
                float(hit),
                {"answer_types": "closed" if i % 2 else "open", "question_types": f"type {i % types}"},
            )
            for i, hit in enumerate(row)
        )
        folder = Path(name)
        models.append(
            TrainedModel(folder, folder, "vqa", "baseline", name, seed, 1.0, {}, {"stage": ""}, "toy", scores)
        )
    return Group(name, name, "baseline", 0, 1.0, {}, tuple(models))


def compare(a: Group, b: Group, resamples: int = FEW):
    return adjust([contrast(a, b, categories(a.models[0].scores), resamples)])[0]


def test_a_known_difference_between_two_models():
    """40 questions only a answers, 20 only b, of 300: a difference of 20/300, McNemar's p over 60 discordant ones."""
    a, b = np.zeros(300, bool), np.zeros(300, bool)
    a[:40], b[40:60] = True, True
    delta = compare(make_group("a", a), make_group("b", b), 10_000).overall
    expected = paired_bootstrap(a, b)
    assert (delta.n, delta.differing, delta.difference) == (300, 60, pytest.approx(20 / 300))
    assert (delta.low, delta.high) == (expected.low, expected.high)
    assert delta.p_mcnemar == mcnemar(a, b)
    assert delta.p == max(mcnemar(a, b), expected.p)
    assert (delta.crossed, delta.over_seeds) == (None, None)
    assert delta.verdict == "better for this seed"


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    found = compare(make_group("a", rng.random((3, 121)) < 0.7), make_group("b", rng.random((3, 121)) < 0.5))
    for kind in ("answer_types", "question_types"):
        parts = [part for part in found.parts if part.category.kind == kind]
        assert sum(part.n for part in parts) == 121
        assert sum(part.n * part.difference for part in parts) == pytest.approx(121 * found.overall.difference)


def test_paired_seeds_are_told_from_others():
    hits = np.random.default_rng(1).random((3, 60)) < 0.5
    a, same, other = (
        make_group("a", hits, [0, 1, 2]),
        make_group("b", ~hits, [0, 1, 2]),
        make_group("c", hits, [0, 1, 5]),
    )
    assert compare(a, same).paired_seeds
    assert "3 paired seeds" in compare(a, same).covers
    found = compare(a, other)
    assert not found.paired_seeds
    assert "not paired" in found.covers
    assert [pair.seed for pair in found.pairs] == [0, 1]
    assert [pair.p_mcnemar for pair in found.pairs] == [1, 1]


def test_one_seed_against_several_has_no_interval_over_seeds():
    rng = np.random.default_rng(2)
    found = compare(make_group("a", rng.random((1, 60)) < 0.9), make_group("b", rng.random((4, 60)) < 0.4))
    assert found.overall.over_seeds is None
    assert found.overall.p_mcnemar is None
    assert found.overall.crossed is not None
    assert found.overall.verdict == "better for this seed"


def test_few_differing_questions_are_not_tested_over_seeds():
    """Three seeds that agree on 9 questions of 50 would look certain to a bootstrap; ten are tested."""
    base = np.zeros((3, 50), bool)
    for differing, verdict in ((9, "too few differ"), (10, "better")):
        a = base.copy()
        a[:, :differing] = True
        delta = compare(make_group("a", a), make_group("b", base), 10_000).overall
        assert delta.differing == differing
        assert delta.verdict == verdict
        assert delta.low <= delta.difference <= delta.high


def test_a_score_of_one_seed_is_wilsons():
    group = make_group("a", np.arange(50) < 31)
    score = score_group(group, categories(group.models[0].scores)[0])
    assert (score.mean, score.low, score.high) == (0.62, wilson(31, 50).low, wilson(31, 50).high)
    assert score.over_seeds is None


def test_a_score_of_seeds_covers_their_spread():
    """Seeds far apart on many questions: the interval must not be narrower than Student's over the seeds."""
    rng = np.random.default_rng(3)
    group = make_group("a", np.stack([rng.random(2000) < accuracy for accuracy in (0.5, 0.6, 0.7)]))
    score = score_group(group, categories(group.models[0].scores)[0], FEW)
    assert score.over_seeds is not None
    assert score.low <= score.over_seeds.low + 0.01
    assert score.high >= score.over_seeds.high - 0.01


def test_categories():
    group = make_group("a", np.ones(130, bool), types=MOST_NAMES + 3)
    found = categories(group.models[0].scores)
    assert [part.name for part in found[:3]] == ["all questions", "closed", "open"]
    assert len(found) == 3 + MOST_NAMES + 1
    assert found[-1].name == "3 rarer question types"
    assert sum(part.n for part in found[3:]) == 130
    assert len(categories(make_group("a", np.ones(10, bool), types=1).models[0].scores)) == 3


def test_a_unit_with_several_values_counts_once():
    """Two cases in three combinations of modalities: the score of a case is the mean of its values, and n is 2."""
    values = {("a", "1"): 0.2, ("a", "2"): 0.4, ("b", "1"): 0.6, ("b", "2"): 1.0}
    scores = tuple(UnitScore(case, case, "dice", v, {"modalities": number}) for (case, number), v in values.items())
    folder = Path("x")
    model = TrainedModel(folder, folder, "segmentation", "baseline", "x", 0, 1.0, {}, {}, "toy", scores)
    group = Group("x", "x", "baseline", 0, 1.0, {}, (model,))
    whole, one, two = categories(scores, "case")
    assert [(part.name, part.n) for part in (whole, one, two)] == [("all cases", 2), ("1", 2), ("2", 2)]
    assert whole.scores(group) == pytest.approx(np.array([[0.3, 0.8]]))
    assert one.scores(group) == pytest.approx(np.array([[0.2, 0.6]]))


def test_metrics_of_several_tasks_are_apart():
    scores = [UnitScore(f"{i}", "g", "vg/recall" if i < 3 else "roc/accuracy", 1.0) for i in range(5)]
    assert [(part.metric, part.n) for part in categories(scores, "answer")] == [("vg/recall", 3), ("roc/accuracy", 2)]


def test_below_the_minimum_there_is_no_interval_and_no_verdict():
    n = MINIMUM_UNITS - 1
    found = compare(make_group("a", np.ones((2, n), bool)), make_group("b", np.zeros((2, n), bool)))
    delta = found.overall
    assert (delta.difference, delta.low, delta.high, delta.p, delta.verdict) == (1, None, None, None, "too few units")
    score = score_group(found.group, categories(found.group.models[0].scores)[0])
    assert (score.mean, score.low, score.high) == (1, None, None)


def test_one_seed_of_graded_scores_has_the_t_test_beside_the_bootstrap():
    """McNemar's test is for right and wrong. For Dice and the like, Student's paired t test takes its place."""
    rng = np.random.default_rng(5)
    a, b = rng.random(60), rng.random(60)
    delta = compare(make_group("a", a), make_group("b", b), 2000).overall
    expected = crossed_test(a[None], b[None], paired=True)
    assert delta.crossed == expected
    assert delta.p_mcnemar is None
    assert delta.bootstrap is not None
    assert delta.p == max(expected.p or 0, delta.bootstrap.p or 0)


def test_units_of_a_group_are_drawn_together():
    """Answers of one dialogue: the interval is that of the cluster bootstrap, wider than that of single answers."""
    rng = np.random.default_rng(6)
    effect = np.repeat(rng.choice([0.0, 1.0], 20), 5)
    names = [f"dialogue {i // 5}" for i in range(100)]
    groups = []
    for values in (effect, np.full(100, 0.5)):
        scores = tuple(UnitScore(f"{i}", names[i], "vg/recall", float(v)) for i, v in enumerate(values))
        folder = Path("x")
        model = TrainedModel(folder, folder, "grounding", "baseline", "x", 0, 1.0, {}, {}, "toy", scores)
        groups.append(Group("x", "x", "baseline", 0, 1.0, {}, (model,)))
    delta = contrast(groups[0], groups[1], categories(groups[0].models[0].scores), 2000).overall
    expected = paired_bootstrap(effect, np.full(100, 0.5), groups=names, resamples=2000)
    assert delta.bootstrap == expected


def test_pairs_of_seeds_are_tested_by_groups():
    rng = np.random.default_rng(6)
    values = [np.repeat(rng.random(20) < share, 5) for share in (0.7, 0.4)]
    names = [f"image {i // 5}" for i in range(100)]
    groups = []
    for hits in values:
        scores = tuple(UnitScore(f"{i}", names[i], "accuracy", float(hit)) for i, hit in enumerate(hits))
        folder = Path("x")
        model = TrainedModel(folder, folder, "vqa", "baseline", "x", 0, 1.0, {}, {}, "toy", scores)
        groups.append(Group("x", "x", "baseline", 0, 1.0, {}, (model,)))
    (pair,) = contrast(groups[0], groups[1], categories(groups[0].models[0].scores), FEW).pairs
    assert pair.difference == pytest.approx(values[0].mean() - values[1].mean())
    assert pair.p_mcnemar == mcnemar(*values, names) > mcnemar(*values)


def test_holm_counts_overall_differences_apart_from_parts():
    rng = np.random.default_rng(4)
    base = make_group("base", rng.random(200) < 0.4)
    others = [make_group(str(i), rng.random(200) < 0.5) for i in range(3)]
    raw = [contrast(group, base, categories(base.models[0].scores), FEW) for group in others]
    adjusted = adjust(raw)
    smallest = min(range(3), key=lambda i: raw[i].overall.p or 0)
    assert adjusted[smallest].overall.p_holm == pytest.approx(min(1, 3 * (raw[smallest].overall.p or 0)))
    parts = [(d.p, e.p_holm) for c, a in zip(raw, adjusted, strict=True) for d, e in zip(c.parts, a.parts, strict=True)]
    p, p_holm = min(parts, key=lambda pair: pair[0] or 0)
    assert p_holm == pytest.approx(min(1, len(parts) * (p or 0)))


answers = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@given(answers, st.integers(1, 3), st.integers(2, 40))
def test_a_group_against_itself_is_nothing(rng, seeds, n):
    hits = rng.random((seeds, n)) < 0.5
    found = compare(make_group("a", hits), make_group("b", hits), 50)
    for delta in (found.overall, *found.parts):
        assert delta.difference == 0
        assert not delta.significant
        if delta.n >= MINIMUM_UNITS:
            assert (delta.low, delta.high, delta.p_holm, delta.verdict) == (0, 0, 1, "undecided")
        else:
            assert (delta.low, delta.high, delta.p_holm, delta.verdict) == (None, None, None, "too few units")


@given(answers, st.integers(1, 3), st.integers(1, 3), st.integers(2, 40), st.booleans())
def test_swapping_the_groups_flips_the_signs(rng, of_a, of_b, n, shifted):
    a = make_group("a", rng.random((of_a, n)) < 0.8)
    b = make_group("b", rng.random((of_b, n)) < 0.4, list(range(int(shifted), of_b + int(shifted))))
    there, back = compare(a, b, 50), compare(b, a, 50)
    opposite = {"better": "worse", "worse": "better"}
    opposite |= {f"{a} for this seed": f"{b} for this seed" for a, b in opposite.items()}
    for one, other in zip((there.overall, *there.parts), (back.overall, *back.parts), strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert one.p_mcnemar == other.p_mcnemar
        assert (one.n, one.differing) == (other.n, other.differing)
        if there.paired_seeds or of_a == of_b == 1:  # else other draws belong to either side
            if one.n >= MINIMUM_UNITS:
                assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
            assert one.p == pytest.approx(other.p)
            assert other.verdict == opposite.get(one.verdict, one.verdict)


@given(answers, st.integers(1, 3), st.integers(2, 30))
def test_a_marked_difference_excludes_zero(rng, seeds, n):
    """Significance is a statement about the interval that is printed, never beyond it."""
    a = make_group("a", rng.random((seeds, n)) < rng.random())
    b = make_group("b", rng.random((seeds, n)) < rng.random())
    found = compare(a, b, 2000)
    for delta in (found.overall, *found.parts):
        if delta.low is None:
            assert delta.n < MINIMUM_UNITS
            continue
        assert -1 <= delta.low <= delta.difference <= delta.high <= 1
        assert not delta.significant or delta.low > 0 or delta.high < 0


@pytest.mark.slow
@pytest.mark.parametrize(("n", "seeds", "of_seed"), [(450, 1, 0.0), (450, 3, 0.0), (450, 5, 0.03), (1000, 3, 0.06)])
def test_coverage_and_false_alarms(n: int, seeds: int, of_seed: float):
    """Simulated recipes with a true gain of 0.05, each seed's own about it with the deviation `of_seed`.

    The printed interval must hold the truth in at least 95 % of the comparisons, less three standard errors of 300
    (1.3 points each); with no gain, at most 5 % plus as much may be marked. The plain bootstrap fails the last case:
    three seeds that differ by much more than 1,000 questions explain.
    """
    rng = np.random.default_rng(n + seeds)
    covered = alarms = by_bootstrap = 0
    repeats = 300
    for repeat in range(repeats):
        gain = 0.05 if repeat % 2 else 0.0
        skill = 0.25 + 0.5 * rng.random(n)
        mine = np.clip(skill + gain + of_seed * rng.standard_normal((seeds, 1)), 0, 1)
        a, b = mine > rng.random((seeds, n)), skill > rng.random((seeds, n))
        groups = make_group("a", a, types=1), make_group("b", b, types=1)
        all_questions = categories(groups[0].models[0].scores)[:1]
        delta = adjust([contrast(*groups, all_questions, 1000)])[0].overall
        covered += delta.low <= gain <= delta.high
        by_bootstrap += delta.bootstrap.low <= gain <= delta.bootstrap.high
        alarms += gain == 0 and delta.significant
    assert covered / repeats >= 0.95 - 0.038
    assert alarms / (repeats / 2) <= 0.05 + 0.054
    if n == 1000:
        assert by_bootstrap / repeats < 0.91


def test_categories_with_more_units_come_first():
    names = ["rare", "frequent", "frequent", "usual", "frequent", "usual"]
    scores = [UnitScore(f"{i}", f"{i}", "accuracy", 1.0, {"question_types": name}) for i, name in enumerate(names)]
    assert [category.name for category in categories(scores)[1:]] == ["frequent", "usual", "rare"]

from __future__ import annotations

import math
from pathlib import Path

import pytest

from preceptor.report.contents import RunRecord, StageRecord
from preceptor.report.format import enumerate_words, finite
from preceptor.segmentation import subset_scores
from preceptor.segmentation.heat_table import LEVELS, Column, Scale
from preceptor.segmentation.report import headline, tally
from preceptor.segmentation.subsets import parse_subset

MINUS = "\u2212"


def test_headline_in_words():
    dice = {"ct": 0.5, "pet": 0.7, "ct+pet": 0.9}
    protocol = {"dice": 0.7, "n": 40, "subsets": {name: {"dice": {"lesion": value}} for name, value in dice.items()}}
    before = {"protocols": {"p": {"dice": 0.66}}}
    results = {"protocols": {"p": protocol}, "modalities": ["ct", "pet"], "regions": ["lesion"]}
    stages = [StageRecord("baseline", Path(), before), StageRecord("distilled", Path(), results)]
    entry = {"difference": 0.04, "low": -0.001, "high": 0.081}
    run = RunRecord(Path(), stages, {"comparison": {"p": {"distilled - baseline": entry}}})
    found = " ".join(headline(run, subset_scores.subject_of(run.document))).replace("\u00a0", " ").replace(MINUS, "-")
    assert found == (
        "The distilled network reaches a mean Dice of 70.0 % over all 3 combinations of CT and PET on 40 test cases "
        "for lesion. The baseline, the same network without distillation, reaches 66.0 %. The difference is +4.0 "
        "points, -0.1 to +8.1 (95 %): not distinguishable from 0. One modality alone gives "
        "60.0 % on average, from 50.0 (CT) to 70.0 % (PET); both together give 90.0 %."
    )


def test_tally_counts_what_the_table_prints():
    def stage(name: str, values: list[float]) -> StageRecord:
        subsets = {k: {"dice": {"x": v}} for k, v in zip(("a", "b", "a+b"), values, strict=True)}
        return StageRecord(name, Path(), {"protocols": {"p": {"subsets": subsets}}, "modalities": ["a", "b"]})

    run = RunRecord(Path(), [stage("baseline", [0.5, 0.5, 0.5]), stage("distilled", [0.6, 0.4, 0.50001])], {})
    assert tally(run, subset_scores.subject_of(run.document)) == (
        "The distilled network scores higher than the baseline in 1 of 3 combinations, lower in 1, equally in 1. "
        "This count is not a test."
    )


def test_what_a_modality_adds():
    table = {("a",): {"x": 0.3}, ("b",): {"x": 0.4}, ("a", "b"): {"x": 0.9}, ("c",): {"x": 0.2}, ("b", "c"): {"x": 0.5}}
    # a: (a, b) less (b); nothing to compare (a) with.
    assert subset_scores.gain(table, "a", "x") == pytest.approx(0.5)
    assert subset_scores.gain(table, "b", "x") == pytest.approx(((0.9 - 0.3) + (0.5 - 0.2)) / 2)
    assert subset_scores.gain({("a",): {"x": 1.0}}, "a", "x") is None


def test_means_are_of_finite_values_and_need_every_region():
    assert subset_scores.mean([1.0, math.nan, 3.0]) == 2.0
    assert subset_scores.mean([math.nan]) is None
    subject = subset_scores.Subject(("t1", "t2"), ("a", "b"), None)
    found = subset_scores.validation_scores(
        {"validation_subsets": {"t1": {"a": 0.2, "b": 0.4}, "t2": {"a": 0.2}}}, subject
    )
    assert found == {("t1",): {"a": 0.2, "b": 0.4, "mean": pytest.approx(0.3)}, ("t2",): {"a": 0.2}}


def test_names_of_combinations():
    assert parse_subset("t1+flair", ("flair", "t1", "t2")) == ("flair", "t1")
    assert parse_subset("t1+pet", ("flair", "t1")) is None
    assert enumerate_words(["a"]) == "a"
    assert enumerate_words(["a", "b", "c"]) == "a, b and c"
    assert [finite(v) for v in (1, 0.5, True, None, "1", math.nan, math.inf)] == [1.0, 0.5] + [None] * 5


def test_colours_go_from_worst_to_best():
    columns = [Column("baseline", "t", {("a",): {"x": 0.12, "y": 0.88}})]
    shares, lengths = Scale.over(columns, "%"), Scale(0, 50, "mm")
    assert (shares.low, shares.high) == pytest.approx((0.1, 0.9))
    assert [shares.level(v) for v in (0.1, 0.5, 0.9)] == [0, 4, LEVELS - 1]
    assert [lengths.level(v) for v in (0, 25, 50)] == [LEVELS - 1, 4, 0]
    assert lengths.worse(0.3)
    assert not lengths.worse(-0.3)
    assert shares.worse(-0.01)
    assert not shares.worse(-0.0001)  # is printed as 0.0

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.segmentation.election import Election, mean_scores

MODALITIES, REGIONS = ("flair", "t1", "t1ce", "t2"), ("et", "tc", "wt")


def election() -> Election:
    return Election(MODALITIES, REGIONS)


def test_each_region_elects_its_best_modality():
    e = election()
    assert e.teachers("multi") == []
    e.vote(7, torch.tensor([[0.1, 0.2, 0.9], [0.0, 0.0, 0.1], [0.8, 0.7, 0.3], [0.1, 0.3, 0.8]]))
    assert e.teachers("per_task") == [2, 2, 0]
    assert e.teachers("multi") == [0, 2]
    assert e.teachers("single") == [2]  # means 0.4, 0.03, 0.6, 0.4
    assert e.history()[0]["elected"] == {"et": "t1ce", "tc": "t1ce", "wt": "flair"}
    assert e.history()[0]["soft_dice"]["wt"]["t2"] == pytest.approx(0.8)
    assert (e.history()[0]["step"], e.history()[0]["overall"]) == (7, "t1ce")


def test_a_modality_that_no_case_has_is_not_elected():
    e = election()
    scores = torch.full((4, 3), 0.1)
    scores[2] = math.nan
    e.vote(0, scores)
    assert e.teachers("multi") == [0]  # of equals the first
    assert e.history()[0]["soft_dice"]["et"]["t1ce"] is None
    with pytest.raises(ValueError, match="any of the modalities"):
        e.vote(1, torch.full((4, 3), math.nan))
    with pytest.raises(ValueError, match="shape"):
        e.vote(1, torch.zeros(3, 4))


def test_a_region_without_a_vote_keeps_its_teacher():
    e, nan = election(), math.nan
    e.vote(0, torch.tensor([[nan, 0.2, 0.3], [nan, 0.1, 0.4], [nan, 0.5, 0.1], [nan, 0.3, 0.2]]))
    assert e.teachers("per_task") == [-1, 2, 1]
    assert e.teachers("multi") == [1, 2]
    assert e.history()[0]["elected"] == {"et": None, "tc": "t1ce", "wt": "t1"}
    e.vote(5, torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.1, 0.4], [0.1, 0.5, 0.1], [0.3, 0.3, 0.2]]))
    e.vote(9, torch.tensor([[nan, 0.9, nan], [nan, 0.1, nan], [nan, 0.5, nan], [nan, 0.3, nan]]))
    assert e.teachers("per_task") == [3, 0, 1]
    assert [vote["elected"]["et"] for vote in e.history()] == [None, "t2", "t2"]
    other = election()
    other.load(e.state())
    assert other.history() == e.history()
    appointed = election()
    appointed.appoint("T1c")  # an alias
    appointed.vote(0, torch.tensor([[nan, 0.2, 0.3], [nan, 0.1, 0.4], [nan, 0.5, 0.1], [nan, 0.3, 0.2]]))
    assert appointed.teachers("per_task") == [2, 2, 1]
    assert appointed.history()[0]["elected"]["et"] == "t1ce"


def test_the_best_over_all_regions_is_compared_where_all_have_votes():
    """Without its vote in the hard region et, t1ce would have the largest mean."""
    e, nan = election(), math.nan
    e.vote(0, torch.tensor([[0.1, 0.7, 0.8], [0.0, 0.1, 0.2], [nan, 0.6, 0.8], [0.2, 0.2, 0.2]]))
    assert e.teachers("single") == [0]
    e.vote(1, torch.tensor([[nan, 0.7, 0.8], [nan, nan, nan], [0.9, nan, nan], [nan, 0.2, 0.2]]))
    assert e.teachers("single") == [2], "nothing is in common: each by its own regions"


def test_the_appointed_teach_until_the_first_vote():
    e = election()
    e.appoint("flair")
    assert e.teachers("per_task") == [0, 0, 0]
    assert e.history() == []


@given(st.lists(st.lists(st.floats(0, 1), min_size=12, max_size=12), max_size=4), st.booleans())
def test_state_is_restored_whole(votes, appointed):
    e, other = election(), election()
    if appointed:
        e.appoint("t2")
    for step, values in enumerate(votes):
        e.vote(10 * step, torch.tensor(values).view(4, 3))
    other.load(e.state())
    assert other.history() == e.history()
    for kind in ("single", "multi", "per_task"):
        assert other.teachers(kind) == e.teachers(kind)
        assert all(0 <= teacher < 4 for teacher in e.teachers(kind))
    if votes:
        last = torch.tensor(votes[-1]).view(4, 3)
        assert all(last[w, r] == last[:, r].max() for r, w in enumerate(e.teachers("per_task")))


def test_means_leave_out_what_is_missing():
    a, b = torch.tensor([[0.2], [math.nan]]), torch.tensor([[0.4], [math.nan]])
    found = mean_scores([a, b])
    assert float(found[0, 0]) == pytest.approx(0.3)
    assert bool(torch.isnan(found[1, 0]))

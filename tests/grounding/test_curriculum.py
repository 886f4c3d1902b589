from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.grounding.curriculum import Curriculum, confidence_and_margin

share = st.floats(0, 1)


@given(share, share, share, share)
def test_the_threshold_falls_and_what_has_entered_stays(a, b, confidence, margin):
    early, late = sorted((a, b))
    c = Curriculum()
    assert c.threshold(early) >= c.threshold(late)
    one, two = torch.tensor([confidence]), torch.tensor([min(margin, confidence)])
    before, after = (float(c.weights(one, two, progress)) for progress in (early, late))
    assert after >= before
    assert before in (0.0, pytest.approx(float(c.score(one, two))))


def test_ends():
    c = Curriculum(begin=0.8, end=0.2, over=0.5, margin_weight=0.25, weigh=False)
    assert c.threshold(0) == 0.8
    assert c.threshold(0.25) == pytest.approx(0.5)
    assert c.threshold(0.5) == c.threshold(1) == pytest.approx(0.2)
    assert float(c.score(torch.tensor(0.8), torch.tensor(0.4))) == pytest.approx(0.7)
    sure = torch.tensor([0.9, 0.3])
    assert c.weights(sure, sure, 0.0).tolist() == [1, 0]
    assert c.weights(sure, sure, 1.0).tolist() == [1, 1]
    reached = torch.tensor([0.75])
    assert Curriculum(begin=0.75).weights(reached, reached, 0.0).tolist() == [0.75]


@pytest.mark.parametrize("wrong", [{"begin": 0.2, "end": 0.5}, {"begin": 1.5}, {"over": 0}, {"margin_weight": 2}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match="must"):
        Curriculum(**wrong)


def test_confidence_and_margin_by_hand():
    logits = torch.log(torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8]], [[0.6, 0.3, 0.1]] * 3]))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    confidence, margin = confidence_and_margin(logits, mask)
    assert confidence.tolist() == pytest.approx([0.6, 0])
    assert margin.tolist() == pytest.approx([0.3, 0])

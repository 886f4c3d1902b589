from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import write_box
from preceptor.grounding.selection import box_agreement, choose, word_overlap

words = st.lists(st.sampled_from(["left", "lung", "nodule", "heart"]), max_size=4).map(" ".join)


def test_the_majority_wins():
    said = ["a nodule in the left lung", "the heart is large", "nodule in left lung", "a nodule of the left lung"]
    assert choose(said, word_overlap) in (0, 3)
    assert choose(["only"], word_overlap) == 0
    assert choose(["same", "same"], word_overlap) == 0


@given(st.lists(words, min_size=2, max_size=5))
def test_the_chosen_has_the_highest_mean_similarity(said):
    alike = word_overlap(said)
    assert np.allclose(alike, alike.T)
    assert alike.min() >= 0
    assert alike.max() <= 1
    means = [np.mean([alike[i, j] for j in range(len(said)) if j != i]) for i in range(len(said))]
    assert means[choose(said, word_overlap)] == pytest.approx(max(means))


def test_boxes_vote_by_overlap():
    a, b, c = (0, 0, 100, 100), (0, 0, 100, 90), (500, 500, 900, 900)
    said = [write_box(box) for box in (c, a, b)]
    assert choose(said, lambda texts: np.ones((3, 3)), box_weight=1.0) in (1, 2)
    assert box_agreement([a], [b]) == pytest.approx(0.9)
    assert box_agreement([a, c], [c, a]) == pytest.approx(1)
    assert box_agreement([a, c], [a]) == pytest.approx(0.5)
    assert (box_agreement([], []), box_agreement([a], [])) == (1, 0)


def test_the_weight_decides_between_words_and_boxes():
    apart, same = [(0, 0, 100, 100), (200, 0, 300, 100)], (500, 500, 900, 900)
    said = [f"lung {write_box(box)}" for box in apart] + [f"{name} {write_box(same)}" for name in ("liver", "spleen")]
    assert choose(said, word_overlap, box_weight=0.25) == 0
    assert choose(said, word_overlap, box_weight=0.75) == 2


def test_texts_are_compared_without_their_boxes():
    """As words, boxes differ unless they are the same, and would count more than `box_weight` says."""
    said = [
        f"{name} {write_box(box)}"
        for name, box in (("lung", (0, 0, 9, 9)), ("lung", (5, 5, 9, 9)), ("liver", (0, 0, 9, 9)))
    ]
    seen = []

    def similarity(texts):
        seen.extend(texts)
        return word_overlap(texts)

    assert choose(said, similarity, box_weight=0.0) in (0, 1)
    assert choose(said, similarity, box_weight=1.0) in (0, 2)
    assert set(seen) == {"lung", "liver"}


def test_wrong_calls():
    with pytest.raises(ValueError, match="no candidates"):
        choose([], word_overlap)
    with pytest.raises(ValueError, match="shape"):
        choose(["a", "b"], lambda texts: np.ones((3, 3)))

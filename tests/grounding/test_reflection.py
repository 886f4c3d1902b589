from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.grounding.reflection import Correction, CorrectionBuffer, best_correction, judge
from preceptor.grounding.selection import word_overlap


def alike(a: str, b: str) -> float:
    return float(word_overlap([a, b])[0, 1])


TRUTH = "the nodule <box>(0,0),(100,100)</box>"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (TRUTH, None),
        ("the nodule <box>(0,0),(100,80)</box>", None),
        ("the nodule", "no box"),
        ("the nodule <box>(0,0),(100,40)</box>", "wrong box"),
        ("heart <|box_start|>(0,0),(100,100)<|box_end|>", "unlike"),
    ],
)
def test_judgements(answer, reason):
    assert judge(answer, TRUTH, alike).reason == reason


def test_a_box_that_overlaps_enough_is_right_although_its_numbers_differ():
    """As words, the boxes have nothing in common."""
    boxes = [f"<|box_start|>({x},100),(300,300)<|box_end|>" for x in (100, 103, 290)]
    assert judge(boxes[1], boxes[0], alike).reason is None
    assert judge(f"it is here: {boxes[1]}", boxes[0], alike).reason is None
    assert judge(boxes[2], boxes[0], alike).reason == "wrong box"
    named = [f"<|object_ref_start|>liver<|object_ref_end|>{box}" for box in boxes]
    assert judge(named[1], named[0], alike).reason is None
    assert judge(named[1].replace("liver", "spleen"), named[0], alike).reason == "unlike"


def test_texts_without_boxes():
    found = judge("left lung", "the left lung", alike)
    assert (found.reason, found.boxes) == (None, 1.0)
    assert found.score == pytest.approx(1 + 4 / 5)
    assert judge("spleen", "the left lung", alike).reason == "unlike"


def test_the_best_correction_contains_the_truth():
    said = ["a mass in the lung", "the left lung", "it is the left lung of a child", "it is The Left Lung."]
    text, found = best_correction(said[2:], "the left lung", alike)
    assert text == said[3]
    assert found.reason is None
    assert best_correction(said, "the left lung", alike)[0] == said[1]
    assert best_correction(said[:1], "the left lung", alike) is None
    assert best_correction(["left, the lung"], "the left lung", alike) is None, "the words are not in their order"
    assert best_correction(["the left lung is at (1,2),(30,40)"], "the left lung", alike, tau=0) is None
    assert best_correction(["the left lung " + "and more " * 9], "the left lung", alike) is None, "not similar enough"
    assert best_correction(["anything"], "", alike) is None
    assert best_correction([], "the left lung", alike) is None


entries = st.lists(st.tuples(st.integers(0, 6), st.text(max_size=5)), max_size=30)


@given(entries, st.integers(1, 5))
def test_the_buffer_keeps_the_newest_of_each_question(drawn, size):
    buffer = CorrectionBuffer(size)
    newest: dict[int, str] = {}
    for number, (id, text) in enumerate(drawn):
        buffer.add(Correction(str(id), "where?", "wrong", text, "unlike", number))
        newest.pop(id, None)
        newest[id] = text
    expected = list(newest.items())[-size:]
    assert [(int(c.id), c.corrected) for c in buffer.corrections] == expected
    buffer.close_round(10, {"no box": 2, "unlike": 1}, 2)
    again = CorrectionBuffer.restore(buffer.state())
    assert again.corrections == buffer.corrections
    assert (
        again.rounds
        == buffer.rounds
        == [
            {
                "round": 0,
                "asked": 10,
                "failed": 3,
                "failure_rate": 0.3,
                "reasons": {"no box": 2, "unlike": 1},
                "corrected": 2,
                "size": len(expected),
            }
        ]
    )
    assert again.state() == buffer.state()


def test_what_is_right_now_is_forgotten():
    buffer = CorrectionBuffer(3)
    buffer.add(Correction("a", "where?", "x", "y", "no box", 0))
    buffer.forget("a", "what?")
    assert len(buffer) == 1
    buffer.forget("a", "where?")
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="must be at least 1"):
        CorrectionBuffer(0)


def test_corrections_are_used_in_turn_and_then_forgotten():
    buffer = CorrectionBuffer(5)
    for id in "abc":
        buffer.add(Correction(id, "where?", "x", "y", "no box", 0))
    first = buffer.order(1)
    buffer.use(first[:2], 2)
    assert {c.id for c in buffer.order(1)[1:]} == {c.id for c in first[:2]}
    assert buffer.order(1)[0].id == first[2].id
    assert CorrectionBuffer.restore(buffer.state()).order(1) == buffer.order(1)
    buffer.use([c for c in buffer.corrections if c.uses], 2)
    assert [c.id for c in buffer.corrections] == [first[2].id]
    buffer.add(Correction(first[0].id, "where?", "x", "y", "no box", 1))  # failed again in a later round
    assert buffer.corrections[-1].uses == 0
    assert len({tuple(c.id for c in buffer.order(seed)) for seed in range(20)}) == 2


def test_a_bound_that_is_reached_is_enough():
    truth, answer = "<box>(0,0),(100,100)</box>", "<box>(0,0),(100,50)</box>"
    assert judge(answer, truth, alike, overlap=0.5).reason is None
    assert judge("a", "b", lambda *_: 0.5, tau=0.5).reason is None

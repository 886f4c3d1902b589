from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import rename_marks, write_box
from preceptor.data.grounding.box_policy import apply_policy, require_inside
from preceptor.data.grounding.boxes import from_pixels, iou, repair_box, validate_box
from preceptor.errors import UserError

whole = st.integers(0, 1000)
boxes = st.tuples(whole, whole, whole, whole)
good = boxes.filter(lambda b: b[0] < b[2] and b[1] < b[3])
anywhere = st.tuples(*[st.floats(-2000, 3000)] * 4)


@given(anywhere, st.integers(1, 4000), st.integers(1, 4000))
def test_pixels_and_back(box, width, height):
    x0, y0, x1, y1 = box
    pixels = (x0 * width / 1000, y0 * height / 1000, x1 * width / 1000, y1 * height / 1000)
    assert from_pixels(pixels, width, height) == pytest.approx(box, abs=1e-6)


def test_pixels():
    assert from_pixels((10, 20, 30, 40), 100, 200) == (100, 100, 300, 200)


@given(anywhere)
def test_a_mended_box_has_no_fault(box):
    found = repair_box(box)
    assert found is None or validate_box(found) == []
    assert (validate_box(box) == []) == (found == box)


def cells(box) -> set:
    return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}


small = st.tuples(*[st.integers(0, 8)] * 4)


@given(small, small)
def test_iou_counts_cells(a, b):
    both, either = cells(a) & cells(b), cells(a) | cells(b)
    assert iou(a, b) == pytest.approx(len(both) / len(either) if either else 0)
    assert iou(a, b) == iou(b, a)


FAULTS = {
    "<box>(30,10),(20,40)</box>": ("swapped corners", "<box>(20,10),(30,40)</box>"),
    "<|box_start|>(10,10),(2000,40)<|box_end|>": ("outside", "<|box_start|>(10,10),(1000,40)<|box_end|>"),
    "<box>(10,10),(10,40)</box>": ("empty", None),
    "<box>left lung</box>": ("unreadable", None),
    "<|box_start|>(10,10),(20": ("unreadable", None),
}


@pytest.mark.parametrize("text", FAULTS)
def test_policies(text):
    fault, repaired = FAULTS[text]
    counts: Counter[str] = Counter()
    assert apply_policy(f"see {text}!", "repair", "file:3", counts) == (repaired and f"see {repaired}!")
    assert counts == {fault: 1}
    assert apply_policy(text, "drop", "file:3", counts) is None
    with pytest.raises(UserError, match="file:3"):
        apply_policy(text, "refuse", "file:3", counts)


@given(st.lists(good, max_size=3), st.sampled_from(["repair", "drop", "refuse"]))
def test_good_texts_stay(written, policy):
    text = "; ".join(rename_marks(write_box(box), "bird") for box in written)
    counts: Counter[str] = Counter()
    assert apply_policy(text, policy, "x", counts) == text
    assert not counts


def test_an_unknown_policy():
    with pytest.raises(UserError, match="did you mean 'repair'"):
        apply_policy("", "repiar", "x", Counter())  # type: ignore[arg-type]


def test_repairing_does_not_hide_a_wrong_format():
    inside, outside = write_box((1, 2, 3, 4)), write_box((1, 2, 1800, 900))
    require_inside([inside, outside, outside, inside], "qwen2-vl", "file")
    require_inside([outside] * 3, "qwen2-vl", "file")  # too few to tell
    with pytest.raises(UserError, match=r"file: 3 of 4 boxes leave their image if they are read as qwen2-vl"):
        require_inside([inside, outside, outside, outside], "qwen2-vl", "file")

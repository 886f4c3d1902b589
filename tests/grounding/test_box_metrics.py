from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import rename_marks, write_box
from preceptor.data.grounding.boxes import iou
from preceptor.grounding.box_metrics import (
    Boxes,
    bird_boxes,
    bird_named,
    clean_response,
    grounding_scores,
    mean_over,
    strict_boxes,
    strict_named,
)

ONE, TWO = "<box>(0,0),(100,100)</box>", "<box>(500,500),(600,600)</box>"


# Outputs of `extract_information` in the published test_metric/regularization.py.
@pytest.mark.parametrize(
    ("response", "cleaned"),
    [
        ("liver.<|im_end|>\nmore", "liver."),
        ("liver<|endoftext|>", "liver"),
        ("assistant\n liver \nuser", "liver"),
        ("a\nb\nc\nd", "b"),
        ("  liver ", "liver"),
        ("Liver\nwhich is normal", "Liver\nwhich is normal"),
        ("x <|im_end|>\n<box>(1,2),(3,4)</box>", "x <box>(1,2),(3,4)</box>"),
        ("Lesion<|im_end|>", "Lesion<|im_end|>"),
        ("<box>(12, 30),(40, 50)</box>", "<box>(12, 30),(40, 50)</box>"),
        ("\n\n", ""),
        ("a<|im_end|>\nb\nc", "ab\nc"),
    ],
)
def test_responses_are_cleaned_as_published(response, cleaned):
    assert clean_response(response) == cleaned


# Results of the published test_metric/eval_VG.py for the reference <box>(12,30),(40,50)</box>.
@pytest.mark.parametrize(
    ("response", "matched", "predicted"),
    [
        ("<box>(12,30),(40,50)</box>\nthat is it", 1, 1),
        ("<box>(12, 30),(40, 50)</box>", 1, 1),
        ("<box>(12.0,30.5),(40.0,50.5)</box>", 1, 1),
        ("<box>12,30,40,50</box>", 1, 1),
        ("x <|im_end|>\n<box>(12,30),(40,50)</box>", 1, 1),
        ("(12,30),(40,50)", 1, 1),
        ("(12, 30),(40, 50)", 0, 0),  # without marks, only whole numbers without spaces
        ("(12.0,30.0),(40.0,50.0)", 0, 0),
        ("<box>the liver</box> (12,30),(40,50)", 0, 0),  # with a mark, bare numbers are not read
        ("<box>(12,30),(40,50),(60,70)</box>", 0, 0),
        ("<box>[12,30,40,50]</box>", 0, 0),
        ("<box>(12,30),\n(40,50)</box>", 0, 0),
        ("<box>(nan,30),(40,50)</box>", 0, 0),
        ("<box>(40,50),(12,30)</box>", 0, 1),  # corners are not sorted
    ],
)
def test_boxes_are_read_as_published(response, matched, predicted):
    assert bird_boxes("<box>(12,30),(40,50)</box>", response) == Boxes(1, matched, predicted)


def test_boxes_as_published():
    assert bird_boxes(ONE + TWO, "at <box>(0,0),(100,90)</box>") == Boxes(2, 1, 1)
    assert bird_boxes(ONE, "at (0,0),(100,90) I think") == Boxes(1, 1, 1)
    assert bird_boxes(ONE, "at (0,0),(100,50)") == Boxes(1, 0, 1)  # exactly one half is too little
    assert bird_boxes(ONE + ONE, ONE) == Boxes(2, 2, 1)  # one box finds both
    assert bird_boxes(ONE, "I see nothing") == Boxes(1, 0, 0)
    assert bird_boxes("no box", ONE) == Boxes(0, 0, 1)


def test_strict_boxes_are_paired_once():
    assert strict_boxes(ONE + ONE, ONE) == Boxes(2, 1, 1)
    assert strict_boxes(ONE, "<|box_start|>(100,100),(0,0)<|box_end|>") == Boxes(1, 1, 1)
    assert strict_boxes(ONE, "(0,0),(100,50)") == Boxes(1, 1, 1)


start, length = st.integers(0, 5), st.integers(1, 4)
boxes = st.lists(st.builds(lambda x, y, w, h: (x, y, x + w, y + h), start, start, length, length), max_size=4)


@given(boxes, boxes)
def test_strict_pairs_as_many_as_can_be(wanted, said):
    reference, response = ("".join(rename_marks(write_box(box), "bird") for box in some) for some in (wanted, said))
    best = 0
    short, long = sorted((wanted, said), key=len)
    for chosen in itertools.permutations(long, len(short)):
        best = max(best, sum(iou(a, b) >= 0.5 for a, b in zip(short, chosen, strict=True)))
    assert strict_boxes(reference, response) == Boxes(len(wanted), best, len(said))


def test_names():
    assert bird_named("Left Lung", "This is the left upper lung.")
    assert bird_named("lung", "no lungs at all")  # a quirk of the published script
    assert not bird_named("left kidney", "left lung")
    assert strict_named("Left Lung", "<ref>left lung</ref>.<|im_end|>")
    assert strict_named("left lung", "Left lung.")
    assert not strict_named("lung", "left lung")
    assert strict_named("Lesion", "Lesion<|im_end|>")
    assert strict_named("lung", "<ref>lung</ref> or <ref>heart</ref>")
    assert not strict_named("heart", "<ref>lung</ref> or <ref>heart</ref>")
    assert not strict_named("which is normal", "Liver\nwhich is normal")


def test_scores_over_boxes():
    found = grounding_scores([Boxes(2, 1, 1), Boxes(1, 1, 3), Boxes(0, 0, 5)])
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["precision"] == pytest.approx(2 / 4)
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["n"] == 2
    assert grounding_scores([Boxes(0, 0, 1)])["recall"] is None
    assert grounding_scores([Boxes(3, 2, 1)])["precision"] == 1.0, "one predicted box may match two references"
    assert mean_over({"ct": 0.2, "mr": 0.6, "pet": None}) == pytest.approx(0.4)
    assert mean_over({}) is None

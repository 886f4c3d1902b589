"""The format of a data set follows from its syntax and values, or is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bench.box_formats import measure, slake_boxes

from preceptor.data.grounding.box_detection import decide_format, mean_overlap, measure_format, require_decision
from preceptor.data.grounding.box_formats import BOX_FORMATS, write
from preceptor.errors import UserError

SIZE = (640, 480)


def decide(*texts: str, size=SIZE):
    return decide_format((text, f"record {i}", lambda: [size]) for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("texts", "format"),
    [
        (["<box>(1,2),(930,940)</box>"], "qwen2-vl"),
        (["(1,2),(630,440)"], "qwen2-vl"),
        (["<box>(0.1,0.2),(0.5,0.6)</box>"], "xyxy-unit"),
        (["<ref>a</ref><box>[[1, 2, 930, 940]]</box>"], "qwen2-vl"),
        (['{"box_2d": [1, 2, 930, 940]}'], "gemma"),
        (["<loc0001><loc0002><loc0930><loc0940> a"], "paligemma"),
        (["a<loc_1><loc_2><loc_930><loc_940>"], "florence"),
        (["[0.1, 0.2, 0.5, 0.6]", "[0, 0, 1, 1]"], "xyxy-unit"),
        (["[1, 2, 3, 4]", "[1, 2, 930, 940]"], "xyxy-thousandths"),
        (['{"bbox_2d": [1, 2, 930, 940]}'], "qwen3-vl"),
        (["no boxes", "grades [1, 2]"], None),
    ],
)
def test_syntax_and_values_decide(texts, format):
    decision = decide(*texts)
    assert (decision.format, decision.reason) == (format, "")


@pytest.mark.parametrize(
    ("texts", "size", "candidates", "reason"),
    [
        (["[1, 2, 300, 400]"], SIZE, ("xyxy-thousandths", "xyxy-pixels"), "values up to 400 fit"),
        (
            ['{"bbox_2d": [1, 2, 300, 400]}'],
            (500, 500),
            ("qwen3-vl", "xyxy-pixels", "qwen2.5-vl"),
            "values up to 400 fit",
        ),
        (['{"bbox_2d": [1, 2, 1300, 900]}'], (1500, 1000), ("xyxy-pixels", "qwen2.5-vl"), "values up to 1300 fit"),
        (["<box>(1,2),(1300,900)</box>"], (1500, 1000), ("xyxy-pixels", "qwen2-vl"), "values up to 1300 fit"),
        (["[0, 0, 1, 1]"], SIZE, ("xyxy-unit", "xyxy-thousandths"), "all numbers are 0 or 1"),
        (["[100, 200, 30, 40]"], SIZE, (), r"1 of 1 boxes have x1 < x0.*\[x, y, width, height\]"),
        (["[100, 200, 3000, 4000]"], SIZE, (), "outside the image in every format"),
        (['{"box_2d": [0.1, 0.2, 0.3, 0.4]}'], SIZE, (), "no format with box_2d"),
        (["<box>(1,2),(300,400)</box>", "<box>(0.1,0.2),(0.3,0.4)</box>"], SIZE, (), "1 of 2 boxes are from 0 to 1"),
        (["[0.1, 0.2, 0.3, 1.0]", "[1, 2, 930, 940]"], SIZE, (), "others are up to 940; write all boxes in one unit"),
        (["<box>(1,2),(3,4)</box>", "[1, 2, 930, 940]"], SIZE, ("qwen2-vl", "xyxy-thousandths"), "several formats"),
    ],
)
def test_what_is_not_clear_is_asked_for(texts, size, candidates, reason):
    decision = decide(*texts, size=size)
    assert decision.format is None
    assert decision.candidates == candidates
    with pytest.raises(UserError, match=f"file: the format of the boxes is not clear: .*{reason}.*data.box_format"):
        require_decision(decision, "file", "data.box_format")


def test_pixels_are_found_if_the_image_is_large():
    assert decide("[1, 2, 1300, 900]", size=(1500, 1000)).format == "xyxy-pixels"


def test_sizes_are_read_only_if_they_matter():
    def no_sizes():
        raise AssertionError

    assert decide_format([("<box>(1,2),(3,4)</box>", "x", no_sizes)]).format == "qwen2-vl"


def test_faulty_boxes_are_left_to_the_policy():
    assert decide("<box>left</box>").format == "qwen2-vl"
    assert decide("<box>(1,2),(3000,4)</box>").format == "qwen2-vl"


def test_a_measurement_by_hand():
    truth = [(100.0, 200.0, 300.0, 600.0)]
    found = measure_format(["[100, 200, 300, 600]", "nothing"], [truth, truth])
    assert (found.best, found.answers) == ("xyxy-thousandths", 2)
    assert found.mean_iou["xyxy-thousandths"] == 0.5, "an answer without a box counts 0"
    assert found.mean_iou["gemma"] == pytest.approx(0.5 * 100 * 100 / (2 * 200 * 400 - 100 * 100))
    assert "xyxy-pixels" not in found.mean_iou, "the sizes are not known"
    assert found.clear
    assert mean_overlap([], []) == 1
    assert mean_overlap(truth, truth * 2) == 0.5


def test_a_measurement_without_a_margin_is_not_clear():
    boxes = [(0.0, 0.0, 1000.0, 1000.0), (200.0, 200.0, 600.0, 600.0)]
    answers = [write([box], format="xyxy-pixels", size=(1000, 1000)) for box in boxes]
    found = measure_format(answers, [[box] for box in boxes], [(1000, 1000)] * 2)
    assert found.mean_iou["xyxy-pixels"] == found.mean_iou["gemma"] == found.mean_iou["xyxy-thousandths"] == 1
    different = measure_format(["[1, 2, 3, 4]"], [[(500.0, 500.0, 900.0, 900.0)]])
    assert not different.clear


@pytest.mark.real_data
@pytest.mark.parametrize("name", BOX_FORMATS)
def test_answers_about_slake_are_recognised_in_every_format(name):
    rows = slake_boxes(Path(os.environ["PRECEPTOR_DATA"]) / "slake")
    found = measure(rows, name)
    assert found.best == name
    assert found.mean_iou[name] > 0.95
    assert found.clear
    assert measure(rows, name, noise=20).best == name

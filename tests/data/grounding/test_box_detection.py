"""The format of a data set follows from its syntax and values, or is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bench.box_formats import measure, slake_boxes

from preceptor.data.grounding.box_detection import (
    decide_format,
    doubt_resized,
    mean_overlap,
    measure_format,
    measure_scale,
    require_decision,
)
from preceptor.data.grounding.box_formats import BOX_FORMATS, parse, smart_resize, write, written_boxes
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
        (
            ["[1, 2, 300, 400]"],
            SIZE,
            ("xyxy-thousandths", "xyxy-pixels", "xywh-thousandths", "xywh-pixels"),
            "values up to 400 fit",
        ),
        (
            ['{"bbox_2d": [1, 2, 300, 400]}'],
            (500, 500),
            ("qwen3-vl", "xyxy-pixels", "qwen2.5-vl"),
            "values up to 400 fit",
        ),
        (['{"bbox_2d": [1, 2, 1300, 900]}'], (1500, 1000), ("xyxy-pixels", "qwen2.5-vl"), "values up to 1300 fit"),
        (["<box>(1,2),(1300,900)</box>"], (1500, 1000), ("xyxy-pixels", "qwen2-vl"), "values up to 1300 fit"),
        (["[0, 0, 1, 1]"], SIZE, ("xyxy-unit", "xyxy-thousandths"), "all numbers are 0 or 1"),
        (
            ["[100, 200, 30, 40]"],
            SIZE,
            ("xywh-thousandths", "xywh-pixels", "cxcywh-thousandths", "cxcywh-pixels"),
            "1 of 1 boxes have x1 < x0.* all of them fit xywh-thousandths and",
        ),
        (["[0.6, 0.2, 0.3, 0.4]"], SIZE, ("xywh-unit", "cxcywh-unit"), "1 of 1 boxes have x1 < x0"),
        (["[300, 10, 490, 639]"], (500, 640), ("xyxy-thousandths", "xyxy-pixels", "xywh-thousandths"), "up to 639 fit"),
        (["[20, 900, 470, 1200]"], (1300, 500), ("yxyx-pixels",), "values up to 1200 fit yxyx-pixels"),
        (
            [f"[0.{i}, 0.{i}, 0.5, 0.5]" for i in range(1, 5)],
            SIZE,
            ("xyxy-unit", "xywh-unit"),
            "values up to 0.5 fit xyxy-unit and xywh-unit",
        ),
        (["[[1, 2], [300, 5], [20, 400]]"], SIZE, ("polygon-thousandths", "polygon-pixels"), "values up to 400 fit"),
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


CORNERS = [(10, 20, 110, 70), (400, 300, 640, 480), (0, 0, 60, 90), (500, 10, 620, 40), (300, 440, 330, 480)]
"""Boxes in an image of 640 x 480 pixels, some of which touch its sides."""


@pytest.mark.parametrize(
    ("write_one", "format"),
    [
        (lambda x, y, w, h: [x / 640, y / 480, w / 640, h / 480], "xywh-unit"),
        (lambda x, y, w, h: [(x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480], "cxcywh-unit"),
        (lambda x, y, w, h: [round(v, 2) for v in ((x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480)],
         "cxcywh-unit"),
        (lambda x, y, w, h: [2 * x, 2 * y, 2 * w, 2 * h], "xywh-pixels"),
    ],
)  # fmt: skip
def test_positions_with_sizes_are_found_if_the_values_prove_them(write_one, format):
    texts = [str(write_one(x0, y0, x1 - x0, y1 - y0)) for x0, y0, x1, y1 in CORNERS]
    texts = [f"liver {text}" for text in texts]
    size = (1280, 960) if "pixels" in format else SIZE
    assert decide(*texts, size=size).format == format
    for text, (x0, y0, x1, y1) in zip(texts, CORNERS, strict=True):
        (found,) = parse(text, format, size)
        expected = (x0 / 0.64, y0 / 0.48, x1 / 0.64, y1 / 0.48)
        assert found.box == pytest.approx(expected, abs=8 if "0." in text else 1e-6)


def test_named_numbers_and_lists_of_the_same_unit_are_one_format():
    lists = [str([x0 / 640, y0 / 480, (x1 - x0) / 640, (y1 - y0) / 480]) for x0, y0, x1, y1 in CORNERS]
    assert decide(*lists, '{"x": 0.1, "y": 0.2, "width": 0.3, "height": 0.4}').format == "xywh-unit"


def test_pixels_are_found_if_the_image_is_large():
    assert decide("[1, 2, 1300, 900]", size=(1500, 1000)).format == "xyxy-pixels"


LARGE, SMALL = (1600, 1400), (512, 512)


def pixels(count: int, size: tuple[int, int]) -> list[list[int]]:
    """Return different boxes in pixels that reach all sides of an image."""
    width, height = size
    steps = [(i / count, (i * 7 % count) / count) for i in range(count)]
    return [[round(x * width * 0.9), round(y * height * 0.9), round(width * (0.9 + x / 10)), height] for x, y in steps]


SYNTAXES = {
    "bbox_2d": (lambda box: json.dumps([{"bbox_2d": box}]), ("qwen3-vl", "xyxy-pixels")),
    "named": (
        lambda box: json.dumps(dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True))),
        ("xyxy-thousandths", "xyxy-pixels"),
    ),
    "polygon": (
        lambda box: str([box[:2], [box[2], box[1]], box[2:]]),
        ("polygon-thousandths", "polygon-pixels"),
    ),
}


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_one_pixel_outside_an_image_excludes_no_format(syntax):
    write_one, candidates = SYNTAXES[syntax]
    boxes = pixels(40, SMALL)
    boxes[5][2] = 513
    decision = decide(*map(write_one, boxes), size=SMALL)
    assert (decision.format, decision.candidates) == (None, candidates)


@pytest.mark.parametrize(
    ("syntax", "candidates"),
    [
        ("bbox_2d", ("qwen3-vl", "xyxy-pixels", "qwen2.5-vl")),
        ("named", ("xyxy-thousandths", "xyxy-pixels")),
    ],
)
def test_a_value_of_1001_does_not_exclude_thousandths(syntax, candidates):
    boxes = [[100, 200, 900, 800], [10, 300, 500, 1000], [5, 6, 700, 1001], [10, 10, 200, 300]]
    decision = decide(*map(SYNTAXES[syntax][0], boxes), size=LARGE)
    assert (decision.format, decision.candidates) == (None, candidates)


def test_a_fraction_a_little_above_1_is_a_fraction():
    for form in ("[{}, {}, {}, {}]", "({},{}),({},{})"):
        texts = [form.format(*box) for box in ([0.1, 0.2, 0.9, 0.8], [0.6, 0.3, 1.0003, 0.9])]
        assert decide(*texts).format == "xyxy-unit"
    assert decide("[0.1, 0.2, 0.9, 0.8]", "[0.3, 0.3, 1.5, 0.9]").format is None


@pytest.mark.parametrize("syntax", ["bbox_2d", "named", "polygon"])
def test_a_format_that_a_few_boxes_decide_is_a_doubt(syntax):
    write_one, (format, _) = SYNTAXES[syntax]
    boxes = pixels(40, SMALL)
    boxes[5][2] = 700
    decision = decide(*map(write_one, boxes), size=SMALL)
    assert decision.format == format
    assert decision.doubt == "39 of 40 boxes are inside the images in pixels, too"
    for box in boxes[:10]:
        box[2] = 700
    assert decide(*map(write_one, boxes), size=SMALL).doubt == ""
    thousandths = [[x0, y0, min(x1, 1000), min(y1, 1000)] for x0, y0, x1, y1 in pixels(40, (1000, 1000))]
    thousandths[5][2] = 1300
    decision = decide(*map(write_one, thousandths), size=LARGE)
    assert "39 of 40 boxes are inside the images in thousandths, too" in decision.doubt or decision.format is None


def test_corners_in_pixels_are_a_doubt_with_one_outlier_or_one_large_image():
    texts = ["<box>({},{}),({},{})</box>".format(*box) for box in pixels(40, SMALL)]
    assert decide(*texts, size=SMALL).doubt == "all 40 boxes are inside the images in pixels, too"
    outlier = decide(*texts[:-1], "<box>(1,2),(900,600)</box>", size=SMALL)
    assert (outlier.format, outlier.doubt) == ("qwen2-vl", "39 of 40 boxes are inside the images in pixels, too")
    sizes = [SMALL] * 39 + [LARGE]
    mixed = decide_format((text, "x", lambda size=size: [size]) for text, size in zip(texts, sizes, strict=True))
    assert mixed.doubt.startswith("all 39 boxes in images with a side below 1,000 pixels are inside")
    thousandths = ["<box>({},{}),({},{})</box>".format(*box) for box in pixels(40, (1000, 1000))]
    assert decide(*thousandths, size=SMALL).doubt == ""
    assert decide(*thousandths, size=LARGE).doubt == "", "large images do not tell the units apart"
    assert decide(*thousandths[:-1], "(1,2),(3000,4)", size=LARGE).format == "qwen2-vl", "one faulty box"


def test_a_dialogue_without_an_image_excludes_no_format():
    texts = [json.dumps({"bbox_2d": box}) for box in pixels(12, SMALL)]
    sizes = [[SMALL]] * 11 + [[]]
    decision = decide_format((text, "x", lambda known=known: known) for text, known in zip(texts, sizes, strict=True))
    assert decision.candidates == ("qwen3-vl", "xyxy-pixels")


def test_pixels_of_images_that_were_shrunk_before_are_a_doubt():
    small = smart_resize(LARGE, max_pixels=1_003_520)
    assert small == (1064, 924)

    def boxes(size: tuple[int, int]):
        texts = [json.dumps({"bbox_2d": box}) for box in pixels(6, size)]
        return [(written_boxes(text)[0], "x", lambda: [LARGE]) for text in texts]

    assert doubt_resized(boxes(small)).startswith(
        "all 6 boxes of images with more than 1,000,000 pixels end before 70%"
    )
    assert doubt_resized(boxes(small), max_pixels=1_003_520) == ""
    assert doubt_resized(boxes(smart_resize(LARGE))) == ""


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


def test_the_scale_of_boxes_by_hand():
    truths = [[(100.0, 200.0, 300.0, 600.0)], [(500.0, 100.0, 900.0, 400.0)]] * 2
    sizes = [(400, 200)] * 4
    # Pixels of images of 100 x 50: x 10, 30 and 50, 90; y 10, 30 and 5, 20. A factor of 1/4 to the stored pixels.
    answers = ["[10, 10, 30, 30]", "[50, 5, 90, 20]"] * 2
    scale = measure_scale(answers, truths, sizes)
    assert scale is not None
    assert scale.mean_iou == pytest.approx(1)
    assert (scale.factor, scale.unit) in [(pytest.approx(0.1), "thousandths of the longer side"), (0.25, "pixels")]
    assert measure_scale(answers[:3], truths[:3], sizes[:3]) is None, "too few"
    assert measure_scale(["nothing"] * 4, truths, sizes) is None


def test_the_scale_of_images_that_were_shrunk_to_one_area():
    box = (100.0, 200.0, 900.0, 600.0)
    sizes = [(2000, 2000), (4000, 1000), (1000, 4000), (2000, 8000)]
    # Images of 250,000 pixels: 500 x 500, 1000 x 250, 250 x 1000, 250 x 1000.
    shrunk = [(500, 500), (1000, 250), (250, 1000), (250, 1000)]
    answers = [str([v * side / 1000 for v, side in zip(box, (w, h, w, h), strict=True)]) for w, h in shrunk]
    scale = measure_scale(answers, [[box]] * 4, sizes)
    assert scale is not None
    assert (scale.unit, scale.factor) == ("pixels of images of one megapixel", pytest.approx(0.5))
    assert scale.mean_iou == pytest.approx(1)


@pytest.mark.real_data
@pytest.mark.parametrize("name", BOX_FORMATS)
def test_answers_about_slake_are_recognised_in_every_format(name):
    rows = slake_boxes(Path(os.environ["PRECEPTOR_DATA"]) / "slake")[::20]
    found = measure(rows, name)
    assert found.best == name
    assert found.mean_iou[name] > 0.95
    assert found.clear
    assert measure(rows, name, noise=20).best == name


@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name in BOX_FORMATS if name.endswith("-unit") and name != "yxyx-unit"])
def test_the_boxes_of_slake_prove_their_layout(name):
    rows = slake_boxes(Path(os.environ["PRECEPTOR_DATA"]) / "slake")[::5]
    texts = [(write([box], label, name, size), "record", lambda: None) for label, box, size in rows]
    assert decide_format(texts).format == name

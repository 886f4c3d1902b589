"""Texts of public documentation are read as documented, and every format reads what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import (
    BOX_FORMATS,
    CANONICAL,
    TextBox,
    convert,
    edit_marked,
    find_boxes,
    find_references,
    from_canonical,
    is_native,
    parse,
    rename_marks,
    smart_resize,
    to_canonical,
    without_boxes,
    write,
    write_box,
)
from preceptor.data.grounding.boxes import iou
from preceptor.errors import UserError

SIZE = (1932, 1092)

GOLDEN = {
    # README of QwenLM/Qwen-VL, second turn of the demo
    "qwen-vl": ("bird", "<ref>击掌</ref><box>(536,509),(588,602)</box>", [("击掌", (536, 509, 588, 602))]),
    # Wang et al. 2024, Qwen2-VL, section 2.2: coordinates in [0, 1000)
    "qwen2-vl": (
        "qwen2-vl",
        "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>",
        [("the eyes on a giraffe", (176, 106, 232, 160))],
    ),
    # QwenLM/Qwen3-VL, qwen-vl-finetune, grounding data; pixels of the resized image (issues 676 and 769)
    "qwen2.5-vl": (
        "qwen2.5-vl",
        '{"bbox_2d": [135, 114, 1016, 672], "label": "house"}',
        [("house", (135 / 1.932, 114 / 1.092, 1016 / 1.932, 672 / 1.092))],
    ),
    # the same page: Qwen3-VL has relative coordinates from 0 to 1000
    "qwen3-vl": (
        "qwen3-vl",
        '```json\n[\n\t{"bbox_2d": [125, 250, 500, 750], "label": "person"}\n]\n```',
        [("person", (125, 250, 500, 750))],
    ),
    # ai.google.dev, image understanding: box_2d is [ymin, xmin, ymax, xmax], normalized to 0-1000
    "gemini": (
        "gemma",
        '[{"box_2d": [6, 246, 386, 526], "label": "Apple logo"}, {"box_2d": [234, 649, 650, 863], "label": "button"}]',
        [("Apple logo", (246, 6, 526, 386)), ("button", (649, 234, 863, 650))],
    ),
    # google-research/big_vision, demo of PaliGemma: ymin, xmin, ymax, xmax in 1024 bins
    "paligemma": (
        "paligemma",
        "<loc0000><loc0000><loc0930><loc1012> <seg114><seg074> wall ; <loc0722><loc0047><loc0895><loc0378> dog",
        [
            ("wall", (0, 0, 1012 / 1.024, 930 / 1.024)),
            ("dog", (47 / 1.024, 722 / 1.024, 378 / 1.024, 895 / 1.024)),
        ],
    ),
    # modelscope/ms-swift, test_paligemma: "detect cat"
    "paligemma, one": (
        "paligemma",
        "<loc0000><loc0000><loc1022><loc1022> cat",
        [("cat", (0, 0, 1022 / 1.024, 1022 / 1.024))],
    ),
    # internvl.readthedocs.io, chat data format, grounding: normalized to 0-1000
    "internvl": (
        "internvl",
        "<ref>Quick & Easy</ref><box>[[125, 261, 199, 312]]</box>",
        [("Quick & Easy", (125, 261, 199, 312))],
    ),
    # deepseek-ai/DeepSeek-VL2: 0-999 in marks of its own
    "deepseek-vl2": (
        "xyxy-thousandths",
        "<|ref|>The giraffe at the back.<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>",
        [("The giraffe at the back.", (580, 270, 999, 900))],
    ),
    # THUDM/CogVLM
    "cogvlm": ("xyxy-thousandths", "the area [[222,304,292,362]].", [("", (222, 304, 292, 362))]),
    # LLaVA: fractions of width and height
    "llava": ("xyxy-unit", "It is at [0.12, 0.34, 0.56, 0.78].", [("", (120, 340, 560, 780))]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_documented_texts_are_read(name):
    format, text, boxes = GOLDEN[name]
    found = parse(text, format, SIZE)
    assert [box.label for box in found] == [label for label, _ in boxes]
    assert [box.box for box in found] == [pytest.approx(box) for _, box in boxes]


def test_the_order_of_box_2d_is_y_first_and_that_of_bbox_2d_is_not():
    assert parse('{"box_2d": [10, 200, 30, 400]}', "gemma")[0].box == (200, 10, 400, 30)
    assert parse('{"bbox_2d": [10, 200, 30, 400]}', "qwen3-vl")[0].box == (10, 200, 30, 400)
    assert parse('{"bbox_2d": [10, 200, 30, 400]}', "gemma")[0].box is None, "of another family"
    assert parse('{"box_2d": [10, 200, 30, 400]}', "qwen3-vl")[0].box is None
    assert parse("[10, 200, 30, 400]", "gemma")[0].box == (200, 10, 400, 30)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1920, 1080), (1932, 1092)),  # hiyouga/LlamaFactory issue 7690
        ((368, 434), (364, 448)),  # QwenLM/Qwen3-VL issue 1035
    ],
)
def test_resized_sizes_of_public_reports(size, resized):
    assert smart_resize(size) == resized
    assert BOX_FORMATS["qwen2.5-vl"].size_seen(size) == resized
    assert BOX_FORMATS["qwen3-vl"].size_seen(size) == size


@given(st.integers(30, 3000), st.integers(30, 3000), st.sampled_from([28 * 28 * 4, 448 * 448, 16384 * 28 * 28]))
def test_resizing_is_that_of_transformers(width, height, most):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rows, columns = theirs(height, width, 28, 3136, most)
    assert smart_resize((width, height), max_pixels=most) == (columns, rows)


coordinate = st.integers(0, 1000)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).filter(lambda b: b[0] < b[2] and b[1] < b[3])


@given(box, st.integers(1, 4000), st.integers(1, 4000))
def test_location_tokens_are_those_of_florence_2(box, width, height):
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

    processor = Florence2PostProcessor.__new__(Florence2PostProcessor)
    processor.quantize_bins = (1000, 1000)
    a, b, c, d = (value + 0.25 for value in box)
    pixels = torch.tensor([[a * width, b * height, c * width, d * height]], dtype=torch.float64) / 1000
    bins = processor.quantize(pixels, (width, height))[0].tolist()
    assert write([(a, b, c, d)], format="florence") == "".join(f"<loc_{value}>" for value in bins)


@given(st.lists(box, min_size=1, max_size=4), st.sampled_from(sorted(BOX_FORMATS)), st.integers(28, 4000), st.data())
def test_every_format_reads_what_it_writes(boxes, name, width, data):
    size = BOX_FORMATS[name].size_seen((width, data.draw(st.integers(28, 4000))))
    text = write(boxes, "left kidney", name, size)
    found = parse(text, name, size)
    step = {"1024 bins": 1, "1000 bins": 1, "pixels": 1000 / min(size), "resized pixels": 1000 / min(size)}
    tolerance = step.get(BOX_FORMATS[name].unit, 0) + 1e-6
    assert [f.box for f in found] == [pytest.approx(b, abs=tolerance) for b in boxes]
    assert is_native(text, name)
    stored = to_canonical(f"Found: {text}!", name, size)
    assert stored.startswith("Found: ")
    assert len(find_boxes(stored)) == len(boxes)
    assert convert(stored, CANONICAL, CANONICAL) == stored


@given(
    st.lists(box, min_size=1, max_size=3), st.sampled_from(sorted(BOX_FORMATS)), st.sampled_from(sorted(BOX_FORMATS))
)
def test_a_translated_box_is_the_same_box(boxes, first, second):
    size = (1120, 840)
    text = convert(write(boxes, "liver", first, size), first, second, size)
    assert all(
        iou(f.box, b) > 0.8 or min(b[2] - b[0], b[3] - b[1]) < 20
        for f, b in zip(parse(text, second, size), boxes, strict=True)
    )
    assert is_native(text, second)


@given(st.lists(box, max_size=3))
def test_a_small_box_never_vanishes(boxes):
    for name in BOX_FORMATS:
        for found in parse(write(boxes, format=name, size=(4000, 4000)), name, (4000, 4000)):
            assert found.box is not None
    tiny = to_canonical("[100, 100, 101, 101]", "xyxy-pixels", (4000, 4000))
    assert tiny == write_box((25, 25, 26, 26))


UNREADABLE = [
    '[{"bbox_2d": [12, 34, 56, 78], "label": "liver"}, {"bbox_2d": [12, 3',
    '{"bbox_2d": [12, 34, 56]}',
    '{"bbox_2d": "somewhere"}',
    '{"point_2d": [12, 34], "label": "x"}',
    "at [12, 34, 5",
    "<box>left lung</box>",
    "<|box_start|>(12,34),(5",
    "<loc0001><loc0002><loc0003> liver",
    "<loc_1><loc_2><loc_3>",
    "<object><patch_index_0044><patch_index_0863></object>",
    '{"box_2d": [1, 2, 3, 4]}',
    "{<25><30><60><70>} liver",
    '{"x1": 1, "y1": 2, "x2": 3, "y2": 4, "x3": 5}',
    '{"x1": 1, "y1": 2, "x2": 3, "y2": 4, "x3": 5, "y3": 6, "x4": 7',
    '{"bbox": "1, 2, 3, 4, 5, 6, 7, 8"}',
    "[1e999, 1, 2, 3]",
    '{"x1": 1, "y1": 2, "x2": 1e999, "y2": 4}',
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_counted(text):
    assert parse(text, "qwen2-vl")[-1].box is None
    stored = to_canonical(text, "qwen2-vl")
    assert find_boxes(stored)[-1].box is None
    seen = []
    edit_marked(stored, lambda inner, box: seen.append(box))
    assert None in seen, "the policy for faulty boxes sees it, too"


MESSY = {
    'Sure! ```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"},]\n``` Done.': [("a", (1, 2, 3, 4))],
    "[[1.5, 2, 3, 4], [5, 6, 7, 8]] and (1,2),(3,4)": [("", (1.5, 2, 3, 4)), ("", (5, 6, 7, 8)), ("", (1, 2, 3, 4))],
    "[[1, 2], [3, 4]]": [("", (1, 2, 3, 4))],
    "<box>12 34 56 78</box>": [("", (12, 34, 56, 78))],
    "<box>[[1,2,3,4],[5,6,7,8]]</box>": [("", (1, 2, 3, 4)), ("", (5, 6, 7, 8))],
    '{"objects": [{"bbox_2d": [1, 2, 3, 4], "label": "a {b} \\"c\\""}]}': [('a {b} "c"', (1, 2, 3, 4))],
    "{'bbox': [1, 2, 3, 4], 'label': 'a'}": [("a", (1, 2, 3, 4))],
    '{"x1": 1, "y1": 2, "x2": 3, "y2": 4}': [("", (1, 2, 3, 4))],
    '{"label": "a", "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}': [("a", (1, 2, 3, 4))],
    "at (1, 2, 3, 4).": [("", (1, 2, 3, 4))],
    "bbox_2d: [1, 2, 3, 4]": [("", (1, 2, 3, 4))],
    '{"bbox_2d": [1, 2, 3, 4], "lab': [("", (1, 2, 3, 4))],
    "<ref>a</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>": [("a", (1, 2, 3, 4)), ("a", (5, 6, 7, 8))],
    "see [1, 2, 3] and [4, 5], 12 (1,2) [1, 2, 3, 4, 5]": [],
    "no boxes at all": [],
}


@pytest.mark.parametrize("text", MESSY)
def test_messy_answers(text):
    assert [(f.label, f.box) for f in parse(text, "qwen3-vl")] == MESSY[text]


def test_prose_around_boxes_stays():
    text = 'Here: [{"bbox_2d": [1, 2, 3, 4], "label": "a"}], and more.'
    assert to_canonical(text, "qwen3-vl") == f"Here: {write([(1, 2, 3, 4)], 'a')}, and more."
    fenced = '```json\n{"objects": [{"bbox_2d": [1, 2, 3, 4]}]}\n```'
    assert to_canonical(fenced, "qwen3-vl") == write_box((1, 2, 3, 4))
    assert from_canonical(f"Is {write_box((1, 2, 3, 4))} it?", "gemma") == 'Is [{"box_2d": [2, 1, 4, 3]}] it?'


def test_a_stored_text_reads_no_lists():
    assert find_boxes("[1, 2, 3, 4]") == []
    for name in BOX_FORMATS:
        assert from_canonical("grades [1, 2, 3, 4]", name, (100, 100)) == "grades [1, 2, 3, 4]"


@given(st.lists(box, max_size=3), st.booleans())
def test_stored_texts_do_not_change_for_qwen2_vl(boxes, marked):
    text = " and ".join(write_box(b) if marked else "({},{}),({},{})".format(*b) for b in boxes)
    assert from_canonical(text, CANONICAL) == to_canonical(text, CANONICAL) == text


def test_references_without_boxes():
    text = "Where is <|object_ref_start|>the liver<|object_ref_end|>?"
    assert from_canonical(text, "qwen2.5-vl", (28, 28)) == "Where is the liver?"
    assert from_canonical(text, "internvl") == "Where is <ref>the liver</ref>?"
    assert find_references(rename_marks(text, "bird")) == ["the liver"]
    assert without_boxes(f"{text} {write_box((1, 2, 3, 4))}") == "Where is the liver?"


def test_forms_of_the_canonical_format():
    assert find_boxes("at (1,2),(3,4) and ( 5.5 , 6 ) , (7,8)") == [
        TextBox("(1,2),(3,4)", (1, 2, 3, 4)),
        TextBox("( 5.5 , 6 ) , (7,8)", (5.5, 6, 7, 8)),
    ]
    assert find_boxes("at (1,2),(3,4)", bare=False) == []
    assert find_boxes("<box>somewhere</box>") == [TextBox("somewhere", None)]
    assert find_boxes("no box (1,2)") == []
    assert write_box((0.4, 1.6, 10, 20)) == "<|box_start|>(0,2),(10,20)<|box_end|>"


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"'qwen25-vl' is not known; did you mean 'qwen2.5-vl'"):
        parse("", "qwen25-vl")
    with pytest.raises(UserError, match=r"xyxy-pixels are in pixels, and the size of the image is not known"):
        parse("[1, 2, 3, 4]", "xyxy-pixels")


@given(st.text(alphabet='[]{}()<>|"\\,: 0123456789.bbox_2dlocref/\n`', max_size=200))
def test_any_text_is_read(text):
    for name in BOX_FORMATS:
        parse(text, name, (100, 100))
        convert(text, name, CANONICAL, (100, 100))


def test_long_texts_are_read_in_time():
    for text in ("[" * 50_000, "{" * 50_000, '{"a' * 20_000, "<box>" * 10_000, "(1,2)," * 20_000, "[1, " * 20_000):
        parse(text, "qwen3-vl")
    rows = [{"bbox_2d": [1, 2, 3, 4], "label": "a"}] * 1_000
    assert len(parse(json.dumps(rows), "qwen3-vl")) == 1_000

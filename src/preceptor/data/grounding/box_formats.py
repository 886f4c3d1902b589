"""Boxes in texts, in the language of each model family: find them, read them, write them, and translate them.

Model families differ in how they write a box, in the unit of its numbers and in their order. All of Preceptor computes
with boxes (x0, y0, x1, y1) in thousandths of the width and height of the image, and stores texts in the language of
Qwen2-VL (`CANONICAL`). Texts are translated where they enter and leave: by the readers of data sets, before a model
reads them, and after a model has answered.

Sources: Qwen-VL and Qwen2-VL (model cards; Wang et al. 2024, section 2.2), Qwen2.5-VL and Qwen3-VL (cookbook 2d
grounding; QwenLM/Qwen3-VL issues 676, 721 and 1486), Gemini and Gemma (ai.google.dev, image understanding), PaliGemma
(model card; big_vision), InternVL (model card), Florence-2 (Xiao et al. 2024, section 3.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from preceptor.data.grounding.box_syntax import (
    BIRD_MARKS,
    CORNERS,
    MARKED,
    MARKED_OR_UNCLOSED,
    MARKS,
    QWEN2_MARKS,
    REFERENCE,
    Passage,
    Syntax,
    as_corners,
    ascii_numbers,
    find_passages,
    read_marked,
)
from preceptor.data.grounding.boxes import SIDE, Box
from preceptor.errors import UserError, nearest

Size = tuple[int, int]
"""Width and height in pixels."""
Unit = Literal["thousandths", "unit", "percent", "pixels", "resized pixels", "1024 bins", "1000 bins"]

CANONICAL = "qwen2-vl"
"""The format in which texts are stored. All its boxes are in thousandths."""
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 16384 * 28 * 28
"""Limits in the published preprocessor_config.json of Qwen2.5-VL (3,136 and 12,845,056 pixels)."""


@dataclass(frozen=True)
class TextBox:
    """A box in a text.

    Attributes:
        text: the box as it is written, without marks.
        box: the box in thousandths, or None if the text cannot be read as a box.
        label: the name that is written with the box, or an empty text.
    """

    text: str
    box: Box | None
    label: str = ""


@dataclass(frozen=True)
class BoxFormat:
    """The language of a model family.

    Attributes:
        name: name of the format.
        unit: unit of the numbers.
        layout: meaning of the four numbers, as in `as_corners`.
        syntax: the syntax that `write` uses.
        reads: all syntaxes that are read in this unit and order. Other boxes are unreadable.
        marks: for the syntaxes that have marks: before and after a name, before and after a box.
    """

    name: str
    unit: Unit
    syntax: Syntax
    reads: frozenset[Syntax]
    layout: Literal["xyxy", "yxyx", "xywh", "cxcywh"] = "xyxy"
    marks: tuple[str, str, str, str] | None = None

    def size_seen(self, size: Size, *, max_pixels: int | None = None) -> Size:
        """Return the size that the numbers of a box refer to, for an image of `size` (upright, as stored).

        It differs from `size` for models that count the pixels of the resized image (see `smart_resize`), whose number
        of pixels is limited by `max_pixels`; None for the published limit.
        """
        if self.unit != "resized pixels":
            return size
        return smart_resize(size, max_pixels=max_pixels or MAX_PIXELS)


_X_FIRST: frozenset[Syntax] = frozenset({"corners", "list", "bbox_2d", "named"})
_BY_LAYOUT: frozenset[Syntax] = frozenset({"list", "bbox_2d", "named"})
_UNITS: tuple[Unit, ...] = ("thousandths", "unit", "percent", "pixels")

BOX_FORMATS: dict[str, BoxFormat] = {
    format.name: format
    for format in (
        BoxFormat("qwen2-vl", "thousandths", "corners", _X_FIRST, marks=QWEN2_MARKS),
        BoxFormat("bird", "thousandths", "corners", _X_FIRST, marks=BIRD_MARKS),
        BoxFormat("qwen2.5-vl", "resized pixels", "bbox_2d", _X_FIRST),
        BoxFormat("qwen3-vl", "thousandths", "bbox_2d", _X_FIRST),
        BoxFormat("internvl", "thousandths", "list", _X_FIRST, marks=BIRD_MARKS),
        BoxFormat("gemma", "thousandths", "box_2d", frozenset({"box_2d", "list", "named"}), "yxyx"),
        BoxFormat("paligemma", "1024 bins", "loc1024", frozenset({"loc1024"}), "yxyx"),
        BoxFormat("florence", "1000 bins", "loc1000", frozenset({"loc1000"})),
        *(BoxFormat(f"xyxy-{unit}", unit, "list", _X_FIRST) for unit in _UNITS),
        *(BoxFormat(f"yxyx-{unit}", unit, "list", _BY_LAYOUT, "yxyx") for unit in _UNITS[1:]),
        *(BoxFormat(f"xywh-{unit}", unit, "list", _BY_LAYOUT, "xywh") for unit in _UNITS),
        *(BoxFormat(f"cxcywh-{unit}", unit, "list", _BY_LAYOUT, "cxcywh") for unit in _UNITS),
        *(BoxFormat(f"polygon-{unit}", unit, "polygon", frozenset({"polygon", "named"})) for unit in _UNITS),
    )
}
"""bird: Qwen-VL and Med-GRIT-270k. gemma: Gemma and Gemini. xyxy-unit: LLaVA and Shikra. yxyx-unit: TensorFlow.
xywh-pixels: COCO. cxcywh-unit: YOLO. polygon: points, of which the bounding box is read."""

FAMILY_FORMATS = {
    "qwen2_vl": "qwen2-vl",
    "qwen2_vl_dinov2": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
}
"""Format by `model_type` of a checkpoint's configuration."""


def require_format(name: str) -> BoxFormat:
    """Return a format. Raises UserError if the name is not known."""
    if name not in BOX_FORMATS:
        raise UserError(f"box format {name!r} is not known{nearest(name, BOX_FORMATS)}")
    return BOX_FORMATS[name]


def smart_resize(size: Size, *, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Size:
    """Return the size to which the image processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL resize an image.

    Both sides become multiples of `factor` (patch size times merge size), within the limits of the number of pixels,
    and the aspect ratio changes as little as possible (smart_resize of qwen-vl-utils).
    """
    width, height = size
    new_height, new_width = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_width, new_height


# --- Units ----------------------------------------------------------------------------------------------------------


def _need(size: Size | None, format: BoxFormat) -> Size:
    if size is None:
        raise UserError(f"boxes of the format {format.name} are in pixels, and the size of the image is not known")
    return size


def _to_box(numbers: Sequence[float], syntax: Syntax, format: BoxFormat, size: Size | None) -> Box:
    """Return numbers of a format as a box in thousandths."""
    named = syntax in ("named", "polygon")
    a, b, c, d = as_corners(numbers, "xyxy" if named else format.layout)
    match format.unit:
        case "thousandths":
            box = (a, b, c, d)
        case "unit":
            box = (a * SIDE, b * SIDE, c * SIDE, d * SIDE)
        case "percent":
            box = (a * SIDE / 100, b * SIDE / 100, c * SIDE / 100, d * SIDE / 100)
        case "1024 bins":
            box = (a * SIDE / 1024, b * SIDE / 1024, c * SIDE / 1024, d * SIDE / 1024)
        case "1000 bins":
            box = (a + 0.5, b + 0.5, c + 0.5, d + 0.5)  # centre of the bin
        case _:
            width, height = _need(size, format)
            box = (a * SIDE / width, b * SIDE / height, c * SIDE / width, d * SIDE / height)
    return _clip_rounding(box) if format.layout in ("xywh", "cxcywh") or syntax == "named" else box


def _clip_rounding(box: Box) -> Box:
    """Move corners back that leave the image by at most one thousandth: sums of rounded numbers may."""
    x0, y0, x1, y1 = (min(max(value, 0.0), float(SIDE)) if -1 <= value <= SIDE + 1 else value for value in box)
    return x0, y0, x1, y1


def _to_numbers(box: Sequence[float], format: BoxFormat, size: Size | None) -> tuple[float, float, float, float]:
    """Return a box in thousandths as numbers of a format."""
    x0, y0, x1, y1 = box
    numbers: tuple[float, ...]
    match format.unit:
        case "thousandths":
            numbers = _round_box((x0, y0, x1, y1))
        case "unit":
            numbers = tuple(value / SIDE for value in _round_box((x0, y0, x1, y1)))
        case "percent":
            numbers = tuple(value * 100 / SIDE for value in _round_box((x0, y0, x1, y1)))
        case "1024 bins":
            numbers = tuple(min(1023, max(0, round(value * 1024 / SIDE))) for value in (x0, y0, x1, y1))
        case "1000 bins":
            numbers = tuple(min(999, max(0, math.floor(value))) for value in (x0, y0, x1, y1))
        case _:
            width, height = _need(size, format)
            numbers = _round_box((x0 * width / SIDE, y0 * height / SIDE, x1 * width / SIDE, y1 * height / SIDE))
    a, b, c, d = numbers
    match format.layout:
        case "yxyx":
            return (b, a, d, c)
        case "xywh":
            return (a, b, c - a, d - b)
        case "cxcywh":
            return ((a + c) / 2, (b + d) / 2, c - a, d - b)
    return (a, b, c, d)


def _round_box(box: Box) -> tuple[int, int, int, int]:
    """Round corners to integers. A side that rounding would make 0 becomes 1, so that no box vanishes."""
    (x0, x1), (y0, y1) = (_round_side(box[i], box[i + 2]) for i in (0, 1))
    return (x0, y0, x1, y1)


def _round_side(low: float, high: float) -> tuple[int, int]:
    first, last = round(low), round(high)
    return (math.floor(low), math.floor(low) + 1) if first == last and low < high else (first, last)


# --- Reading, writing, translating ----------------------------------------------------------------------------------


def parse(text: str, format: str, size: Size | None = None) -> list[TextBox]:
    """Return the boxes of a text in order.

    The unit and the order of the numbers are those of `format`, in whatever syntax the box is written: a model of a
    family whose boxes are in thousandths writes thousandths in JSON, too. Boxes that are cut off, or in a syntax of a
    family with another order, are returned with `box` None, so that they are counted.

    Args:
        text: the text, with prose, code fences, several boxes.
        format: name of the format of the writer.
        size: width and height that pixels refer to (`BoxFormat.size_seen`); needed for the formats in pixels only.

    Raises:
        UserError: the format is not known, or needs a size.
    """
    speaker = require_format(format)
    return [box for passage in find_passages(text) for box in _boxes(passage, speaker, size)]


def _boxes(passage: Passage, format: BoxFormat, size: Size | None) -> list[TextBox]:
    readable = passage.syntax in format.reads
    boxes = []
    for item in passage.items:
        box = _to_box(item.numbers, passage.syntax, format, size) if readable and item.numbers is not None else None
        finite = box is not None and all(map(math.isfinite, box))  # not 1e999
        boxes.append(TextBox(item.text, box if finite else None, item.label))
    return boxes


@dataclass(frozen=True)
class WrittenBox:
    """The numbers of a box as they are written, None if they are incomplete, and their syntax."""

    syntax: Syntax
    numbers: tuple[float, ...] | None
    marked: bool


def written_boxes(text: str) -> list[WrittenBox]:
    """Return the boxes of a text in all syntaxes, without an interpretation of their numbers."""
    return [WrittenBox(p.syntax, item.numbers, p.marked) for p in find_passages(text) for item in p.items]


def is_native(text: str, format: str) -> bool:
    """Return whether all boxes of a text are written exactly as `format` writes them, with its marks."""
    speaker = require_format(format)
    return all(_is_native(text, p, speaker) and p.marked == (speaker.marks is not None) for p in find_passages(text))


def write(
    boxes: Sequence[Sequence[float]],
    labels: str | Sequence[str] = "",
    format: str = CANONICAL,
    size: Size | None = None,
) -> str:
    """Return boxes as a text.

    Args:
        boxes: boxes in thousandths.
        labels: one name for all boxes or one for each; an empty text for none.
        format: name of the format.
        size: as for `parse`.
    """
    speaker = require_format(format)
    names = [labels] * len(boxes) if isinstance(labels, str) else list(labels)
    numbers = [_to_numbers(box, speaker, size) for box in boxes]
    return _WRITERS[speaker.syntax](numbers, names, speaker)


Numbers = Sequence[tuple[float, ...]]


def _runs(numbers: Numbers, labels: Sequence[str]) -> Iterator[tuple[str, list[tuple[float, ...]]]]:
    run: list[tuple[float, ...]] = []
    for i, box in enumerate(numbers):
        run.append(box)
        if i + 1 == len(numbers) or labels[i + 1] != labels[i]:
            yield labels[i], run
            run = []


def _write_marked(numbers: Numbers, labels: Sequence[str], format: BoxFormat) -> str:
    assert format.marks is not None
    before, after, begin, end = format.marks
    texts = []
    for label, run in _runs(numbers, labels):
        texts.append(f"{before}{label}{after}" if label else "")
        if format.syntax == "list":
            texts.append(begin + json.dumps([list(box) for box in run]) + end)
        else:
            texts += [f"{begin}({a},{b}),({c},{d}){end}" for a, b, c, d in run]
    return "".join(texts)


def _write_json(numbers: Numbers, labels: Sequence[str], format: BoxFormat) -> str:
    rows = [
        {format.syntax: list(box)} | ({"label": label} if label else {})
        for box, label in zip(numbers, labels, strict=True)
    ]
    return json.dumps(rows, ensure_ascii=False)


def _write_lists(numbers: Numbers, labels: Sequence[str], format: BoxFormat) -> str:
    if format.marks is not None:
        return _write_marked(numbers, labels, format)
    texts = []
    for label, run in _runs(numbers, labels):
        boxes = ", ".join("[" + ", ".join(f"{value:g}" for value in box) + "]" for box in run)
        texts.append(f"{label} {boxes}" if label else boxes)
    return ", ".join(texts)


def _write_polygons(numbers: Numbers, labels: Sequence[str], format: BoxFormat) -> str:
    points = [((a, b), (c, b), (c, d), (a, d)) for a, b, c, d in numbers]
    texts = ["[" + ", ".join(f"[{x:g}, {y:g}]" for x, y in polygon) + "]" for polygon in points]
    return ", ".join(f"{label} {text}" if label else text for label, text in zip(labels, texts, strict=True))


def _write_tokens(numbers: Numbers, labels: Sequence[str], format: BoxFormat) -> str:
    if format.syntax == "loc1024":  # every box has a name of its own
        boxes = ["".join(f"<loc{int(value):04}>" for value in box) for box in numbers]
        return " ; ".join(f"{box} {label}".rstrip() for box, label in zip(boxes, labels, strict=True))
    return "".join(
        label + "".join(f"<loc_{int(value)}>" for box in run for value in box) for label, run in _runs(numbers, labels)
    )


_WRITERS: Mapping[str, Callable[[Numbers, Sequence[str], BoxFormat], str]] = {
    "corners": _write_marked,
    "list": _write_lists,
    "polygon": _write_polygons,
    "bbox_2d": _write_json,
    "box_2d": _write_json,
    "loc1024": _write_tokens,
    "loc1000": _write_tokens,
}


def convert(text: str, source: str, target: str, size: Size | None = None, *, target_size: Size | None = None) -> str:
    """Translate the boxes of a text from one format into another. The rest of the text stays as it is.

    A box that cannot be read is kept as it is written; if the target is `CANONICAL` or another format with marks, it is
    marked, so that `find_boxes` returns and counts it, with a question mark before numbers in a syntax that the source
    does not have: nothing reads them as thousandths. Text without boxes, and boxes that are already in the target
    format, are not changed.

    Args:
        text: the text.
        source: format of the text.
        target: format of the result.
        size: width and height that pixels of the source refer to.
        target_size: width and height that pixels of the target refer to. Default: `size`.

    Raises:
        UserError: a format is not known, or needs a size.
    """
    speaker, reader = require_format(source), require_format(target)
    return _convert(text, find_passages(text), speaker, reader, size, target_size or size)


def to_canonical(text: str, source: str, size: Size | None = None) -> str:
    """Translate an answer of a model or a text of a data set, for storage (see `convert`)."""
    return convert(text, source, CANONICAL, size)


def from_canonical(text: str, target: str, size: Size | None = None) -> str:
    """Translate a stored text for a model (see `convert`).

    Only marked boxes and bare corners are boxes of a stored text; a list of four numbers is text.
    """
    stored = [p for p in find_passages(text) if p.marked or p.syntax == "corners"]
    return _convert(text, stored, BOX_FORMATS[CANONICAL], require_format(target), None, size)


def _convert(
    text: str,
    passages: Sequence[Passage],
    speaker: BoxFormat,
    reader: BoxFormat,
    size: Size | None,
    target_size: Size | None,
) -> str:
    same_unit = (speaker.unit, speaker.layout) == (reader.unit, reader.layout)
    begin, end = reader.marks[2:] if reader.marks is not None else ("", "")
    pieces, done = [], 0
    for passage in passages:
        if same_unit and _is_native(text, passage, reader):
            continue
        boxes = _boxes(passage, speaker, size)
        readable = [(box.box, box.label) for box in boxes if box.box is not None]
        pieces.append(_translate_references(text[done : passage.start], reader))
        if readable:
            numbers, labels = zip(*readable, strict=True)
            pieces.append(write(numbers, labels, reader.name, target_size))
            pieces += [begin + box.text + end for box in boxes if box.box is None]
        elif any(item.numbers is not None for item in passage.items):
            pieces.append("".join(f"{begin}?{item.text}{end}" for item in passage.items))
        elif passage.marked:
            pieces.append(_translate_references(text[passage.start : passage.end], reader))
        else:
            pieces.append(begin + text[passage.start : passage.end] + end)
        done = passage.end
    return "".join([*pieces, _translate_references(text[done:], reader)])


def _is_native(text: str, passage: Passage, format: BoxFormat) -> bool:
    """Return whether a passage is written as `format` writes it, or as bare corners if it writes marked corners."""
    written = text[passage.start : passage.end]
    if passage.syntax != format.syntax or ascii_numbers(written) != written:
        return False
    if not passage.marked:
        return format.marks is None or passage.syntax == "corners"
    return format.marks is not None and format.marks[2] in written


def _translate_references(text: str, format: BoxFormat) -> str:
    """Give marked names without a box the marks of a format, or none."""
    before, after = format.marks[:2] if format.marks is not None else ("", "")
    for marks in MARKS:
        if marks is not format.marks:
            text = text.replace(marks[0], before).replace(marks[1], after)
    return text


# --- The canonical language -----------------------------------------------------------------------------------------


def find_boxes(text: str, *, bare: bool = True) -> list[TextBox]:
    """Return the boxes of a text in the canonical language: ``(x,y),(x,y)`` in thousandths, in marks or, with `bare`,
    without. Boxes in other syntaxes are not read; `parse` reads the answer of a model."""
    return [
        box
        for passage in find_passages(text)
        if passage.marked or (bare and passage.syntax == "corners")
        for box in _boxes(passage, BOX_FORMATS[CANONICAL], None)
    ]


def find_references(text: str) -> list[str]:
    """Return the names that a text marks as references."""
    return [next(group for group in match.groups() if group is not None).strip() for match in REFERENCE.finditer(text)]


def without_boxes(text: str) -> str:
    """Remove all boxes of the canonical language, marked or bare, and the marks of references."""
    text = CORNERS.sub("", MARKED.sub("", text))
    for marks in MARKS:
        for mark in marks:
            text = text.replace(mark, "")
    return " ".join(text.split())


def write_box(box: Sequence[float]) -> str:
    """Return a box in the canonical language."""
    return write([box])


def write_reference(name: str) -> str:
    """Return a name in the marks of a reference of the canonical language."""
    return f"{QWEN2_MARKS[0]}{name}{QWEN2_MARKS[1]}"


def rename_marks(text: str, format: str) -> str:
    """Replace the marks of all formats by those of one format, and leave everything else as it is."""
    marks = require_format(format).marks
    assert marks is not None
    for others in MARKS:
        for new, old in zip(marks, others, strict=True):
            text = text.replace(old, new)
    return text


def mark_boxes(text: str) -> str:
    """Mark the bare boxes of a text. Some servers remove the marks because they are special tokens."""
    if MARKED.search(text):
        return text
    return CORNERS.sub(lambda match: f"{QWEN2_MARKS[2]}{match[0].strip()}{QWEN2_MARKS[3]}", text)


def edit_marked(text: str, edit: Callable[[str, Box | None], Box | None]) -> str:
    """Replace marked boxes of the canonical language.

    `edit` is called with the text between the marks and the box, None if it cannot be read. It returns the box to
    write instead, or None to leave the text as it is.
    """

    def replace_box(match: re.Match[str]) -> str:
        *closed, unclosed = match.groups()
        if unclosed is not None:
            edit(match[0].strip(), None)
            return match[0]
        marks, inner = next((m, group) for m, group in zip(MARKS, closed, strict=True) if group is not None)
        syntax, (item, *others) = read_marked(inner)
        # Several boxes in one pair of marks are edited as one text: they are in no canonical form.
        box = None if others or item.numbers is None else _to_box(item.numbers, syntax, BOX_FORMATS[CANONICAL], None)
        edited = edit(inner.strip(), box)
        if edited is None:
            return match[0]
        a, b, c, d = (round(value) for value in edited)
        return f"{marks[2]}({a},{b}),({c},{d}){marks[3]}"

    return MARKED_OR_UNCLOSED.sub(replace_box, text)

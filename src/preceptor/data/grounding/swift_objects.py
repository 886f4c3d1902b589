"""Read the boxes and names of `objects`, which the marks ``<bbox>`` and ``<ref-object>`` of ms-swift stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.data.grounding.box_formats import BOX_FORMATS, CANONICAL, Size, convert, write_reference, written_boxes
from preceptor.data.grounding.box_policy import require_unit
from preceptor.data.texts import as_text, is_given
from preceptor.errors import UserError

BBOX, REFERENCE = "<bbox>", "<ref-object>"
_MARK = re.compile(f"{BBOX}|{REFERENCE}")
_KEYS = ("ref", "bbox", "bbox_type", "image_id")
_FORMATS = {"real": "xyxy-pixels", "norm1": "xyxy-unit"}
"""Format of the boxes by `bbox_type`."""


@dataclass(frozen=True)
class Objects:
    """Names and boxes in the order of their marks.

    Attributes:
        references: Name for each ``<ref-object>``, if the texts have such marks.
        boxes: Box (x0, y0, x1, y1) for each ``<bbox>``.
        format: Format of the boxes, in pixels of the file or in fractions of the image.
        images: Index of the image of each box.
    """

    references: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    format: str
    images: tuple[int, ...]


def read_objects(value: Any, texts: Sequence[str], images: int, place: str) -> Objects | None:
    """Return the `objects` of a record, or None if it has none.

    Args:
        value: Value of the key `objects`.
        texts: Texts of the dialogue, with marks.
        images: Number of images.
        place: Place of the record, for messages.

    Raises:
        UserError: the value is not in the format of ms-swift, or does not fit the marks or the images.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() - set(_KEYS):
        raise UserError(f"{place}: 'objects' must have the keys {', '.join(_KEYS)} of ms-swift, and no others")
    references, boxes = _list(value, "ref", place), _list(value, "bbox", place)
    if not references and not boxes:
        return None
    for name, mark, items in (("ref", REFERENCE, references), ("bbox", BBOX, boxes)):
        marks = sum(text.count(mark) for text in texts)
        if marks != len(items) and (marks or mark == BBOX):  # names without any mark are not part of the texts
            raise UserError(
                f"{place}: {marks} marks {mark} and {len(items)} entries of objects.{name}; write one mark for each"
            )
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(type(number) in (int, float) for number in box):
            raise UserError(
                f"{place}: {json.dumps(box)[:80]} in objects.bbox is not a box; write [x1, y1, x2, y2], because points "
                "and polygons are not read"
            )
    kind = value.get("bbox_type") or "real"
    if kind not in _FORMATS:
        raise UserError(f"{place}: objects.bbox_type {kind!r:.40} is not known; write {' or '.join(_FORMATS)}")
    indices = _list(value, "image_id", place) or [0] * len(boxes)
    if len(indices) != len(boxes) or not all(type(index) is int and 0 <= index < max(images, 1) for index in indices):
        raise UserError(
            f"{place}: objects.image_id must have the index of an image for each of {len(boxes)} boxes, counted from 0"
        )
    names = tuple(as_text(name, f"{place}: objects.ref") for name in references)
    if not all(names):
        raise UserError(f"{place}: a name in objects.ref is empty; fill it in")
    return Objects(names, tuple(map(tuple, boxes)), _FORMATS[kind], tuple(indices))


def _list(value: dict[str, Any], key: str, place: str) -> list[Any]:
    items = value.get(key)
    if is_given(items) and not isinstance(items, list):
        raise UserError(f"{place}: objects.{key} must be a list")
    return items or []


def insert_objects(
    turns: list[list[str]], objects: Objects, images: Sequence[Path], place: str, size_of: Callable[[Path], Size]
) -> list[str]:
    """Replace the marks in `turns` by names and boxes in the canonical format, and return these boxes.

    Raises:
        UserError: there is no image, or a box in pixels is in fractions.
    """
    if objects.boxes and not images:
        raise UserError(f"{place}: objects.bbox needs an image; add the image of the boxes")
    format = BOX_FORMATS[objects.format]
    boxes = []
    for box, index in zip(objects.boxes, objects.images, strict=True):
        written = json.dumps(box)
        require_unit(written_boxes(written), format, place, 'set "bbox_type": "norm1"')
        size = size_of(images[index]) if format.unit == "pixels" else None
        boxes.append(convert(written, format.name, CANONICAL, size))
    values = {BBOX: iter(boxes), REFERENCE: map(write_reference, objects.references)}
    for turn in turns:
        turn[:] = [_MARK.sub(lambda mark: next(values[mark[0]]), text) for text in turn]
    return boxes

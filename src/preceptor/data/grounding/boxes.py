"""Boxes in texts: find them, write them, convert them to pixels, and repair or refuse invalid ones.

A box is (x0, y0, x1, y1) in thousandths of the width and height of the image, as in Qwen-VL and Med-GRIT-270k.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from preceptor.errors import UserError, nearest

Box = tuple[float, float, float, float]
Style = Literal["bird", "qwen"]
Policy = Literal["refuse", "repair", "drop"]
SIDE = 1000

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
_MARKED = re.compile(r"<box>(.*?)</box>|<\|box_start\|>(.*?)<\|box_end\|>", re.DOTALL)
_REFERENCE = re.compile(r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL)
_MARKS: dict[Style, tuple[str, str, str, str]] = {
    "bird": ("<ref>", "</ref>", "<box>", "</box>"),
    "qwen": ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
}


@dataclass(frozen=True)
class TextBox:
    """A box in a text. `text` is the text between the marks; `box` is None if that text is not a box."""

    text: str
    box: Box | None


def find_boxes(text: str, *, bare: bool = True) -> list[TextBox]:
    """Return the boxes of a text in order, in the marks of either style.

    With `bare`, a text without any marks is searched for ``(x,y),(x,y)``.
    """
    marked = [match[1] if match[1] is not None else match[2] for match in _MARKED.finditer(text)]
    if marked:
        return [TextBox(inner.strip(), _corners(inner)) for inner in marked]
    return [TextBox(match[0], _box(match)) for match in _CORNERS.finditer(text)] if bare else []


def find_references(text: str) -> list[str]:
    """Return the names that a text marks as references."""
    return [(match[1] if match[1] is not None else match[2]).strip() for match in _REFERENCE.finditer(text)]


def write_box(box: Sequence[float], style: Style = "qwen") -> str:
    """Return a box as text in the marks of a style, with its corners rounded to integers."""
    x0, y0, x1, y1 = (round(value) for value in box)
    *_, before, after = _MARKS[style]
    return f"{before}({x0},{y0}),({x1},{y1}){after}"


def write_reference(name: str, box: Sequence[float] | None = None, style: Style = "qwen") -> str:
    """Return a name in the marks of a reference, followed by its box if one is given."""
    before, after, *_ = _MARKS[style]
    return f"{before}{name}{after}{write_box(box, style) if box is not None else ''}"


def restyle(text: str, style: Style) -> str:
    """Replace the marks of both styles by those of one style."""
    for other in get_args(Style):
        for new, old in zip(_MARKS[style], _MARKS[other], strict=True):
            text = text.replace(old, new)
    return text


def without_boxes(text: str) -> str:
    """Remove all boxes, marked or bare, and the marks of references."""
    text = _CORNERS.sub("", _MARKED.sub("", text))
    for marks in _MARKS.values():
        for mark in marks:
            text = text.replace(mark, "")
    return " ".join(text.split())


def mark_boxes(text: str, style: Style = "qwen") -> str:
    """Mark the bare boxes of a text. Some servers remove the marks because they are special tokens."""
    if _MARKED.search(text):
        return text
    *_, before, after = _MARKS[style]
    return _CORNERS.sub(lambda match: f"{before}{match[0].strip()}{after}", text)


def from_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Convert corners (x0, y0, x1, y1) from pixels to thousandths."""
    x0, y0, x1, y1 = box
    return (SIDE * x0 / width, SIDE * y0 / height, SIDE * x1 / width, SIDE * y1 / height)


def to_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Convert corners from thousandths to pixels, the inverse of `from_pixels`."""
    x0, y0, x1, y1 = box
    return (x0 * width / SIDE, y0 * height / SIDE, x1 * width / SIDE, y1 * height / SIDE)


def validate_box(box: Sequence[float]) -> list[str]:
    """Return the faults of a box: `swapped corners`, `outside`, `empty`. The list is empty for a valid box."""
    x0, y0, x1, y1 = box
    faults = ["swapped corners"] * (x0 > x1 or y0 > y1)
    faults += ["outside"] * (min(box) < 0 or max(box) > SIDE)
    return faults + ["empty"] * (x0 == x1 or y0 == y1)


def repair_box(box: Sequence[float]) -> Box | None:
    """Sort the corners of a box and clip it to the image. Return None if nothing remains."""
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    inside = (max(0.0, x0), max(0.0, y0), min(float(SIDE), x1), min(float(SIDE), y1))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def apply_policy(text: str, policy: Policy, place: str, counts: Counter[str]) -> str | None:
    """Return a text with valid boxes only, or None if its row must be dropped.

    Args:
        text: Text with marked boxes.
        policy: `refuse` raises an error for the first faulty box. `repair` sorts corners and clips boxes to the image;
            the row is dropped if nothing of a box remains or it cannot be parsed. `drop` drops every row with a fault.
        place: Place of the text, for messages.
        counts: Counts the faults by kind.

    Raises:
        UserError: the policy is unknown, or `refuse` meets a faulty box.
    """
    if policy not in get_args(Policy):
        raise UserError(f"box policy {policy!r} is not known{nearest(policy, get_args(Policy))}")
    valid = True

    def handle_box(match: re.Match[str]) -> str:
        nonlocal valid
        inner = match[1] if match[1] is not None else match[2]
        box = _corners(inner)
        faults = ["unreadable"] if box is None else validate_box(box)
        counts.update(faults)
        if not faults or box is None:
            valid = valid and not faults
            if faults and policy == "refuse":
                raise UserError(f"{place}: {inner.strip()!r} is not a box; write (x1,y1),(x2,y2), or set boxes=repair")
            return match[0]
        if policy == "refuse":
            raise UserError(f"{place}: box {inner.strip()} is {' and '.join(faults)}; correct it, or set boxes=repair")
        repaired = repair_box(box) if policy == "repair" else None
        if repaired is None:
            valid = False
            return match[0]
        return write_box(repaired, "bird" if match[1] is not None else "qwen")

    text = _MARKED.sub(handle_box, text)
    return text if valid else None


def apply_to_turns(
    turns: Sequence[Sequence[str]], policy: Policy, place: str, counts: Counter[str], faulty: list[str]
) -> tuple[tuple[str, str], ...] | None:
    """Apply `apply_policy` to all texts of a dialogue, and return its turns, or None if it must be dropped.

    If there are faults, ``PLACE: FAULTS`` is added to `faulty`, with the place given without its folder.
    """
    turn_counts: Counter[str] = Counter()
    checked = [[apply_policy(text, policy, place, turn_counts) for text in turn] for turn in turns]
    counts.update(turn_counts)
    if turn_counts:
        faulty.append(f"{Path(place).name}: {', '.join(turn_counts)}")
    if any(text is None for turn in checked for text in turn):
        return None
    return tuple((str(question), str(answer)) for question, answer in checked)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes, or 0 if both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(0.0, width) * max(0.0, height)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _corners(text: str) -> Box | None:
    match = _CORNERS.fullmatch(text.strip())
    return _box(match) if match else None


def _box(match: re.Match[str]) -> Box:
    x0, y0, x1, y1 = (float(number) for number in match.groups())
    return (x0, y0, x1, y1)

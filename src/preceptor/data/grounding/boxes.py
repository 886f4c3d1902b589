"""Boxes in text: found, written, moved between pixels and thousandths, mended or refused by a named policy.

A box is (x0, y0, x1, y1) in thousandths of the image's width and height, as Qwen-VL and Med-GRIT-270k write it.
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
class Found:
    """A box in a text: `box` as written, None where what stands between the marks is no box; `text` is what stands."""

    text: str
    box: Box | None


def find_boxes(text: str, *, bare: bool = True) -> list[Found]:
    """Return the boxes of a text in their order, in the marks of either style.

    Where there is no mark at all, with `bare`, whatever looks like ``(x,y),(x,y)`` is a box.
    """
    marked = [match[1] if match[1] is not None else match[2] for match in _MARKED.finditer(text)]
    if marked:
        return [Found(inner.strip(), _corners(inner)) for inner in marked]
    return [Found(match[0], _box(match)) for match in _CORNERS.finditer(text)] if bare else []


def find_references(text: str) -> list[str]:
    """Return the names that a text marks as referring to something."""
    return [(match[1] if match[1] is not None else match[2]).strip() for match in _REFERENCE.finditer(text)]


def write_box(box: Sequence[float], style: Style = "qwen") -> str:
    """Return a box in the marks of a style, its corners rounded to whole thousandths."""
    x0, y0, x1, y1 = (round(value) for value in box)
    *_, before, after = _MARKS[style]
    return f"{before}({x0},{y0}),({x1},{y1}){after}"


def write_reference(name: str, box: Sequence[float] | None = None, style: Style = "qwen") -> str:
    """Return a marked name, followed by its box where one is given."""
    before, after, *_ = _MARKS[style]
    return f"{before}{name}{after}{write_box(box, style) if box is not None else ''}"


def restyle(text: str, style: Style) -> str:
    """Return a text with the marks of both styles written in one."""
    for other in get_args(Style):
        for mine, theirs in zip(_MARKS[style], _MARKS[other], strict=True):
            text = text.replace(theirs, mine)
    return text


def without_boxes(text: str) -> str:
    """Return a text without its boxes, marked or bare, and without the marks of names."""
    text = _CORNERS.sub("", _MARKED.sub("", text))
    for marks in _MARKS.values():
        for mark in marks:
            text = text.replace(mark, "")
    return " ".join(text.split())


def mark_boxes(text: str, style: Style = "qwen") -> str:
    """Return a text with the boxes that stand bare in it marked: a server may leave marks out as special tokens."""
    if _MARKED.search(text):
        return text
    *_, before, after = _MARKS[style]
    return _CORNERS.sub(lambda match: f"{before}{match[0].strip()}{after}", text)


def from_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Return corners (x0, y0, x1, y1) in pixels of an image as thousandths."""
    x0, y0, x1, y1 = box
    return (SIDE * x0 / width, SIDE * y0 / height, SIDE * x1 / width, SIDE * y1 / height)


def to_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Return thousandths as corners in pixels; the inverse of `from_pixels`."""
    x0, y0, x1, y1 = box
    return (x0 * width / SIDE, y0 * height / SIDE, x1 * width / SIDE, y1 * height / SIDE)


def validate_box(box: Sequence[float]) -> list[str]:
    """Return what is wrong with a box: ``swapped corners``, ``outside``, ``empty``; nothing where it is good."""
    x0, y0, x1, y1 = box
    found = ["swapped corners"] * (x0 > x1 or y0 > y1)
    found += ["outside"] * (min(box) < 0 or max(box) > SIDE)
    return found + ["empty"] * (x0 == x1 or y0 == y1)


def repair_box(box: Sequence[float]) -> Box | None:
    """Return the box with its corners in order and inside the image; None where nothing of it is left."""
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    inside = (max(0.0, x0), max(0.0, y0), min(float(SIDE), x1), min(float(SIDE), y1))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def apply_policy(text: str, policy: Policy, place: str, counts: Counter[str]) -> str | None:
    """Return a text with good boxes alone; None where the row is to be dropped.

    Every fault is counted in `counts`. `repair` orders corners and cuts boxes to the image; a box of which nothing is
    left, or that cannot be read, drops the row. `drop` drops every row with a fault.

    Raises UserError for an unknown policy, and with `refuse` for the first fault, with `place`.
    """
    if policy not in get_args(Policy):
        raise UserError(f"box policy {policy!r} is not known{nearest(policy, get_args(Policy))}")
    good = True

    def one(match: re.Match[str]) -> str:
        nonlocal good
        inner = match[1] if match[1] is not None else match[2]
        box = _corners(inner)
        faults = ["unreadable"] if box is None else validate_box(box)
        counts.update(faults)
        if not faults or box is None:
            good = good and not faults
            if faults and policy == "refuse":
                raise UserError(f"{place}: {inner.strip()!r} is no box; write (x1,y1),(x2,y2), or set boxes=repair")
            return match[0]
        if policy == "refuse":
            raise UserError(f"{place}: box {inner.strip()} is {' and '.join(faults)}; mend it, or set boxes=repair")
        mended = repair_box(box) if policy == "repair" else None
        if mended is None:
            good = False
            return match[0]
        return write_box(mended, "bird" if match[1] is not None else "qwen")

    found = _MARKED.sub(one, text)
    return found if good else None


def apply_to_turns(
    turns: Sequence[Sequence[str]], policy: Policy, place: str, counts: Counter[str], faulty: list[str]
) -> tuple[tuple[str, str], ...] | None:
    """Return `apply_policy` of all texts of a dialogue's turns; None where it is to be dropped.

    Where there is a fault, ``PLACE: FAULTS`` is added to `faulty`, the place without its folder.
    """
    own: Counter[str] = Counter()
    mended = [[apply_policy(text, policy, place, own) for text in turn] for turn in turns]
    counts.update(own)
    if own:
        faulty.append(f"{Path(place).name}: {', '.join(own)}")
    if any(text is None for turn in mended for text in turn):
        return None
    return tuple((str(question), str(answer)) for question, answer in mended)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the area of the intersection over that of the union; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = _area(a) + _area(b) - both
    return both / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _corners(text: str) -> Box | None:
    match = _CORNERS.fullmatch(text.strip())
    return _box(match) if match else None


def _box(match: re.Match[str]) -> Box:
    x0, y0, x1, y1 = (float(number) for number in match.groups())
    return (x0, y0, x1, y1)

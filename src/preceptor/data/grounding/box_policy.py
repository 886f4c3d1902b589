"""Refuse, repair or drop faulty boxes of texts in the canonical language (see `data.grounding.box_formats`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from preceptor.data.grounding.box_formats import BoxFormat, WrittenBox, edit_marked, find_boxes
from preceptor.data.grounding.boxes import Box, repair_box, validate_box
from preceptor.errors import UserError, nearest

Policy = Literal["refuse", "repair", "drop"]
NAME_FORMAT = "name the format of the boxes with data.box_format"


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

    def repair(inner: str, box: Box | None) -> Box | None:
        nonlocal valid
        faults = ["unreadable"] if box is None else validate_box(box)
        counts.update(faults)
        if not faults:
            return None
        if policy == "refuse":
            if box is None:
                raise UserError(
                    f"{place}: {inner[:200]!r} is not a box that can be read; write (x1,y1),(x2,y2), or set "
                    "data.boxes=repair"
                )
            raise UserError(
                f"{place}: box {inner[:200]} is {' and '.join(faults)}; correct it, name the format of the boxes with "
                "data.box_format, or set data.boxes=repair"
            )
        repaired = repair_box(box) if policy == "repair" and box is not None else None
        valid = valid and repaired is not None
        return repaired

    text = edit_marked(text, repair)
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


def require_unit(boxes: Iterable[WrittenBox], format: BoxFormat, place: str, fix: str = NAME_FORMAT) -> None:
    """Check that no box is in fractions of the image, unless the format counts in them.

    Args:
        boxes: boxes with their numbers as written.
        format: format in which they are read.
        place: place of the boxes, for messages.
        fix: end of the message.

    Raises:
        UserError: a box has no value above 1, and a value that is not whole.
    """
    for box in boxes:
        numbers = box.numbers or ()
        if format.unit != "unit" and any(value % 1 for value in numbers) and max(map(abs, numbers)) <= 1:
            values = ", ".join(f"{value:g}" for value in numbers)
            raise UserError(
                f"{place}: box {values} has values in 0 to 1, but {format.name} counts in {format.unit}; {fix}"
            )


def require_inside(texts: Iterable[str], format: str, place: str, fix: str = NAME_FORMAT) -> None:
    """Check that most boxes are inside their images. Otherwise the format is wrong, and repairing would hide it.

    Args:
        texts: texts in the canonical language.
        format: format in which they were read, for messages.
        place: place of the texts, for messages.
        fix: end of the message.

    Raises:
        UserError: there are at least 4 boxes, and more than half of them leave their image.
    """
    boxes = [found.box for text in texts for found in find_boxes(text) if found.box is not None]
    outside = sum("outside" in validate_box(box) for box in boxes)
    if len(boxes) >= 4 and outside > len(boxes) / 2:
        raise UserError(
            f"{place}: {outside} of {len(boxes)} boxes leave their image if they are read as {format}; {fix}"
        )

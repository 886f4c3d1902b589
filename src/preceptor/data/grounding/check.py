"""Check dialogues for `preceptor doctor`. Problems are returned, not raised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from preceptor.data.findings import Finding
from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.images import ImageError, load_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.data.vqa.check import written_by_program

MOST_LISTED = 20
"""Faulty boxes that are listed one by one."""
_WRITTEN = {
    "missing": "a missing value or an error of a spreadsheet; fill them in or delete the records",
    "printed": "a printed list or structure; write texts",
    "truth": "a truth value; write yes and no",
}


def check_dialogues(
    data: GroundingDataset, policy: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """Decode every image once and return what is wrong: faulty boxes first, then unreadable images.

    `policy` is `data.boxes` of the recipe. A faulty box is an error if it is `refuse`, else a warning.
    """
    severity = "error" if policy == "refuse" else "warning"
    findings = []
    for line in data.faulty[:MOST_LISTED]:
        place, _, fault = line.rpartition(": ")
        findings.append(Finding((), Path(place), f"box: {fault}", severity))  # type: ignore[arg-type]
    users: dict[Path, list[str]] = {}
    for row in data.samples:
        for image in row.images:
            users.setdefault(image, []).append(row.id)
    for image, ids in users.items():
        try:
            load_image(image, max_bytes=max_bytes, max_pixels=max_pixels)
        except ImageError as error:
            findings.append(Finding(tuple(ids), image, str(error)))
    return findings


def fault_findings(data: GroundingDataset, policy: str) -> list[Finding]:
    """Return a warning with the number of faulty boxes of each kind. `policy` is `data.boxes` of the recipe."""
    return [
        Finding((), None, f"{count} boxes are {fault}; data.boxes={policy} decides what happens to them", "warning")
        for fault, count in data.faults.items()
    ]


def answer_findings(dialogues: Iterable[Dialogue]) -> list[Finding]:
    """Return a warning for each kind of text that a program has written in the place of a whole answer.

    Answers in JSON or with boxes are meant as such.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for row in dialogues:
        for _, answer in row.turns:
            kind = written_by_program(answer)
            if kind and not (kind == "printed" and (_is_json(answer) or find_boxes(answer))):
                found.setdefault(kind, []).append((row.id, answer))
    return [
        Finding(
            tuple(dict.fromkeys(id for id, _ in answers)),
            None,
            f"{len(answers)} answers, such as {answers[0][1]!r:.60}, look like {_WRITTEN[kind]}, unless they are meant",
            "warning",
        )
        for kind, answers in found.items()
    ]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

"""Check dialogues for `preceptor doctor`. Problems are returned, not raised."""

from __future__ import annotations

from pathlib import Path

from preceptor.data.findings import Finding
from preceptor.data.images import ImageError, load_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.types import GroundingDataset

MOST_LISTED = 20
"""Faulty boxes that are listed one by one."""


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

"""Compare a copy of a published data set with its release. Differences are findings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from preceptor.data.findings import Finding
from preceptor.data.image_folder import IMAGE_SUFFIXES

MOST_LISTED = 5


def released_counts(counts: Mapping[Path, int], released: Mapping[Path, int]) -> list[Finding]:
    """Return a finding for every table whose number of rows is not that of the release."""
    return [
        Finding((), file, f"{file.name} has {counts[file]:,} rows, but the release has {rows:,}", "warning")
        for file, rows in released.items()
        if counts[file] != rows
    ]


def unused_images(folder: Path, used: Collection[Path], pattern: str = "*") -> list[Finding]:
    """Return a finding if a folder contains images, by the glob `pattern`, that no question is about."""
    images = {file for file in folder.glob(pattern) if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."}
    unused = sorted(file.relative_to(folder).as_posix() for file in images - set(used))
    if not unused:
        return []
    listed = ", ".join(unused[:MOST_LISTED]) + (", ..." if len(unused) > MOST_LISTED else "")
    return [Finding((), folder, f"{len(unused)} of {len(images)} images have no question: {listed}", "warning")]

"""What `preceptor doctor` finds in volumes. Nothing is raised: every finding is listed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preceptor.data import nifti
from preceptor.data.nifti import MAX_VOXELS, Geometry, VolumeError
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import intensities, label_map, require_same_grid
from preceptor.data.vqa.check import Finding
from preceptor.files import sha256


def check_cases(data: SegmentationDataset, *, max_voxels: int = MAX_VOXELS) -> list[Finding]:
    """Read every file once and return what is amiss, case by case in their order, then over all cases.

    Errors: a missing or unreadable file, NaN, a constant image, files on different grids, unknown labels, one file
    under two names, a patient or the same file in two splits. Warnings: empty label maps, missing regions, the number
    of cases with one modality.
    """
    findings: list[Finding] = []
    hashes: dict[Path, str] = {}
    for case in data.samples:
        findings += _check_case(case, data, max_voxels, hashes)
    return findings + _patients(data.samples) + _copies(data, hashes) + _counts(data)


def _check_case(case: Case, data: SegmentationDataset, max_voxels: int, hashes: dict[Path, str]) -> list[Finding]:
    found: list[Finding] = []

    def say(file: Path | None, reason: str, severity: str = "error") -> None:
        found.append(Finding((case.id,), file, reason, "error" if severity == "error" else "warning"))

    reader = nifti.Reader(max_voxels)
    first: tuple[VolumeFile, Geometry] | None = None
    names: dict[tuple[str, int | None], str] = {}
    files = [*case.images.items(), *([("mask", case.mask)] if case.mask else [])]
    if not case.images:
        say(None, f"case {case.id} has no image; give at least one modality")
    if case.mask is None and case.split != "unlabelled":
        say(None, f"case {case.id} has no label map; only a case with one can be trained on or scored")
    for name, file in files:
        try:
            volume, place = reader.volume(file)
        except VolumeError as error:
            say(file.path, str(error))
            continue
        if file.path not in hashes:
            hashes[file.path] = sha256(file.path)
        content = (hashes[file.path], file.channel)
        if content in names:
            say(file.path, f"{file.path}: the same file as {names[content]} of case {case.id}, here as {name}")
        names.setdefault(content, name)
        first = first or (file, place)
        try:
            require_same_grid(*first, file, place)
        except VolumeError as error:
            say(file.path, str(error))
        try:
            if file is not case.mask:
                intensities(volume, file)
            elif not np.any(label_map(volume, file, data.regions)):
                say(file.path, f"{file.path}: the label map is empty", "warning")
        except VolumeError as error:
            say(file.path, str(error))
    return found


def _patients(cases: Sequence[Case]) -> list[Finding]:
    splits: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for case in cases:
        splits[case.group].setdefault(case.split, case.id)
    return [
        Finding(tuple(held.values()), None, f"patient {group!r} is in {' and in '.join(sorted(held))}; keep one split")
        for group, held in splits.items()
        if len(held) > 1
    ]


def _copies(data: SegmentationDataset, hashes: dict[Path, str]) -> list[Finding]:
    """Return a finding for every image file whose bytes are those of another case's, worse across splits."""
    users: defaultdict[str, dict[str, Case]] = defaultdict(dict)
    for case in data.samples:
        for file in case.images.values():
            if file.path in hashes:
                users[hashes[file.path]].setdefault(case.id, case)
    pairs: dict[tuple[str, ...], bool] = {}
    for held in users.values():
        if len(held) > 1:
            pairs[tuple(held)] = len({case.split for case in held.values()}) > 1
    return [
        Finding(
            ids,
            None,
            f"cases {', '.join(ids)} hold the same image file{' in different splits' if leaks else ''}; are they one "
            "patient? Give them one group",
            "error" if leaks else "warning",
        )
        for ids, leaks in pairs.items()
    ]


def _counts(data: SegmentationDataset) -> list[Finding]:
    found = []
    single = Counter(next(iter(case.images)) for case in data.samples if len(case.images) == 1)
    if single and len(data.modalities) > 1:
        each = ", ".join(f"{name} {count}" for name, count in sorted(single.items()))
        reason = (
            f"{single.total()} of {len(data.samples)} cases have a single modality ({each}): none can teach in them"
        )
        found.append(Finding((), None, reason, "warning"))
    held = {name for case in data.split("train") for name in case.images}
    never = [name for name in data.modalities if data.split("train") and name not in held]
    if never:
        found.append(Finding((), None, f"no training case has {', '.join(never)}; nothing can be learnt of it"))
    return found

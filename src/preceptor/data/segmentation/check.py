"""Check the volumes of a segmentation data set for `preceptor doctor`. Problems are returned, not raised."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from preceptor.data import nifti
from preceptor.data.findings import Finding
from preceptor.data.nifti import MAX_VOXELS, Geometry, VolumeError
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import content_hash, intensities, label_map, require_same_grid


def check_cases(data: SegmentationDataset, *, max_voxels: int = MAX_VOXELS) -> list[Finding]:
    """Read every file once and return all findings: those of each case in order, then those that span cases.

    Errors: missing or unreadable files, NaN, constant images, files of a case on different grids, unknown label values,
    one file under two names, a patient or a file in two splits. Warnings: empty label maps, and the number of cases
    with a single modality.
    """
    findings: list[Finding] = []
    hashes: dict[Path, str] = {}
    for case in data.samples:
        findings += _check_case(case, data, max_voxels, hashes)
    return findings + _check_patients(data.samples) + _check_copies(data, hashes) + _check_modalities(data)


def _check_case(case: Case, data: SegmentationDataset, max_voxels: int, hashes: dict[Path, str]) -> list[Finding]:
    findings: list[Finding] = []

    def add(file: Path | None, reason: str, severity: Literal["error", "warning"] = "error") -> None:
        findings.append(Finding((case.id,), file, reason, severity))

    reader = nifti.Reader(max_voxels)
    reference: tuple[VolumeFile, Geometry] | None = None
    name_by_content: dict[tuple[str, int | None], str] = {}
    files = [*case.images.items(), *([("mask", case.mask)] if case.mask else [])]
    if not case.images:
        add(None, f"case {case.id} has no image; give at least one modality")
    if case.mask is None and case.split != "unlabelled":
        add(None, f"case {case.id} has no label map; training and scoring need one")
    for name, file in files:
        try:
            volume, geometry = reader.volume(file)
        except VolumeError as error:
            add(file.path, str(error))
            continue
        for remark in geometry.remarks:
            add(file.path, f"{file.path}: {remark}", "warning")
        if file.path not in hashes:
            hashes[file.path] = content_hash(file.path)
        content = (hashes[file.path], file.channel)
        if content in name_by_content:
            add(file.path, f"{file.path}: {name} of case {case.id} is the same file as {name_by_content[content]}")
        name_by_content.setdefault(content, name)
        reference = reference or (file, geometry)
        try:
            require_same_grid(*reference, file, geometry)
        except VolumeError as error:
            add(file.path, str(error))
        try:
            if file is not case.mask:
                intensities(volume, file)
            elif not np.any(label_map(volume, file, data.regions)):
                add(file.path, f"{file.path}: the label map is empty", "warning")
        except VolumeError as error:
            add(file.path, str(error))
    return findings


def _check_patients(cases: Sequence[Case]) -> list[Finding]:
    """Return a finding for every patient with cases in several splits."""
    id_by_split: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for case in cases:
        id_by_split[case.group].setdefault(case.split, case.id)
    return [
        Finding(
            tuple(ids.values()),
            None,
            f"patient {group!r} has cases in the splits {' and '.join(sorted(ids))}; move them to one split",
        )
        for group, ids in id_by_split.items()
        if len(ids) > 1
    ]


def _check_copies(data: SegmentationDataset, hashes: dict[Path, str]) -> list[Finding]:
    """Return a finding for cases that share an image file: an error if they are in different splits."""
    cases_by_hash: defaultdict[str, dict[str, Case]] = defaultdict(dict)
    for case in data.samples:
        for file in case.images.values():
            if file.path in hashes:
                cases_by_hash[hashes[file.path]].setdefault(case.id, case)
    leaks_by_ids: dict[tuple[str, ...], bool] = {}
    for cases in cases_by_hash.values():
        if len(cases) > 1:
            leaks_by_ids[tuple(cases)] = len({case.split for case in cases.values()}) > 1
    return [
        Finding(
            ids,
            None,
            f"cases {', '.join(ids)} contain the same image file{' in different splits' if leaks else ''}; if they "
            "belong to one patient, give them the same group",
            "error" if leaks else "warning",
        )
        for ids, leaks in leaks_by_ids.items()
    ]


def _check_modalities(data: SegmentationDataset) -> list[Finding]:
    """Return findings for cases with a single modality, and for modalities without a training case."""
    findings = []
    single = Counter(next(iter(case.images)) for case in data.samples if len(case.images) == 1)
    if single and len(data.modalities) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(single.items()))
        reason = (
            f"{single.total()} of {len(data.samples)} cases have a single modality ({counts}), so that no modality can "
            "teach another in them"
        )
        findings.append(Finding((), None, reason, "warning"))
    available = {name for case in data.split("train") for name in case.images}
    missing = [name for name in data.modalities if data.split("train") and name not in available]
    if missing:
        reason = f"no training case has the modality {', '.join(missing)}, so that nothing can be learned from it"
        findings.append(Finding((), None, reason))
    return findings

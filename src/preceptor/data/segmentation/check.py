"""Check the volumes of a segmentation data set for `preceptor doctor`. Problems are returned, not raised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from preceptor.data.findings import Finding
from preceptor.data.nifti import MAX_VOXELS, Geometry, VolumeError
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import Reader, content_hash, intensities, label_map, require_same_grid


def check_cases(data: SegmentationDataset, *, max_voxels: int = MAX_VOXELS) -> list[Finding]:
    """Read every file once and return all findings: those of each case in order, then those that span cases.

    Errors: missing or unreadable files, NaN, constant images, files of a case on different grids, unknown label values,
    one file under two names. Warnings: empty label maps, and the number of cases with a single modality. Patients and
    files in several splits are findings of the data set itself (`identity.note_leaks`).
    """
    findings: list[Finding] = []
    hashes: dict[Path, str] = {}
    for case in data.samples:
        findings += _check_case(case, data, max_voxels, hashes)
    return findings + _check_modalities(data)


def _check_case(case: Case, data: SegmentationDataset, max_voxels: int, hashes: dict[Path, str]) -> list[Finding]:
    findings: list[Finding] = []

    def add(file: Path | None, reason: str, severity: Literal["error", "warning"] = "error") -> None:
        findings.append(Finding((case.id,), file, reason, severity))

    reader = Reader(max_voxels)
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

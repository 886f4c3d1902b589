"""Check the volumes of a segmentation data set for `preceptor doctor`. Problems are returned, not raised."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from preceptor.data import nifti
from preceptor.data.findings import Finding
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import Geometry, VolumeError
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import Reader, content_hash, intensities, label_map, require_same_grid

ForegroundBox = Callable[[np.ndarray], tuple[slice, slice, slice]]


def check_cases(
    data: SegmentationDataset, *, max_voxels: int = MAX_VOXELS, foreground_box: ForegroundBox | None = None
) -> list[Finding]:
    """Read every file once and return all findings: case by case.

    Errors: missing or unreadable files, NaN, constant images, files of a case on different grids, unknown label values,
    one file under two names. Warnings: empty label maps, labels outside the box around the foreground of the images
    (`foreground_box` returns that of an image (D, H, W)), and doubts about DICOM series. Patients and files in several
    splits (`identity.note_leaks`) and `cheap_findings` are findings of the data set itself.
    """
    findings: list[Finding] = []
    hashes: dict[Path, str] = {}
    for case in data.samples:
        findings += _check_case(case, data, max_voxels, hashes, foreground_box)
    return findings


def _check_case(
    case: Case,
    data: SegmentationDataset,
    max_voxels: int,
    hashes: dict[Path, str],
    foreground_box: ForegroundBox | None,
) -> list[Finding]:
    findings: list[Finding] = []
    images: list[np.ndarray] = []
    label: np.ndarray | None = None

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
        for remark in geometry.remarks if file.path.is_dir() else ():  # `header_findings` has those of NIfTI files
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
                images.append(intensities(volume, file))
            else:
                label = label_map(volume, file, data.regions)
                if not label.any():
                    add(file.path, f"{file.path}: the label map is empty", "warning")
        except VolumeError as error:
            add(file.path, str(error))
    faulty = any(finding.severity == "error" for finding in findings)
    if label is not None and label.any() and images and foreground_box and not faulty:
        outside = _outside(label > 0, images, foreground_box)
        reason = (
            f"{outside} of {np.count_nonzero(label)} labelled voxels of case {case.id} are outside the box around the "
            "foreground of its images, where nothing is learned or predicted; they count as missed in all scores"
        )
        if outside:
            add(case.mask.path if case.mask else None, reason, "warning")
    return findings


def _outside(label: np.ndarray, images: Sequence[np.ndarray], foreground_box: ForegroundBox) -> int:
    """Return the number of voxels of a mask outside the box around the foreground of all images.

    The foreground is expensive: further images are not looked at if the box of the first ones contains the mask.
    """
    outside = total = int(np.count_nonzero(label))
    box: list[slice] = []
    for image in images:
        found = foreground_box(image)
        box = [slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box or found, found, strict=True)]
        outside = total - int(np.count_nonzero(label[tuple(box)]))
        if outside == 0:
            break
    return outside


def cheap_findings(data: SegmentationDataset) -> list[Finding]:
    """Return the findings that need no voxel, so that every run has them: headers and available modalities."""
    return [*_check_headers(data), *_check_modalities(data)]


def _check_headers(data: SegmentationDataset) -> list[Finding]:
    """Return a finding for each kind of doubt about the headers of NIfTI files. Broken files are found elsewhere."""
    files = {file: case.id for case in data.samples for file in (*case.images.values(), case.mask) if file is not None}
    alike: defaultdict[str, list[tuple[VolumeFile, str]]] = defaultdict(list)
    for file in files:
        if not file.path.is_dir():
            with suppress(VolumeError):
                for remark in nifti.remarks_of(file.path, file.channel):
                    alike[re.sub(r"\d[\d.e+-]*", "#", remark)].append((file, remark))
    findings = []
    for group in alike.values():
        (first, remark), number = group[0], len({file.path for file, _ in group})
        reason = f"{first.path}: {remark}" + (f" (so in {number} files)" if number > 1 else "")
        ids = tuple(dict.fromkeys(files[file] for file, _ in group))
        findings.append(Finding(ids, first.path, reason, "warning"))
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
    without_mask = {name for case in data.split("unlabelled") for name in case.images}
    if unlabelled := [name for name in missing if name in without_mask]:
        reason = (
            f"no training case with a mask has the modality {', '.join(unlabelled)}, so that only a method that learns "
            "from cases without masks can learn from it"
        )
        findings.append(Finding((), None, reason, "warning"))
    if missing := [name for name in missing if name not in without_mask]:
        reason = f"no training case has the modality {', '.join(missing)}, so that nothing can be learned from it"
        findings.append(Finding((), None, reason))
    return findings

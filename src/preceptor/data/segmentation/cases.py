"""Read volumes with label maps: BraTS of any year, BIDS, the Decathlon, nnU-Net, a table, or named files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.findings import Finding
from preceptor.data.groups import group_by_content, unused_patients
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.decathlon import (
    LIST,
    find_decathlon,
)
from preceptor.data.segmentation.dicom_patients import group_by_patient_id
from preceptor.data.segmentation.folders import listed
from preceptor.data.segmentation.layouts import (
    FoundCases,
    find_files,
    maybe_one_patient,
    named_as_brats,
    patients_by_names,
)
from preceptor.data.segmentation.modalities import (
    check_modalities,
    check_regions,
    infer_regions,
)
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import apply_split
from preceptor.data.segmentation.splits import cut_fold, cut_labelled, cut_splits, require_whole_patients
from preceptor.data.segmentation.table import FOLDER_NAMES, find_table, table_in
from preceptor.data.types import Case, SegmentationDataset
from preceptor.data.volumes import Reader, label_map
from preceptor.errors import UserError

MAPS_READ = 12
"""Number of label maps that are read to infer the regions if none are given."""


def read_volumes(
    root: Path,
    *,
    modalities: Sequence[str] | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    split: str | None = None,
    split_file: Path | None = None,
    fold: int | None = None,
    folds: int = 5,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str = "volumes",
    unlabelled: bool = False,
    mask: str | None = None,
    max_voxels: int = MAX_VOXELS,
) -> SegmentationDataset:
    """Read the cases of a folder or a table and assign them to splits.

    A table is read if `root` is one. With the name `volumes`, the files cases.csv and cases.jsonl in the folder are
    tables, too. Otherwise a folder with a dataset.json is read as it says, and every other folder by file names.

    The splits come from the first of these that is given: `split` or `split_file`, the split column of a table, `fold`,
    or a cut by patient. If there is no validation split, it is cut from training. Cases without a label map are
    dropped; with `unlabelled`, they become the split `unlabelled`, but for those whose patient is validated or tested.
    They do not change the splits of the others.

    Args:
        root: Folder of the cases, or a table of them.
        modalities: Inputs of the network, in order. Default: those that are found, with flair, t1, t1ce, t2 first. A
            case may lack some of them.
        regions: Label values of each region. Default: those of dataset.json or of BraTS (see `infer_regions`).
        split: Name of a shipped split (see `named_splits`).
        split_file: File with the split of each case (see `split_files.read_split`).
        fold: Index of the fold that is the test split.
        folds: Number of folds.
        validation_fraction: Fraction of all cases in the validation split.
        test_fraction: Fraction of all cases in the test split.
        seed: Seed of the cuts.
        name: Name of the data set. `brats` states that the cases are those of BraTS.
        unlabelled: Whether to keep training cases without a label map.
        mask: End of the file names of label maps (default `seg`), or their column in a table (default `mask`).
        max_voxels: Largest label map that is read to infer the regions.

    Raises:
        UserError: no case is found, a setting is invalid, or a patient is in two splits.
    """
    checked_modalities = None if modalities is None else check_modalities(modalities)
    if not root.exists():
        raise UserError(f"data.root={root} does not exist; give the folder of the cases, or a table of them")
    found = _found(root, checked_modalities, mask, name, () if split_file is None else (split_file.name,))
    cases = _labelled_cases(found, root, unlabelled)
    labelled = [case for case in cases if case.mask is not None]
    known = (
        check_regions(regions) if regions is not None else _infer_regions(found, labelled, name == "brats", max_voxels)
    )
    split_by = f"fold-{fold}-of-{folds}" if fold is not None else "by-patient"
    grouped = group_by_content(cases)
    merged = [case.id for case, before in zip(grouped, cases, strict=True) if case.group != before.group]
    if merged:
        found.notes.append(
            f"{len(merged)} cases share an image with another case and are in its split: {listed(merged)}."
        )
    cases = grouped
    if not found.group_given:
        cases, notes, doubts = group_by_patient_id(cases)
        found.notes += notes
        found.findings += doubts
        notes, doubts = patients_by_names(cases)
        found.notes += notes
        found.findings += doubts
    if found.layout != "table" and (finding := maybe_one_patient(cases, root)):
        found.findings.append(finding)
    if split is not None and split_file is not None:
        raise UserError(f"data.split={split} cannot be combined with data.split_file={split_file}; set one to null")
    given = named_splits()[split] if split else split_file or (root if found.split_given else None)
    if given is not None and fold is not None and split_file is None:
        raise UserError(f"fold={fold} cannot be combined with the split of {split or given}; remove one of them")
    if split is not None or split_file is not None:
        assert given is not None
        key = "data.split" if split else "data.split_file"
        cases = apply_split(cases, given, found.findings, key=key, fold=fold)
        split_by = given.stem if fold is None else f"{given.stem}-fold-{fold}"
        if fold is not None:
            found.notes.append(f"Fold {fold} of {given.name}: its cases val are the test split.")
    elif found.split_given:
        split_by = "given"
    elif fold is not None:
        cases = cut_labelled(cases, lambda these: cut_fold(these, fold, folds, validation_fraction, seed))
    else:
        cases = cut_labelled(cases, lambda these: cut_splits(these, validation_fraction, test_fraction, seed))
    if given is None:
        found.findings += found.unread_splits
    else:
        require_whole_patients(cases, str(given))
        parts = {case.split for case in cases}
        if validation_fraction and "train" in parts and "validation" not in parts:
            cases = cut_labelled(cases, lambda these: cut_splits(these, validation_fraction, 0, seed))
            found.notes.append(
                f"{given.name} has no validation split: {validation_fraction:.0%} of the training cases form it."
            )
    cases = _separate_unlabelled(cases, found.notes)
    lacking = sum(len(case.images) < len(found.modalities) for case in cases)
    if lacking:
        found.notes.append(f"{lacking} of {len(cases)} cases lack one or more of {', '.join(found.modalities)}.")
    for column, patients in found.patients.items():
        if finding := unused_patients(column, patients, cases):
            found.findings.append(finding)
    return SegmentationDataset(
        name, split_by, root, cases, found.notes, findings=found.findings, modalities=found.modalities, regions=known
    )


def _found(
    root: Path, modalities: tuple[str, ...] | None, mask: str | None, name: str, used: Sequence[str] = ()
) -> FoundCases:
    table = table_in(root) if root.is_file() or name == "volumes" else None
    if table is not None:
        return find_table(table, modalities, mask)
    if (root / LIST).is_file():
        if mask is not None:
            raise UserError(f"data.mask={mask} does not apply to {root / LIST}, which names the label maps; remove one")
        return find_decathlon(root, modalities)
    found = find_files(root, modalities, mask, used)
    if unused := [name for name in FOLDER_NAMES if (root / name).is_file()]:
        reason = (
            f"{root / unused[0]} is not read, because data.name={name} takes the cases from the folder; if it is the "
            f"table of the cases, set data.name=volumes or data.root={root / unused[0]}"
        )
        found.findings.append(Finding((), root / unused[0], reason, "warning"))
    return found


def _separate_unlabelled(cases: list[Case], notes: list[str]) -> list[Case]:
    """Move training cases without a label map to the split `unlabelled`, and drop held-out cases without one."""
    cases = [replace(c, split="unlabelled") if c.mask is None and c.split == "train" else c for c in cases]
    usable = [case for case in cases if case.mask is not None or case.split == "unlabelled"]
    if len(usable) < len(cases):
        notes.append(f"{len(cases) - len(usable)} validation or test cases without a label map were left out.")
    return usable


def _labelled_cases(found: FoundCases, root: Path, unlabelled: bool) -> list[Case]:
    """Return the cases with their modalities in order; unless `unlabelled` is set, only cases with a label map."""
    labelled = [case for case in found.cases if case.mask is not None]
    maybe = (
        f"; {listed(found.maybe_masks)} may be label maps: if so, set data.mask to the end of their names (lesion_mask "
        "for CASE_lesion_mask.nii.gz) or to the column"
        if found.maybe_masks
        else ""
    )
    if not labelled:
        raise UserError(
            f"{root}: none of {len(found.cases)} cases has a label map; name it CASE_seg.nii.gz, or give a table with "
            f"the column mask{maybe}"
        )
    without = [case.id for case in found.cases if case.mask is None]
    if unlabelled:
        labelled = found.cases
    elif without:
        reason = f"{len(without)} cases without a label map were left out: {listed(without)}{maybe}"
        found.findings.append(Finding(tuple(without), None, reason, "warning"))
    return [
        replace(case, images={name: case.images[name] for name in found.modalities if name in case.images})
        for case in labelled
    ]


def _infer_regions(
    found: FoundCases, cases: Sequence[Case], brats: bool, max_voxels: int
) -> dict[str, tuple[int, ...]]:
    if found.regions is not None:
        return found.regions
    step = max(1, len(cases) // MAPS_READ)
    chosen = cases[::step][:MAPS_READ]
    labels: set[int] = set()
    errors: list[VolumeError] = []
    empty: list[str] = []
    for case in chosen:
        assert case.mask is not None
        try:
            volume, _ = Reader(max_voxels).volume(case.mask)
            values = {int(value) for value in np.unique(label_map(volume, case.mask))}
            labels |= values
            empty += [] if values - {0} else [case.id]
        except VolumeError as error:  # training and `preceptor doctor` report it later
            errors.append(error)
    if len(errors) == len(chosen):
        raise errors[0]
    if any(case.id.upper().startswith("BRATS-PED-") for case in cases):
        raise UserError(
            "the labels of BraTS-PED have another meaning in 2023 than from 2024 on; set data.regions by the "
            "description of your release, such as {et: [3], tc: [1, 3], wt: [1, 2, 3]} for 2023"
        )
    enhancing = named_as_brats(cases)
    regions, note = infer_regions(
        labels,
        f"{len(chosen)} of {len(cases)} label maps",
        found.modalities,
        brats=brats or enhancing is not None,
        enhancing=enhancing,
    )
    found.notes.append(note)
    if empty:
        reason = f"{len(empty)} of the {len(chosen)} label maps that were read are empty: {listed(empty)}"
        found.findings.append(Finding(tuple(empty), None, reason, "warning"))
    return regions


def read(config: Any, scratch: Path) -> SegmentationDataset:
    """Read the folder or the table of a recipe's data settings."""
    if config.root is None:
        raise UserError(f"data.name={config.name} needs data.root=FOLDER, the folder of the cases or a table of them")
    return read_volumes(
        Path(config.root),
        modalities=config.modalities,
        regions=config.regions,
        split=config.split,
        split_file=Path(config.split_file) if config.split_file else None,
        fold=config.fold,
        folds=config.folds,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        name=config.name,
        unlabelled=config.unlabelled == "rest",
        mask=config.mask,
        max_voxels=config.max_voxels,
    )

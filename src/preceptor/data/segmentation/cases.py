"""Read volumes with label maps: BraTS of any year, the Medical Segmentation Decathlon, a table, or named files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data import nifti
from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.layouts import (
    LIST,
    FoundCases,
    channel_names,
    find_decathlon,
    find_files,
    patient_of,
    read_list,
)
from preceptor.data.segmentation.modalities import (
    MASK,
    Endings,
    canonical_name,
    check_modalities,
    check_regions,
    infer_regions,
    stem,
)
from preceptor.data.segmentation.splits import apply_split, cut_fold, cut_splits, require_whole_patients
from preceptor.data.segmentation.table import find_table, table_in
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import label_map
from preceptor.errors import UserError

MAPS_READ = 12
"""Number of label maps that are read to infer the regions if none are given."""


def read_volumes(
    root: Path,
    *,
    modalities: Sequence[str] | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    split_file: Path | None = None,
    fold: int | None = None,
    folds: int = 5,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str = "brats",
    unlabelled: bool = False,
) -> SegmentationDataset:
    """Read the cases of a folder or a table and assign them to splits.

    The splits come from the first of these that is given: `split_file`, the split column of a table, `fold`, or a cut
    by patient. If there is no validation split, it is cut from training. Cases without a label map are dropped; with
    `unlabelled`, those of the training split become the split `unlabelled`.

    Args:
        root: Folder of the cases, or a table of them.
        modalities: Inputs of the network, in order. Default: those that are found, with flair, t1, t1ce, t2 first. A
            case may lack some of them.
        regions: Label values of each region. Default: those of BraTS or of dataset.json.
        split_file: File with the split of each case (see `read_split`).
        fold: Index of the fold that is the test split.
        folds: Number of folds.
        validation_fraction: Fraction of all cases in the validation split.
        test_fraction: Fraction of all cases in the test split.
        seed: Seed of the cuts.
        name: Name of the data set.
        unlabelled: Whether to keep training cases without a label map.

    Raises:
        UserError: no case is found, a setting is invalid, or a patient is in two splits.
    """
    checked_modalities = None if modalities is None else check_modalities(modalities)
    if not root.exists():
        raise UserError(f"data.root={root} does not exist; give the folder of the cases, or a table of them")
    found = _found(root, checked_modalities)
    cases = _labelled_cases(found, root, unlabelled)
    known = check_regions(regions) if regions is not None else _infer_regions(found, [c for c in cases if c.mask])
    split_by = f"fold-{fold}-of-{folds}" if fold is not None else "by-patient"
    given = split_file or (root if found.split_given else None)
    if given is not None and fold is not None:
        raise UserError(f"fold={fold} cannot be combined with the split of {given}; remove one of them")
    if split_file is not None:
        cases, split_by = apply_split(cases, split_file, found.notes), split_file.stem
    elif found.split_given:
        split_by = "given"
    elif fold is not None:
        cases = cut_fold(cases, fold, folds, validation_fraction, seed)
    else:
        cases = cut_splits(cases, validation_fraction, test_fraction, seed)
    if given is not None:
        require_whole_patients(cases, str(given))
        if validation_fraction and not any(case.split == "validation" for case in cases):
            cases = cut_splits(cases, validation_fraction, 0, seed)
            found.notes.append(
                f"{given.name} has no validation split: {validation_fraction:.0%} of the training cases form it."
            )
    cases = _separate_unlabelled(cases, found.notes)
    lacking = sum(len(case.images) < len(found.modalities) for case in cases)
    if lacking:
        found.notes.append(f"{lacking} of {len(cases)} cases lack one or more of {', '.join(found.modalities)}.")
    return SegmentationDataset(name, split_by, root, cases, found.notes, modalities=found.modalities, regions=known)


def _found(root: Path, modalities: tuple[str, ...] | None) -> FoundCases:
    if (table := table_in(root)) is not None:
        return find_table(table, modalities)
    if (root / LIST).is_file():
        return find_decathlon(root, modalities)
    return find_files(root, modalities)


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
    if not labelled:
        raise UserError(
            f"{root}: none of {len(found.cases)} cases has a label map; name it CASE_seg.nii.gz, or give a table with "
            "the column mask"
        )
    if unlabelled:
        labelled = found.cases
    elif len(labelled) < len(found.cases):
        found.notes.append(f"{len(found.cases) - len(labelled)} cases without a label map were left out.")
    return [
        replace(case, images={name: case.images[name] for name in found.modalities if name in case.images})
        for case in labelled
    ]


def _infer_regions(found: FoundCases, cases: Sequence[Case]) -> dict[str, tuple[int, ...]]:
    if found.regions is not None:
        return found.regions
    step = max(1, len(cases) // MAPS_READ)
    chosen = cases[::step][:MAPS_READ]
    labels: set[int] = set()
    errors: list[VolumeError] = []
    for case in chosen:
        assert case.mask is not None
        try:
            volume, _ = nifti.Reader().volume(case.mask)
            labels |= {int(value) for value in np.unique(label_map(volume, case.mask))}
        except VolumeError as error:  # training and `preceptor doctor` report it later
            errors.append(error)
    if len(errors) == len(chosen):
        raise errors[0]
    regions, note = infer_regions(labels, f"{len(chosen)} of {len(cases)} label maps")
    found.notes.append(note)
    return regions


def find_cases(root: Path, modalities: Sequence[str]) -> list[Case]:
    """Return the cases of a folder or a table to predict on, each with those of `modalities` that it has.

    Raises:
        UserError: there is no case with any of the modalities.
    """
    names = check_modalities(modalities)
    found = _found(root, None)
    cases = [
        replace(case, images={name: case.images[name] for name in names if name in case.images}, mask=None)
        for case in found.cases
    ]
    cases = [case for case in cases if case.images]
    if not cases:
        raise UserError(f"{root} contains no case with any of the modalities {', '.join(names)}")
    return cases


def find_case(path: Path | Sequence[Path], modalities: Sequence[str]) -> Case:
    """Return a case to predict on, from a folder, from its files, or from one four-dimensional file.

    Missing modalities are absent from the case. The channels of a four-dimensional file are named by the
    `dataset.json` of the Decathlon in the folder above; without one they are `modalities`. A label map in the folder
    becomes the mask of the case. The case is in the test split.

    Raises:
        UserError: a path does not exist, a file has an unknown modality, a modality occurs twice, or there is none.
    """
    names = check_modalities(modalities)
    files = _files(path)
    endings = Endings(names)
    case_files: dict[str, VolumeFile] = {}
    prefixes: set[str] = set()
    for file in files:
        bare = stem(file.name)
        splits = None if bare is None else endings.split(bare)
        if bare is None:
            raise UserError(f"{file} is not a .nii or .nii.gz file")
        if splits is None and len(files) == 1:
            return _one_file(file, bare, names)
        if splits is None:
            if isinstance(path, Path):  # a folder may contain other files
                continue
            raise UserError(f"{file}: the name ends in none of {', '.join(names)}; rename it as CASE_{names[0]}.nii.gz")
        prefix, kind = splits
        if kind in case_files:
            raise UserError(f"{case_files[kind].path} and {file} are both {kind}; give the files of one case")
        case_files[kind] = VolumeFile(file)
        prefixes |= {prefix} - {""}
    place = path if isinstance(path, Path) else files[0].parent
    if not set(case_files) - {MASK}:
        raise UserError(
            f"{place} contains none of the modalities {', '.join(names)}; name the files CASE_{names[0]}.nii.gz"
        )
    if len(prefixes) > 1 and place.name not in prefixes:
        raise UserError(
            f"{place} contains files of several cases ({', '.join(sorted(prefixes)[:4])}); give those of one"
        )
    case = place.name if place.name in prefixes or not prefixes else prefixes.pop()
    mask = case_files.pop(MASK, None)
    return Case(case, {name: case_files[name] for name in names if name in case_files}, mask, patient_of(case), "test")


def _files(path: Path | Sequence[Path]) -> list[Path]:
    paths = [path] if isinstance(path, Path) else list(path)
    for file in paths:
        if not file.exists():
            raise UserError(f"{file} does not exist; check the path")
    if len(paths) == 1 and paths[0].is_dir():
        return [file for file in sorted(paths[0].iterdir()) if stem(file.name) and not file.name.startswith(".")]
    return paths


def _one_file(file: Path, bare: str, names: tuple[str, ...]) -> Case:
    """Return the case of a single file whose name contains no modality."""
    shape = nifti.read_header(file).shape
    channels = shape[3] if len(shape) == 4 else 1
    dataset_json = file.parent.parent / LIST
    if dataset_json.is_file() and len(channel_names(read_list(dataset_json), dataset_json)) == channels:
        order = channel_names(read_list(dataset_json), dataset_json)
    elif channels == len(names):
        order = list(names)
    else:
        sides = " x ".join(map(str, shape))
        raise UserError(
            f"{file} has {sides} voxels and {channels} channel{'s' * (channels > 1)} for {len(names)} modalities "
            f"({', '.join(names)}); give a 4-D file with these in order, or files named CASE_{names[0]}.nii.gz"
        )
    wanted = {canonical_name(name): name for name in names}
    images = {
        wanted[canonical_name(name)]: VolumeFile(file, channel if channels > 1 else None)
        for channel, name in enumerate(order)
        if canonical_name(name) in wanted
    }
    if not images:
        raise UserError(f"{file} contains {', '.join(order)}, but none of the modalities {', '.join(names)}")
    return Case(bare, {name: images[name] for name in names if name in images}, None, patient_of(bare), "test")


def read(config: Any, scratch: Path) -> SegmentationDataset:
    """Read the folder or the table of a recipe's data settings."""
    if config.root is None:
        raise UserError(f"data.name={config.name} needs data.root=FOLDER, the folder of the cases or a table of them")
    return read_volumes(
        Path(config.root),
        modalities=config.modalities,
        regions=config.regions,
        split_file=Path(config.split_file) if config.split_file else None,
        fold=config.fold,
        folds=config.folds,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        name=config.name,
        unlabelled=config.unlabelled == "rest",
    )

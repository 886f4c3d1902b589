"""Volumes with label maps: BraTS of any year, the Decathlon, a table, or files named after case and modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from preceptor.data import nifti
from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.layouts import (
    LIST,
    Found,
    channel_names,
    find_decathlon,
    find_files,
    patient_of,
    read_list,
)
from preceptor.data.segmentation.modalities import MASK, Endings, checked, checked_regions, plain, regions_of, stem
from preceptor.data.segmentation.splits import apply_split, cut_fold, cut_parts, require_whole_patients
from preceptor.data.segmentation.table import find_table, table_in
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.data.volumes import label_map
from preceptor.errors import UserError

LOOKED_AT = 12
"""Label maps whose values are looked at where the regions are not given."""


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
    """Read the cases of a folder or a table, and divide them into splits.

    `modalities` are the network's inputs in order (default: those found, flair, t1, t1ce, t2 first); a case may lack
    some of them. `regions` are label values by name (default: those of BraTS or of dataset.json). Parts come from
    `split_file`, else from the table's split column, else from `fold` of `folds` (the fold is the test split), else
    they are cut by patient; fractions are of all cases. A split without a validation split has one cut from training.
    Cases without a label map are left out; with `unlabelled`, those of training become the split `unlabelled`.

    Raises:
        UserError: nothing is found, a setting does not fit, or a patient is in two splits.
    """
    chosen = None if modalities is None else checked(modalities)
    if not root.exists():
        raise UserError(f"data.root={root} does not exist; give the folder of the cases, or a table of them")
    found = _found(root, chosen)
    cases = _usable(found, root, unlabelled)
    known = checked_regions(regions) if regions is not None else _regions(found, [c for c in cases if c.mask])
    split_by = f"fold-{fold}-of-{folds}" if fold is not None else "by-patient"
    given = split_file or (root if found.split_given else None)
    if given is not None and fold is not None:
        raise UserError(f"fold={fold} and the split of {given} exclude each other; leave one of them out")
    if split_file is not None:
        cases, split_by = apply_split(cases, split_file, found.notes), split_file.stem
    elif found.split_given:
        split_by = "given"
    elif fold is not None:
        cases = cut_fold(cases, fold, folds, validation_fraction, seed)
    else:
        cases = cut_parts(cases, validation_fraction, test_fraction, seed)
    if given is not None:
        require_whole_patients(cases, str(given))
        if validation_fraction and not any(case.split == "validation" for case in cases):
            cases = cut_parts(cases, validation_fraction, 0, seed)
            found.notes.append(
                f"{given.name} has no validation split: {validation_fraction:.0%} of training is cut off."
            )
    cases = _told_apart(cases, found.notes)
    lacking = sum(len(case.images) < len(found.modalities) for case in cases)
    if lacking:
        found.notes.append(f"{lacking} of {len(cases)} cases lack one or more of {', '.join(found.modalities)}.")
    return SegmentationDataset(name, split_by, root, cases, found.notes, modalities=found.modalities, regions=known)


def _found(root: Path, modalities: tuple[str, ...] | None) -> Found:
    if (table := table_in(root)) is not None:
        return find_table(table, modalities)
    if (root / LIST).is_file():
        return find_decathlon(root, modalities)
    return find_files(root, modalities)


def _told_apart(cases: list[Case], notes: list[str]) -> list[Case]:
    """Move training cases without a label map to the split `unlabelled`; drop held-out cases without one."""
    found = [replace(c, split="unlabelled") if c.mask is None and c.split == "train" else c for c in cases]
    kept = [case for case in found if case.mask is not None or case.split == "unlabelled"]
    if len(kept) < len(found):
        notes.append(f"{len(found) - len(kept)} validation or test cases without a label map are left out.")
    return kept


def _usable(found: Found, root: Path, unlabelled: bool) -> list[Case]:
    """Return the cases, each with its modalities in order; without `unlabelled` only those that have a label map."""
    labelled = [case for case in found.cases if case.mask is not None]
    if not labelled:
        raise UserError(
            f"{root}: none of {len(found.cases)} cases has a label map; name it CASE_seg.nii.gz, or give a table with "
            "the column mask"
        )
    if unlabelled:
        labelled = found.cases
    elif len(labelled) < len(found.cases):
        found.notes.append(f"{len(found.cases) - len(labelled)} cases without a label map are left out.")
    return [
        replace(case, images={name: case.images[name] for name in found.modalities if name in case.images})
        for case in labelled
    ]


def _regions(found: Found, cases: Sequence[Case]) -> dict[str, tuple[int, ...]]:
    if found.regions is not None:
        return found.regions
    step = max(1, len(cases) // LOOKED_AT)
    looked_at = cases[::step][:LOOKED_AT]
    seen: set[int] = set()
    broken: list[VolumeError] = []
    for case in looked_at:
        assert case.mask is not None
        try:
            volume, _ = nifti.Reader().volume(case.mask)
            seen |= {int(value) for value in np.unique(label_map(volume, case.mask))}
        except VolumeError as error:  # it stops a training later, and doctor lists it among the others
            broken.append(error)
    if len(broken) == len(looked_at):
        raise broken[0]
    regions, sentence = regions_of(seen, f"{len(looked_at)} of {len(cases)} label maps")
    found.notes.append(sentence)
    return regions


def find_cases(root: Path, modalities: Sequence[str]) -> list[Case]:
    """Return the cases of a folder or a table to predict on, each with those of `modalities` that it has.

    Raises:
        UserError: there is no case with any of the modalities.
    """
    names = checked(modalities)
    found = _found(root, None)
    cases = [
        replace(case, images={name: case.images[name] for name in names if name in case.images}, mask=None)
        for case in found.cases
    ]
    cases = [case for case in cases if case.images]
    if not cases:
        raise UserError(f"{root} holds no case with any of the modalities {', '.join(names)}")
    return cases


def find_case(path: Path | Sequence[Path], modalities: Sequence[str]) -> Case:
    """Return one case to predict on: a folder, its files, or one 4-D file with `modalities` as its channels.

    Modalities that are not there are absent from the case. The channels of a Decathlon's file are named by the
    `dataset.json` above it. A label map that lies in the folder is the case's mask. Its split is test.

    Raises:
        UserError: a path does not exist, a file is of no modality, two are of the same, or none is there.
    """
    names = checked(modalities)
    files = _files(path)
    endings = Endings(names)
    held: dict[str, VolumeFile] = {}
    prefixes: set[str] = set()
    for file in files:
        bare = stem(file.name)
        splits = None if bare is None else endings.split(bare)
        if bare is None:
            raise UserError(f"{file} is no .nii or .nii.gz file")
        if splits is None and len(files) == 1:
            return _one_file(file, bare, names)
        if splits is None:
            if isinstance(path, Path):  # a folder may hold more than the model wants
                continue
            raise UserError(f"{file}: the name ends in none of {', '.join(names)}; rename it as CASE_{names[0]}.nii.gz")
        prefix, kind = splits
        if kind in held:
            raise UserError(f"{held[kind].path} and {file} are both {kind}; give the files of one case")
        held[kind] = VolumeFile(file)
        prefixes |= {prefix} - {""}
    place = path if isinstance(path, Path) else files[0].parent
    if not set(held) - {MASK}:
        raise UserError(
            f"{place} holds none of the modalities {', '.join(names)}; files are named CASE_{names[0]}.nii.gz"
        )
    if len(prefixes) > 1 and place.name not in prefixes:
        raise UserError(f"{place} holds files of several cases ({', '.join(sorted(prefixes)[:4])}); give those of one")
    case = place.name if place.name in prefixes or not prefixes else prefixes.pop()
    mask = held.pop(MASK, None)
    return Case(case, {name: held[name] for name in names if name in held}, mask, patient_of(case), "test")


def _files(path: Path | Sequence[Path]) -> list[Path]:
    paths = [path] if isinstance(path, Path) else list(path)
    for one in paths:
        if not one.exists():
            raise UserError(f"{one} does not exist; check the path")
    if len(paths) == 1 and paths[0].is_dir():
        return [file for file in sorted(paths[0].iterdir()) if stem(file.name) and not file.name.startswith(".")]
    return paths


def _one_file(file: Path, bare: str, names: tuple[str, ...]) -> Case:
    """Return the case of a single file whose name says no modality."""
    shape = nifti.read_header(file).shape
    channels = shape[3] if len(shape) == 4 else 1
    released = file.parent.parent / LIST
    if released.is_file() and len(channel_names(read_list(released), released)) == channels:
        order = channel_names(read_list(released), released)
    elif channels == len(names):
        order = list(names)
    else:
        sides = " x ".join(map(str, shape))
        raise UserError(
            f"{file}: {sides} voxels, {channels} channel{'s' * (channels > 1)} for {len(names)} modalities "
            f"({', '.join(names)}); give a 4-D file with these in order, or files named CASE_{names[0]}.nii.gz"
        )
    wanted = {plain(name): name for name in names}
    images = {
        wanted[plain(name)]: VolumeFile(file, channel if channels > 1 else None)
        for channel, name in enumerate(order)
        if plain(name) in wanted
    }
    if not images:
        raise UserError(f"{file} holds {', '.join(order)}, and none of the modalities {', '.join(names)}")
    return Case(bare, {name: images[name] for name in names if name in images}, None, patient_of(bare), "test")

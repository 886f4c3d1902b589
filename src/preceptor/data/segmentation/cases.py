"""Read volumes with label maps: BraTS of any year, BIDS, the Decathlon, nnU-Net, a table, or named files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data import nifti
from preceptor.data.dicom_series import holds_series
from preceptor.data.findings import Finding
from preceptor.data.identity import group_by_content, unused_patients
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.decathlon import (
    LIST,
    channel_names,
    find_decathlon,
    find_image_folder,
    find_test_cases,
    holds_images,
    read_list,
)
from preceptor.data.segmentation.folders import list_volumes, listed
from preceptor.data.segmentation.layouts import (
    FoundCases,
    find_files,
    maybe_one_patient,
    named_as_brats,
    patient_of,
    patients_by_names,
)
from preceptor.data.segmentation.modalities import (
    MASK,
    FileNames,
    canonical_name,
    check_modalities,
    check_regions,
    contradicting_word,
    infer_regions,
    stem,
)
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import apply_split
from preceptor.data.segmentation.splits import cut_fold, cut_labelled, cut_splits, require_whole_patients
from preceptor.data.segmentation.table import FOLDER_NAMES, find_table, table_in
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
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
        notes, doubts = patients_by_names(cases)
        found.notes += notes
        found.findings += doubts
    if found.layout != "table" and (finding := maybe_one_patient(cases, root)):
        found.findings.append(finding)
    if split is not None and split_file is not None:
        raise UserError(f"data.split={split} cannot be combined with data.split_file={split_file}; set one to null")
    given = named_splits()[split] if split else split_file or (root if found.split_given else None)
    if given is not None and fold is not None:
        raise UserError(f"fold={fold} cannot be combined with the split of {split or given}; remove one of them")
    if split is not None or split_file is not None:
        assert given is not None
        key = "data.split" if split else "data.split_file"
        cases, split_by = apply_split(cases, given, found.findings, key=key), given.stem
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


def find_cases(root: Path, modalities: Sequence[str]) -> list[Case]:
    """Return the cases of a folder or a table to predict on, each with those of `modalities` that it has.

    Of a folder with a dataset.json, these are the test cases, if there are any. What was left out is a remark of the
    first case.

    Raises:
        UserError: there is no case with any of the modalities.
    """
    names = check_modalities(modalities)
    if root.is_file():
        found = find_table(root, names, complete=False, labels=False)
    elif (root / LIST).is_file():
        found = find_test_cases(root)
    elif holds_images(root):
        found = find_image_folder(root)
    else:
        found = find_files(root, names, complete=False)
    cases = [
        replace(case, images={name: case.images[name] for name in names if name in case.images}, mask=None)
        for case in found.cases
    ]
    cases = [case for case in cases if case.images]
    if not cases:
        raise UserError(f"{root} contains no case with any of the modalities {', '.join(names)}")
    cases[0] = replace(cases[0], remarks=tuple(f"In {root}: {finding.reason}." for finding in found.findings))
    return cases


def find_case(path: Path | Sequence[Path], modalities: Sequence[str]) -> Case:
    """Return a case to predict on, from a folder, from its files, or from one four-dimensional file.

    The images are NIfTI files and folders of a DICOM series. Missing modalities are absent from the case. The channels
    of a four-dimensional file are named by the `dataset.json` of the Decathlon in the folder above; without one they
    are `modalities`. A single file whose name contains no modality is that of a network with one modality, which is a
    remark; in a folder, it is refused. A label map `CASE_seg` becomes the mask of the case. The case is in the test
    split.

    Raises:
        UserError: a path does not exist, a name is unclear or has an unknown modality, a modality occurs twice, or
            there is none.
    """
    names = check_modalities(modalities)
    place, files = _files(path)
    parser = FileNames(names)
    case_files: dict[str, VolumeFile] = {}
    cases: set[str] = set()
    mask: VolumeFile | None = None
    unclear: dict[Path, tuple[str, str]] = {}
    unused: list[str] = []
    folder = path if isinstance(path, Path) and path.is_dir() and not holds_series(path) else None
    if folder is not None:
        nested, others = volumes_below(folder, names)
        if files and nested:
            raise UserError(
                f"{place} contains {files[0].name}, and its subfolders contain {listed(nested)}, which may be of other "
                "cases; give the folder of one case, or each image as MODALITY=PATH"
            )
        unused += others
    for file in files:
        bare = stem(file.name) or file.name
        parsed = parser.parse(bare, place.name)
        if parsed is None and len(files) == 1:
            return _one_file(file, bare, names, in_folder=folder is not None)
        if parsed is None:
            if isinstance(path, Path):  # a folder may contain other files
                unused.append(file.name)
                continue
            raise UserError(f"{file}: the name ends in none of {', '.join(names)}; rename it as CASE_{names[0]}.nii.gz")
        if parsed.kind == MASK:
            mask = mask if parsed.unclear else VolumeFile(file)
            continue
        if parsed.unclear:
            unclear[file] = parsed.kind, parsed.unclear
            continue
        if parsed.kind not in names:
            if isinstance(path, Path) and path.is_dir():
                unused.append(file.name)
                continue
            raise UserError(
                f"{file} is named as {parsed.kind}, and the name ends in none of {', '.join(names)}; rename it as "
                f"CASE_{names[0]}.nii.gz"
            )
        if parsed.kind in case_files:
            raise UserError(
                f"{case_files[parsed.kind].path} and {file} are both {parsed.kind}; give the files of one case, each "
                "with its modality, as MODALITY=FILE"
            )
        case_files[parsed.kind] = VolumeFile(file)
        cases.add(parsed.case or place.name)
    for file, (kind, reason) in unclear.items():
        if kind not in case_files and (kind in names or not isinstance(path, Path)):
            raise UserError(f"{file}: {reason}; give it as {kind}=FILE if it is {kind}, or rename it")
    if not case_files:
        raise UserError(
            f"{place} contains none of the modalities {', '.join(names)}; name the files CASE_{names[0]}.nii.gz, or "
            "give each as MODALITY=PATH"
        )
    if len(cases) > 1:
        raise UserError(f"{place} contains files of several cases ({', '.join(sorted(cases)[:4])}); give those of one")
    case = cases.pop()
    unused += [file.name for file in unclear]
    remarks = (f"Not used, by their names: {listed(unused)}.",) if unused else ()
    images = {name: case_files[name] for name in names if name in case_files}
    return Case(case, images, mask, patient_of(case), "test", remarks=remarks)


def volumes_below(folder: Path, modalities: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the volumes in the subfolders of a case's folder: those named as one of `modalities`, and the others.

    A DICOM series in a subfolder of the folder is an image of the case itself, and not among them.
    """
    listing, parser = list_volumes(folder), FileNames(modalities)
    images: list[str] = []
    others: list[str] = []
    for path in sorted([*listing.volumes, *listing.series]):
        if folder in (path, path.parent):
            continue
        name = stem(path.name) if path in listing.volumes else None
        parsed = parser.parse(name or path.name, path.parent.name)
        named = parsed is not None and not parsed.unclear and parsed.kind in modalities
        (images if named else others).append(path.relative_to(folder).as_posix())
    return images, others


def _files(path: Path | Sequence[Path]) -> tuple[Path, list[Path]]:
    """Return the folder of a case, and its NIfTI files and folders of DICOM series."""
    paths = [path] if isinstance(path, Path) else list(path)
    for file in paths:
        if not file.exists():
            raise UserError(f"{file} does not exist; check the path")
        if not file.is_dir() and stem(file.name) is None:
            raise UserError(f"{file} is not a .nii or .nii.gz file or a folder of a DICOM series")
    if len(paths) == 1 and paths[0].is_dir() and not holds_series(paths[0]):
        folder = paths[0]
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        return folder.resolve(), [e for e in entries if (holds_series(e) if e.is_dir() else stem(e.name) is not None)]
    return paths[0].resolve().parent, paths


def _one_file(file: Path, bare: str, names: tuple[str, ...], *, in_folder: bool) -> Case:
    """Return the case of a single file whose name ends in no modality.

    Raises:
        UserError: the number of channels is another one, or the file may be something else: it has one channel and was
            found in a folder, or its name contains a word that contradicts the modality.
    """
    # Whoever reads the voxels compares their number with the limit.
    shape = (0, 0, 0) if file.is_dir() else nifti.read_header(file, max_voxels=sys.maxsize)[1]
    channels = shape[3] if len(shape) == 4 else 1
    dataset_json = file.parent.parent / LIST
    remarks: tuple[str, ...] = ()
    if dataset_json.is_file() and len(channel_names(read_list(dataset_json), dataset_json)) == channels:
        order = channel_names(read_list(dataset_json), dataset_json)
    elif channels == len(names) > 1:
        order = list(names)
        remarks = (
            f"Nothing names the channels of {file.name}, so they were taken as {', '.join(names)}, in the order of the "
            "network.",
        )
    elif channels == len(names):
        order = list(names)
        word = contradicting_word(bare, names)
        if in_folder or word:
            doubt = (
                f"may be another image, because its name contains {word!r}" if word else "does not name its modality"
            )
            raise UserError(f"{file} {doubt}; give it as {names[0]}=PATH if it is {names[0]}, or rename it")
        remarks = (f"The name of {file.name} does not end in a modality, so it was taken as {names[0]}.",)
    else:
        content = "a DICOM series" if file.is_dir() else f"{' x '.join(map(str, shape))} voxels"
        raise UserError(
            f"{file} has {content} and {channels} channel{'s' * (channels > 1)} for {len(names)} modalities "
            f"({', '.join(names)}), and its name is none of them; give it as MODALITY=PATH, or rename it as "
            f"CASE_{names[0]}.nii.gz, or give a 4-D file with all modalities in order"
        )
    wanted = {canonical_name(name): name for name in names}
    images = {
        wanted[canonical_name(name)]: VolumeFile(file, channel if channels > 1 else None)
        for channel, name in enumerate(order)
        if canonical_name(name) in wanted
    }
    if not images:
        raise UserError(f"{file} contains {', '.join(order)}, but none of the modalities {', '.join(names)}")
    present = {name: images[name] for name in names if name in images}
    return Case(bare, present, None, patient_of(bare), "test", remarks=remarks)


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

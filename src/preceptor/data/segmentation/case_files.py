"""Find the images of cases to predict on: in a folder, a table, the files of a case, or one 4-D file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from preceptor.arguments import as_list, as_path
from preceptor.data import nifti
from preceptor.data.dicom_series import holds_series
from preceptor.data.segmentation.decathlon import (
    LIST,
    channel_names,
    find_image_folder,
    find_test_cases,
    holds_images,
    read_list,
)
from preceptor.data.segmentation.folders import foreign_stem, list_volumes, listed
from preceptor.data.segmentation.layouts import find_files, patient_of
from preceptor.data.segmentation.modalities import (
    MASK,
    FileNames,
    canonical_name,
    check_modalities,
    contradicting_word,
    spelled_as,
    stem,
)
from preceptor.data.segmentation.table import find_table
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError

CaseSource = str | Path | Mapping[str, str | Path] | Sequence[str | Path] | Case


def holds_one_case(path: Path, modalities: Sequence[str]) -> bool:
    """Return whether a path is a NIfTI file, a DICOM series, or a folder with the images of a single case in it."""
    if not path.is_dir() or holds_series(path):
        return not path.is_file() or stem(path.name) is not None
    if (path / LIST).is_file() or holds_images(path):
        return False
    parser = FileNames(modalities)
    names = [entry.name if holds_series(entry) else stem(entry.name) for entry in path.iterdir()]
    found = [parser.parse(name, path.name) for name in names if name is not None]
    cases = {parsed.case or path.name for parsed in found if parsed is not None}
    return len(cases) == 1 and not volumes_below(path, modalities)[0]


def as_case(source: CaseSource, modalities: Sequence[str]) -> Case:
    """Return the case of images by modality, a folder, a list of files or one 4-D file.

    The modalities of a mapping may have any of their names. Raises UserError for a modality that the network does not
    know, for two names of one modality, and for what is no path.
    """
    if isinstance(source, Case):
        return source
    if isinstance(source, Mapping):
        source = dict(zip(spelled_as(modalities, source), source.values(), strict=True))
        unknown = sorted(set(source) - set(modalities))
        if unknown:
            raise UserError(f"{unknown[0]} is not a modality of this network; it knows {', '.join(modalities)}")
        if not source:
            raise UserError(f"no file was given; give at least one of {', '.join(modalities)}")
        files = {name: VolumeFile(as_path(source[name], name)) for name in modalities if name in source}
        id = _id_of(next(iter(files.values())).path.absolute())
        return Case(id, files, None, id, "test")
    paths = [as_path(file, "a file of the case") for file in as_list(source, "case")]
    if not paths:
        raise UserError("no file was given; give the files of a case, or its folder")
    return find_case(paths[0] if isinstance(source, str | os.PathLike) else paths, modalities)


def _id_of(path: Path) -> str:
    """Return the id of a case that is given by its images: the name of a file without .nii.gz, or of a folder."""
    if not path.is_dir():
        return stem(path.name) or path.name
    parsed = FileNames().parse(path.name)
    return path.parent.name if parsed is not None and not parsed.case else path.name  # the folder `t1` of a case


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
    cases = [replace(case, images=_named_as(names, case.images), mask=None) for case in found.cases]
    cases = [case for case in cases if case.images]
    if not cases:
        raise UserError(f"{root} contains no case with any of the modalities {', '.join(names)}")
    cases[0] = replace(cases[0], remarks=tuple(f"In {root}: {finding.reason}." for finding in found.findings))
    return cases


def _named_as(names: Sequence[str], images: Mapping[str, VolumeFile]) -> dict[str, VolumeFile]:
    """Return the images of the modalities `names` under these names; an image may have an alias of one."""
    known = {canonical_name(name): image for name, image in images.items()}
    return {name: known[canonical_name(name)] for name in names if canonical_name(name) in known}


def find_case(path: Path | Sequence[Path], modalities: Sequence[str]) -> Case:
    """Return a case to predict on, from a folder, from its files, or from one four-dimensional file.

    The images are NIfTI files and folders of a DICOM series. Missing modalities are absent from the case. The channels
    of a four-dimensional file are named by the `dataset.json` of the Decathlon in the folder above; without one they
    are `modalities`. A single file whose name contains no modality is that of a network with one modality, which is a
    remark; in a folder, it is refused. A label map `CASE_seg` becomes the mask of the case. The case is in the test
    split.

    Raises:
        UserError: a path does not exist, a name is unclear or has an unknown modality, a modality occurs twice, is
            there in a format that is not read alone, or there is none.
    """
    names = check_modalities(modalities)
    place, files = _files(path)
    parser = FileNames(names)
    case_files: dict[str, VolumeFile] = {}
    cases: set[str] = set()
    mask: VolumeFile | None = None
    unclear: dict[Path, tuple[str, str]] = {}
    unused: list[str] = []
    foreign: list[Path] = []
    folder = path if isinstance(path, Path) and path.is_dir() and not holds_series(path) else None
    if folder is not None:
        nested, others, foreign = volumes_below(folder, names)
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
            case = _one_file(file, bare, names, in_folder=folder is not None)
            return replace(case, remarks=(*case.remarks, *_not_used(unused, foreign)))
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
    for file in foreign:
        parsed = parser.parse(foreign_stem(file.name) or file.name, file.parent.name)
        if parsed is not None and parsed.kind in names and parsed.kind not in case_files:
            raise UserError(
                f"{file} is named as {parsed.kind}, but is in a format that is not read; convert it to .nii.gz"
            )
    if not case_files:
        raise UserError(
            f"{place} contains none of the modalities {', '.join(names)}; name the files CASE_{names[0]}.nii.gz, or "
            "give each as MODALITY=PATH"
        )
    if len(cases) > 1:
        raise UserError(f"{place} contains files of several cases ({', '.join(sorted(cases)[:4])}); give those of one")
    id = cases.pop()
    unused += [file.name for file in unclear]
    images = {name: case_files[name] for name in names if name in case_files}
    return Case(id, images, mask, patient_of(id), "test", remarks=_not_used(unused, foreign))


def _not_used(unused: Sequence[str], foreign: Sequence[Path]) -> tuple[str, ...]:
    """Return remarks on the files of a folder that are not used by their names, and by their formats."""
    by_format = f"Not used, as their formats are not read: {listed([file.name for file in foreign])}."
    by_name = f"Not used, by their names: {listed(unused)}."
    return (by_name,) * bool(unused) + (by_format,) * bool(foreign)


def volumes_below(folder: Path, modalities: Sequence[str]) -> tuple[list[str], list[str], list[Path]]:
    """Return the volumes in the subfolders of a case's folder: those named as one of `modalities`, and the others.

    Third are the volumes in formats that are not read, in the folder and its subfolders. A DICOM series in a subfolder
    of the folder is an image of the case itself, and not among the first two.
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
    return images, others, listing.foreign


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
    channels = nifti.count_channels(shape)
    dataset_json = file.parent.parent / LIST
    order = channel_names(read_list(dataset_json), dataset_json) if dataset_json.is_file() else []
    remarks: tuple[str, ...] = ()
    if order and len(order) == channels:
        pass  # the list names the channels
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
    files = {name: VolumeFile(file, channel if channels > 1 else None) for channel, name in enumerate(order)}
    images = _named_as(names, files)
    if not images:
        raise UserError(f"{file} contains {', '.join(order)}, but none of the modalities {', '.join(names)}")
    return Case(bare, images, None, patient_of(bare), "test", remarks=remarks)

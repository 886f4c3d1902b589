"""Find the cases in a folder: NIfTI files and DICOM series named after case and modality, as in BraTS and BIDS."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.groups import merge_groups, names_patient
from preceptor.data.segmentation.folders import Listing, list_volumes, listed
from preceptor.data.segmentation.modalities import (
    KNOWN,
    MASK,
    FileNames,
    ParsedName,
    names_mask,
    sort_modalities,
    stem,
    words_of,
)
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError

# The label map of case 355 of BraTS 2020, as released.
BRATS_MISNAMED = "W39_1998.09.19_Segm"
_BRATS_2023 = r"BraTS-[A-Za-z]+-\d+-\d+"
_BRATS = (_BRATS_2023, r"BraTS\d\d(\d\d)?_.+")


@dataclass
class FoundCases:
    """The cases in a folder or table, all in the training split, and what is known about them.

    Attributes:
        layout: Name of the layout, for messages.
        modalities: Modalities in order.
        cases: The cases.
        regions: Label values of each region, if the layout defines them.
        split_given: Whether the layout assigns cases to splits.
        group_given: Whether the layout assigns cases to patients.
        notes: Sentences to print with the results.
        findings: Files that were not used, and other doubts.
        maybe_masks: Names of files that were left out and may be label maps.
        patients: Cells of a column that names patients and is not used, by case, with the name of the column.
        unread_splits: Findings on columns that contain names of splits and are not read.
    """

    layout: str
    modalities: tuple[str, ...]
    cases: list[Case]
    regions: dict[str, tuple[int, ...]] | None = None
    split_given: bool = False
    group_given: bool = False
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    maybe_masks: list[str] = field(default_factory=list)
    patients: dict[str, dict[str, Any]] = field(default_factory=dict)
    unread_splits: list[Finding] = field(default_factory=list)


_FORMATS = (
    r"(BraTS-[A-Za-z]+-\d+)-\d+",
    r"(BraTS-MEN-RT-\d+)-\d+",
    r"(Brats1[789]_.+_.+)_\d+",
    r"(UPENN-GBM-\d+)_\d\d",
    r"(UCSF-PDGM-\d+)_FU\d+d",
    r"(\d{6})[A-Z]",
    r"(OAS\d_\d{4}|OAS\d{5})_.+",
    r"(sub-[A-Za-z0-9+]+)_ses-[A-Za-z0-9+]+",
)
"""Ids of cases that contain a patient: BraTS, UPENN-GBM, UCSF-PDGM, UCSF-BMSR (100101A), OASIS and BIDS."""

_VISITS = (
    r"(.*\d.*?)[_\-. ]+(?:ses|session|visit|tp|timepoint|time|day|week|wk|month|year|fu|followup)[_\-]?\d+[a-z]?",
    r"(.*\d.*?)[_\-. ]+(?:baseline|bl|followup|fu|preop|postop)",
)
"""Ids of cases that end in a word for a visit."""

MOST_SCANS = 10
"""Number of cases that names may give one patient without a finding."""
MEAN_SCANS = 4
"""Largest mean number of cases in folders, or with similar names, that may be those of one patient each."""


def patient_of(case: str) -> str:
    """Return the patient in the id of a case.

    The patient is known if the id has the form of a published data set (BraTS-GLI-00001-000, UPENN-GBM-00001_11,
    OAS30001_MR_d0129, sub-01_ses-1 of BIDS), ends in a word for a visit (p7_visit1), or begins with a word for a person
    and a number, before another word (pat7_scan1). Otherwise, the case is its own patient.
    """
    if match := _match((*_FORMATS, *_VISITS), case):
        return match[1]
    named = re.match(r"(([A-Za-z]+)[_\-. ]?\d+)[_\-. ]+[A-Za-z]", case)
    return named[1] if named and (names_patient(named[2]) or named[2].lower() == "p") else case


def _match(patterns: Sequence[str], case: str) -> re.Match[str] | None:
    matches = (re.fullmatch(pattern, case, re.IGNORECASE) for pattern in patterns)
    return next((match for match in matches if match), None)


def patients_by_names(cases: Sequence[Case]) -> tuple[list[str], list[Finding]]:
    """Return a note on the cases that `patient_of` gives one patient, and findings on patients that are implausible.

    These are patients with more than 10 cases, and one patient who has all the cases, unless the id of a published data
    set tells the patient.
    """
    patients: defaultdict[str, list[str]] = defaultdict(list)
    for case in cases:
        patients[patient_of(case.id)].append(case.id)
    several = {patient: ids for patient, ids in patients.items() if len(ids) > 1}
    if not several:
        return [], []
    first = " and ".join(next(iter(several.values()))[:2])
    note = (
        f"{sum(map(len, several.values()))} cases are taken for scans of {len(several)} "
        f"patient{'s' * (len(several) > 1)} by their names, such as {first}; all cases of a patient are in one split."
    )
    findings = [
        Finding(
            tuple(ids),
            None,
            f"{len(ids)} cases are taken for scans of one patient by their names, such as {' and '.join(ids[:2])}; if "
            "they are of different patients, write a table with a column group",
            "warning",
        )
        for ids in several.values()
        if (len(ids) > MOST_SCANS or len(patients) == 1) and not _match(_FORMATS, ids[0])
    ]
    return [note], findings


_COLLECTIONS = {*SPLIT_NAMES, "hgg", "lgg", "imagestr", "imagests", "images", "data"}
"""Names, in lower case, of folders of cases that are not a patient."""


def patients_by_folders(folders: Collection[Path], root: Path) -> dict[Path, str] | None:
    """Return the patient of each case, by the folder of the case, if the folders above it tell the patient, or None.

    These are the highest folders below `root` that are all named as persons (PAT001), or else those that hold at most
    ten cases each and four on average. Every case must have one. Folders such as HGG and train are no patients.
    """
    above = {
        folder: [part for part in folder.relative_to(root).parts[:-1] if part.lower() not in _COLLECTIONS]
        for folder in folders
    }
    depths = range(1, 1 + min(map(len, above.values()), default=0))
    levels = [{folder: "/".join(parts[:depth]) for folder, parts in above.items()} for depth in depths]
    return next(filter(_are_persons, levels), None) or next(filter(_are_few, levels), None)


def _are_persons(patients: Mapping[Path, str]) -> bool:
    names = (re.match(r"([A-Za-z]+)[_\-. ]?\d", patient.rpartition("/")[2]) for patient in patients.values())
    return all(name and (names_patient(name[1]) or name[1].lower() == "p") for name in names)


def _are_few(patients: Mapping[Path, str]) -> bool:
    sizes = Counter(patients.values())
    return len(sizes) > 1 and max(sizes.values()) <= MOST_SCANS and len(patients) <= MEAN_SCANS * len(sizes)


def _notes_on_folders(
    folders: Mapping[str, Path], patients: Mapping[str, str], root: Path
) -> tuple[list[str], list[Finding]]:
    """Return a note on the cases, by name, that their folders give one patient, or a finding if they may do so."""
    above: defaultdict[str, list[str]] = defaultdict(list)
    for case, folder in folders.items():
        parent = folder.parent
        if patients or (parent != root and parent.name.lower() not in _COLLECTIONS):
            above[patients.get(case, parent.relative_to(root).as_posix())].append(case)
    several = {name: cases for name, cases in above.items() if len(cases) > 1}
    count = sum(map(len, several.values()))
    if not several:
        return [], []
    name, cases = next(iter(several.items()))
    example = f"such as {cases[0]} and {cases[1]} in {name}"
    if patients:
        return [
            f"{count} cases are taken for scans of {len(several)} patient{'s' * (len(several) > 1)} by the folders "
            f"above them, {example}; all cases of a patient are in one split."
        ], []
    if len(above) == 1 or all(_match((*_FORMATS, *_BRATS), case) for case in folders):
        return [], []
    reason = (
        f"{count} cases are in folders with other cases, {example}, and are taken for different patients; if such a "
        "folder holds the scans of one patient, write a table with a column patient_id"
    )
    return [], [Finding(tuple(case for cases in several.values() for case in cases), None, reason, "warning")]


def maybe_one_patient(cases: Sequence[Case], root: Path) -> Finding | None:
    """Return a finding if cases seem to be scans of one patient and are in different groups, or None.

    These are cases in one subfolder, and cases whose names differ only in a word, a number or a letter after a number,
    if there are at most four for each folder or name on average. Cases with folders of their own are not meant (see
    `patients_by_folders`).
    """
    folders: defaultdict[str, list[Case]] = defaultdict(list)
    names: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        parents = {file.path.parent for file in case.images.values()}
        parent = parents.pop()
        if not parents and parent not in (root, *root.parents) and parent.name.lower() != case.id.lower():
            folders[str(parent)].append(case)
        if match := re.fullmatch(r"(.*\d)(?:[_\-. ]+[A-Za-z]*[_\-. ]*\d*[A-Za-z]?|[A-Za-z])", case.id):
            names[match[1]].append(case)
    for kin, what in (
        (folders, "are in one folder"),
        (names, "have names that differ only in the last number or word"),
    ):
        several = [group for group in kin.values() if len({case.group for case in group}) > 1]
        if several and len(kin) > 1 and sum(map(len, kin.values())) <= MEAN_SCANS * len(kin):
            ids = tuple(case.id for group in several for case in group)
            reason = (
                f"{len(ids)} cases {what} with another case, such as {' and '.join(c.id for c in several[0][:2])}, and "
                "are taken for different patients; if they are scans of one patient, write a table with a column "
                "patient_id, or add visit1, visit2 ... to their names"
            )
            return Finding(ids, None, reason, "warning")
    return None


def named_as_brats(cases: Sequence[Case]) -> int | None:
    """Return the label of the enhancing tumour (4 until 2021, then 3) if all cases are named as in BraTS, else None."""
    if cases and all(re.fullmatch(_BRATS_2023, case.id, re.IGNORECASE) for case in cases):
        return 3
    named = all(re.fullmatch("|".join(_BRATS), case.id, re.IGNORECASE) for case in cases)
    return 4 if cases and named else None


def find_files(
    root: Path,
    modalities: tuple[str, ...] | None,
    mask: str | None = None,
    used: Collection[str] = (),
    *,
    complete: bool = True,
) -> FoundCases:
    """Find ``case_modality.nii.gz`` files and folders of DICOM series, in one folder or in subfolders.

    These are the layouts of BraTS of any year and of BIDS. The contrast is that of the file name, for a DICOM series
    that of the name of its folder.

    Args:
        root: The folder.
        modalities: Inputs of the network. Default: the known modalities that are found.
        mask: End of the file names of label maps. Default: `seg`.
        used: Names of files in the folder that are read elsewhere.
        complete: Whether each of `modalities` must be found.

    Raises:
        UserError: no modality is found, a case has two files of one modality, or two cases differ in case only.
    """
    listing = list_volumes(root, used)
    names = FileNames(modalities, mask)
    files, unclear, unknown, folders, patients = _assign(listing, names, root)
    wanted = set(KNOWN) | set(names.names.values()) if modalities is None else set(modalities)
    found_names = {kind for by_kind in files.values() for kind in by_kind} - {MASK}
    if not found_names & wanted:
        raise UserError(_nothing_found(root, modalities, unclear, unknown))
    if complete:
        _require_all(modalities, found_names, root)
    lower = defaultdict(list)
    for case in files:
        lower[case.lower()].append(case)
    for spellings in lower.values():
        if len(spellings) > 1:
            raise UserError(
                f"{root}: the cases {' and '.join(spellings)} differ only in upper and lower case; rename their files"
            )
    alone = [path for by_kind in files.values() for kind, path in by_kind.items() if set(by_kind) == {MASK}]
    listing.add(alone, "{} label maps were left out, because their cases have no image", root)
    rest = sorted(found_names - wanted)
    cases = [
        _case(case, {k: path for k, path in by_kind.items() if k in wanted or k == MASK}, root, patients.get(case))
        for case, by_kind in sorted(files.items())
        if set(by_kind) & wanted
    ]
    # A patient that its name tells may be in several folders.
    cases = merge_groups(cases, lambda case: [patient_of(case.id)])
    found = FoundCases("files by case", modalities or sort_modalities(found_names & wanted), cases)
    used_folders = {case.id: folders[case.id] for case in cases if case.id in folders}
    found.notes, found.findings = _notes_on_folders(used_folders, patients, root)
    if rest:
        found.notes.append(f"Images of the contrasts {', '.join(rest)} are not used (data.modalities).")
    if listing.others:
        hidden = [path.relative_to(root).as_posix() for path in listing.others]
        found.notes.append(f"{len(hidden)} hidden files or files that are not volumes were ignored: {listed(hidden)}.")
    if unclear:
        doubts = listed([f"{path.relative_to(root).as_posix()} ({reason})" for path, reason in unclear.items()])
        reason = f"{len(unclear)} images were left out, because their names are unclear: {doubts}; rename them"
        listing.findings.append(Finding((), None, reason, "warning"))
    listing.add(
        unknown,
        "{} NIfTI files or DICOM series were left out, because their names end in none of the modalities "
        f"({', '.join(sorted(wanted))})",
        root,
    )
    found.findings = [*listing.findings, *found.findings]
    unused = [*unclear, *unknown, *alone]
    found.maybe_masks = [path.name for path in unused if any(map(names_mask, words_of(stem(path.name) or path.name)))]
    if not found.maybe_masks and not any(case.mask for case in cases):
        found.maybe_masks = [path.name for path in unused]
    return found


def _assign(
    listing: Listing, names: FileNames, root: Path
) -> tuple[dict[str, dict[str, Path]], dict[Path, str], list[Path], dict[str, Path], dict[str, str]]:
    """Return the files by case and kind, the files with unclear names and why, and those with unknown names.

    Then follow the folders of the cases that are named after them, and the patients of cases by `patients_by_folders`.
    If several folders of cases have one name, that of a case begins with the folders above it.

    Raises:
        UserError: two files are the same kind of one case.
    """
    files: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    unclear: dict[Path, str] = {}
    unknown: list[Path] = []
    by_folder: defaultdict[Path, list[tuple[ParsedName, Path]]] = defaultdict(list)
    for path in sorted([*listing.volumes, *listing.series]):
        name = stem(path.name) if path in listing.volumes else path.name
        parsed = names.parse(name or path.name, path.parent.name)
        if name == BRATS_MISNAMED:
            parsed = ParsedName("", MASK)
        if path == root or parsed is None:
            unknown.append(path)
        else:
            by_folder[path.parent].append((parsed, path))
    # A folder with the name of its files is a case, and so is one whose files are named by the contrast alone.
    own = {
        folder: {parsed.kind for parsed, _ in entries}
        for folder, entries in by_folder.items()
        if folder != root and any(parsed.case in ("", folder.name) for parsed, _ in entries if not parsed.bids)
    }
    names_of, patient_of_folder = _cases_of_folders(own, root, whole=len(own) == len(by_folder))
    folders: dict[str, Path] = {}
    patients: dict[str, str] = {}
    bids = set()
    for folder, entries in by_folder.items():
        for parsed, path in entries:
            is_own = folder in own and not parsed.bids
            case = unicodedata.normalize("NFC", parsed.case or folder.resolve().name)
            if parsed.unclear:
                unclear[path] = parsed.unclear
                continue
            if is_own and parsed.case not in ("", folder.name):
                unclear[path] = f"it does not begin with the case {folder.name}"
                continue
            if is_own:
                case = names_of.get(folder, case)
                folders[case] = folder
                if folder in patient_of_folder:
                    patients[case] = patient_of_folder[folder]
            if parsed.kind in files[case] and not parsed.case and files[case][parsed.kind].parent != folder:
                raise UserError(
                    f"{files[case][parsed.kind]} and {path} are both named after their folder {folder.name}, so that "
                    f"their cases have one name; rename the files as CASE_{parsed.kind}.nii.gz, or write a table "
                    "(docs/how-to/volumes.md)"
                )
            if parsed.kind in files[case]:
                raise UserError(
                    f"case {case}: {files[case][parsed.kind]} and {path} are both its {parsed.kind}; keep one, or set "
                    f"{'data.mask' if parsed.kind == MASK else 'data.modalities'} to the longer end of its name"
                )
            files[case][parsed.kind] = path
            bids |= {case} if parsed.bids else set()
    for case in list(files):
        extra = None if case in bids else _extra_words(case, files)
        if extra:
            for path in files.pop(case).values():
                unclear[path] = f"{extra} may be part of the case or change the image"
    return {case: by_kind for case, by_kind in files.items() if by_kind}, unclear, unknown, folders, patients


def _cases_of_folders(
    own: Mapping[Path, set[str]], root: Path, *, whole: bool
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Return the names of cases that need more than that of their folder, and the patients, both by folder.

    `own` are the folders of cases with the kinds of their files, `whole` whether all files are in one of these.
    """
    kinds: defaultdict[Path, set[str]] = defaultdict(set)
    for folder, its_kinds in own.items():
        kinds[folder.parent] |= its_kinds
    is_parallel = sum(map(len, kinds.values())) == len(set().union(*kinds.values()))  # images/CASE and labels/CASE
    formats = all(_match((*_FORMATS, *_BRATS), folder.name) for folder in own)
    patients = None if formats or not whole or is_parallel else patients_by_folders(own, root)
    has_own_names = len({folder.name.lower() for folder in own}) == len(own)
    if patients is None or (has_own_names and len(set(patients.values())) == len(own)):
        return {}, {}
    if has_own_names:
        return {}, patients
    parts = {
        folder: [part for part in folder.relative_to(root).parts if part.lower() not in _COLLECTIONS] for folder in own
    }
    return {folder: unicodedata.normalize("NFC", "_".join(name)) for folder, name in parts.items()}, patients


def _extra_words(case: str, cases: Mapping[str, object]) -> str:
    """Return the words by which the name of a case is longer than another one, if they have letters only, or ""."""
    shorter = case
    while match := re.fullmatch(r"(.+)[_\-.\s]([A-Za-z]+)", shorter):
        shorter = match[1]
        if shorter in cases:
            return case[len(shorter) + 1 :]
    return ""


def _nothing_found(
    root: Path, modalities: Sequence[str] | None, unclear: Mapping[Path, str], unknown: Sequence[Path]
) -> str:
    wanted = "flair, t1, t1ce, t2, ct, pet ..." if modalities is None else ", ".join(modalities)
    hint = "".join(f"; {path.name}: {reason}" for path, reason in list(unclear.items())[:3])
    endings = dict.fromkeys(words_of(stem(path.name) or path.name)[-1] for path in unknown if words_of(path.name))
    hint += f"; the names end in {', '.join(list(endings)[:6])}" if endings else ""
    return (
        f"{root} contains no .nii or .nii.gz file or DICOM folder named CASE_MODALITY with one of {wanted}{hint}; set "
        "data.modalities to the modalities in the file names, or write a table (docs/how-to/volumes.md); to predict, "
        "you can also give MODALITY=PATH"
    )


def _case(name: str, files: Mapping[str, Path], root: Path, patient: str | None) -> Case:
    images = {kind: VolumeFile(path) for kind, path in files.items() if kind != MASK}
    parents = {parent.upper() for path in files.values() for parent in path.relative_to(root).parts[:-1]}
    grade = parents & {"HGG", "LGG"}
    tags = {"grade": grade.pop()} if len(grade) == 1 else {}
    mask = VolumeFile(files[MASK]) if MASK in files else None
    return Case(name, images, mask, patient or patient_of(name), "train", tags)


def _require_all(modalities: Sequence[str] | None, names: set[str], root: Path) -> None:
    absent = [name for name in modalities or () if name not in names]
    if absent:
        raise UserError(
            f"{root}: no case has the modality {absent[0]!r}, only {', '.join(sorted(names))}; remove it from "
            "data.modalities, or check the file names"
        )

"""Decide which samples belong together: by columns that name the patient, and by the contents of files.

All tasks follow one rule. A column `group` decides, if the user gives one. Otherwise the columns that name a patient
decide, and samples that share the content of an image are in one group. Groups and splits may be given, so that groups
or images are in several splits: that is a finding (`note_leaks`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from preceptor.data.findings import Finding
from preceptor.data.identifying_columns import examination_columns as examination_columns
from preceptor.data.identifying_columns import identifier_findings, names_patient
from preceptor.data.identifying_columns import patient_columns as patient_columns
from preceptor.data.images import ImageError, content_hash
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.texts import as_identifier
from preceptor.data.texts import is_given as is_given
from preceptor.data.types import Case, Dataset, Dialogue, Sample, Split

Row = TypeVar("Row", Sample, Case, Dialogue)

_SAMPLED = 2**16
_LEAK = "Leaking split:"
_SPLITS = {*SPLIT_NAMES, "tr", "va", "te"}


def merge_groups(rows: Sequence[Row], keys: Callable[[Row], Iterable[Hashable]]) -> list[Row]:
    """Give rows that share a key, directly or through other rows, one group: the first of their names in order."""
    parent: dict[str, str] = {row.group: row.group for row in rows}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    first: dict[Hashable, str] = {}
    for row in rows:
        for key in keys(row):
            low, high = sorted((root(row.group), root(first.setdefault(key, row.group))))
            parent[high] = low
    return [replace(row, group=root(row.group)) for row in rows]


def images_of(row: Sample | Case | Dialogue) -> tuple[Path, ...]:
    """Return the image files of a sample of any task, each once. Label maps are not images.

    A DICOM series is a folder and gives all its files.
    """
    if isinstance(row, Sample):
        return (row.image,)
    if isinstance(row, Case):
        paths = dict.fromkeys(file.path for file in row.images.values())
        return tuple(file for path in paths for file in (sorted(path.glob("[!.]*")) if path.is_dir() else [path]))
    return tuple(dict.fromkeys(row.images))


def shared_contents(rows: Iterable[Sample | Case | Dialogue]) -> dict[Path, str]:
    """Return the SHA-256 of every image file whose content occurs under several names (see `equal_files`)."""
    return equal_files(path for row in rows for path in images_of(row))


def equal_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of every file whose content equals that of another one.

    A file is only read as a whole if its size and 64 KiB in its middle equal those of another file. Files that are
    empty or cannot be read are left out; training and `doctor` report them.
    """
    alike: defaultdict[Hashable, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        with suppress(OSError):
            alike[path.stat().st_size].append(path)
    alike.pop(0, None)
    for read in (_middle, content_hash):
        candidates = [path for paths in alike.values() if len(paths) > 1 for path in paths]
        alike = defaultdict(list)
        for path in candidates:
            with suppress(OSError, ImageError):
                alike[read(path)].append(path)
    return {path: str(digest) for digest, paths in alike.items() if len(paths) > 1 for path in paths}


def _middle(path: Path) -> tuple[int, bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size // 2 - _SAMPLED // 2))
        return size, hashlib.sha256(file.read(_SAMPLED)).digest()


def group_by_content(rows: Iterable[Row], notes: list[str] | None = None) -> list[Row]:
    """Give rows that share an image, by path or by content, one group. Readers call it before they cut splits.

    Args:
        rows: Samples of one data set.
        notes: A note on merged groups is appended here.
    """
    rows = list(rows)
    same = shared_contents(rows)
    merged = merge_groups(rows, lambda row: [same.get(path, path) for path in images_of(row)])
    fewer = len({row.group for row in rows}) - len({row.group for row in merged})
    if fewer and notes is not None:
        notes.append(f"Groups with an image in common were merged ({fewer} fewer groups).")
    return merged


def group_by_patient(
    rows: Sequence[Row], patients: Mapping[str, Mapping[str, str]], notes: list[str] | None = None
) -> list[Row]:
    """Return the rows with groups that follow the patient, for a table without a column `group`.

    Rows that share a patient in any column are in one group. A row without a patient keeps its group.

    Args:
        rows: Samples of one table.
        patients: Patient of each row, by the id of the row, by the name of the column (see `patient_columns`).
        notes: A note that names the columns is appended here.
    """
    names = [column for column, values in patients.items() if any(values.values())]
    if not names:
        return list(rows)
    if notes is not None:
        verb = "names" if len(names) == 1 else "name"
        notes.append(f"Groups follow the column{'s' * (len(names) > 1)} {' and '.join(names)}, which {verb} patients.")

    def keys(row: Row) -> list[tuple[str, str]]:
        return [(column, patients[column][row.id]) for column in names if patients[column].get(row.id)]

    return merge_groups([replace(row, group=next((name for _, name in keys(row)), row.group)) for row in rows], keys)


def note_leaks(data: Dataset[Row], *, published: bool = False) -> None:
    """Add a finding and a note if groups or images are in several splits, and mark the data as leaking.

    Images are equal if their paths or contents are. Unlabelled samples and those of the teacher count as training
    samples. Reasons contain counts and no names. The reader of VQA-RAD, which is published with a split by question,
    describes its shared images itself.

    Args:
        data: Samples with their splits.
        published: Whether the splits are those of a published data set. The finding is then a warning, because the user
            cannot change them.
    """
    same = shared_contents(data.samples)
    groups = _Crossings()
    images = _Crossings()
    for row in data.samples:
        groups.add(row.group, row)
        for path in images_of(row):
            images.add(same.get(path, path), row, path)
    for what, crossings in (("groups", groups), ("images", images)):
        keys = crossings.divided()
        if not keys:
            continue
        copies = sum(len(crossings.paths[key]) > 1 for key in keys)
        named = f" ({copies} of them under several names)" if copies else ""
        counts = f"{len(keys)} of {len(crossings.splits)} {what} are in more than one split{named}"
        ids = tuple(dict.fromkeys(id for key in keys for id in crossings.ids[key]))
        whose = " of the published data set" if published else ""
        reason = f"{_LEAK} {counts}{whose}, so that held-out scores are too high."
        data.leaking = True
        data.findings.append(Finding(ids, None, reason, "warning" if published else "error", leak=True))
        data.notes.append(reason)


def renew_leaks(data: Dataset[Row]) -> None:
    """Count leaks again after samples were left out, if `note_leaks` found some."""
    found = [finding for finding in data.findings if counts_crossings(finding)]
    if not found:
        return
    reasons = {finding.reason for finding in found}
    data.findings = [finding for finding in data.findings if finding not in found]
    data.notes = [note for note in data.notes if note not in reasons]
    data.leaking = False
    note_leaks(data, published=found[0].severity == "warning")


def counts_crossings(finding: Finding) -> bool:
    """Return whether a finding is one of `note_leaks`."""
    return finding.reason.startswith(_LEAK)


class _Crossings:
    """The splits, samples and files of every group or image."""

    def __init__(self) -> None:
        self.splits: defaultdict[Hashable, set[Split]] = defaultdict(set)
        self.ids: defaultdict[Hashable, list[str]] = defaultdict(list)
        self.paths: defaultdict[Hashable, set[Path]] = defaultdict(set)

    def add(self, key: Hashable, row: Sample | Case | Dialogue, path: Path | None = None) -> None:
        self.splits[key].add(_trained_on(row.split))
        self.ids[key].append(row.id)
        if path is not None:
            self.paths[key].add(path)

    def divided(self) -> list[Hashable]:
        return [key for key, splits in self.splits.items() if len(splits) > 1]


def _trained_on(split: Split) -> Split:
    return "train" if split in ("unlabelled", "teacher") else split


def unused_patients(column: str, values: Mapping[str, Any], rows: Sequence[Sample | Case | Dialogue]) -> Finding | None:
    """Return a finding for a column that may name patients and does not decide the groups, or None if it does no harm.

    It is an error for a column that names patients (see `names_patient`), and a warning for one that may name
    examinations (see `names_examination`).

    Args:
        column: Name of the column.
        values: Cell of each row, by the id of the row.
        rows: Rows after the splits were made.
    """
    splits: defaultdict[str, set[str]] = defaultdict(set)
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if is_given(values.get(row.id)):
            # Any value of a column that may be something else; the identifier of a patient must be one.
            patient = as_identifier(values[row.id], column) if names_patient(column) else str(values[row.id]).strip()
            splits[patient].add(_trained_on(row.split))
            ids[patient].append(row.id)
    divided = [patient for patient, its_splits in splits.items() if len(its_splits) > 1]
    if not divided:
        return None
    affected = tuple(id for patient in divided for id in ids[patient])
    if not names_patient(column):
        reason = (
            f"column {column!r} may name examinations or patients and does not decide the splits: {len(divided)} of "
            f"its {len(splits)} values are in several splits; if each value stands for one patient or examination, "
            "rename the column to group"
        )
        return Finding(affected, None, reason, "warning")
    reason = (
        f"column {column!r} names {len(splits)} patients and is not used, because the table has a column group; "
        f"{len(divided)} of them are in several splits, so that held-out scores are too high; delete the column group, "
        "or make it follow the patients"
    )
    return Finding(affected, None, reason, leak=True)


def ungrouped_images(rows: Sequence[Sample | Dialogue]) -> list[tuple[Path, Split]]:
    """Return the images of rows and their splits if no group has several images, otherwise an empty list."""
    images: defaultdict[str, set[Path]] = defaultdict(set)
    for row in rows:
        images[row.group].update(images_of(row))
    if any(len(paths) > 1 for paths in images.values()):
        return []
    return [(path, row.split) for row in rows for path in images_of(row)]


def folder_findings(images: Iterable[tuple[Path, Split]]) -> list[Finding]:
    """Return a warning if images of one folder, or of one name in folders of their own, are in several splits.

    A folder that contains all images does not count.

    Args:
        images: Image files of the rows for which neither a group nor a patient is given, with the splits of the rows.
    """
    splits: defaultdict[Path, set[Split]] = defaultdict(set)
    for path, split in images:
        splits[path].add(_trained_on(split))
    folders: defaultdict[Path, list[Path]] = defaultdict(list)
    names: defaultdict[str, list[Path]] = defaultdict(list)
    for path in splits:
        names[path.name].append(path)
        for folder in path.parents:
            folders[folder].append(path)
    alone = [[path for path in paths if len(folders[path.parent]) == 1] for paths in names.values()]
    alike = [*(paths for paths in folders.values() if len(paths) < len(splits)), *alone]
    if not any(len(set[Split]().union(*(splits[path] for path in paths))) > 1 for paths in alike if len(paths) > 1):
        return []
    repeated = sum(len(paths) > 1 for paths in names.values())
    reason = (
        f"no group and no patient is given for images in several folders ({repeated} file names occur in more than "
        "one); every image is a group of its own, so that a patient with several images may be in several splits; add "
        "group to the rows if a folder or name stands for a patient"
    )
    return [Finding((), None, reason, "warning")]


def unread_splits(column: str, values: Iterable[Any]) -> Finding | None:
    """Return a finding if the values of a column that is not read are names of several splits, otherwise None."""
    names = {str(value).strip().lower() for value in values if is_given(value)}
    if len(names) < 2 or not names <= _SPLITS:
        return None
    return Finding((), None, f"column {column!r} contains names of splits and is not read; rename it to split")


def column_findings(
    groups: Mapping[str, str],
    patients: Mapping[str, Mapping[str, str]],
    examinations: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Sample | Dialogue],
    *,
    by_row: bool = False,
) -> list[Finding]:
    """Return findings about the columns of a table that decide the groups, and about those that do not.

    Args:
        groups: Cells of the column `group` by the id of the row. If one is given, patients decide nothing.
        patients: Cells of the columns that name patients, likewise.
        examinations: Cells of the columns that may name examinations, likewise.
        rows: Rows after the splits were made.
        by_row: Whether patients decide in the rows that have no group, although other rows have one.
    """
    grouped = any(groups.values())
    deciding = {"group": groups} if grouped and not by_row else {"group": groups, **undecided(groups, patients)}
    findings = [found for column, values in deciding.items() for found in identifier_findings(column, values.values())]
    unused: dict[str, Mapping[str, Any]] = {**patients} if grouped else {}
    if grouped or not all(any(values.get(row.id) for values in patients.values()) for row in rows):
        unused |= examinations  # otherwise every patient is known
    return findings + [found for column, values in unused.items() if (found := unused_patients(column, values, rows))]


def undecided(groups: Mapping[str, str], patients: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return the patients of the rows that have no group; see `column_findings`."""
    return {column: {id: name for id, name in v.items() if not groups.get(id)} for column, v in patients.items()}


def without_group(
    rows: Sequence[Row], groups: Mapping[str, str], patients: Mapping[str, Mapping[str, str]]
) -> list[Row]:
    """Return the rows for which neither a group nor a patient is given; see `column_findings`."""
    columns = [groups, *patients.values()]
    return [row for row in rows if not any(values.get(row.id) for values in columns)]

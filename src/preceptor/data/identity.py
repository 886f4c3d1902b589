"""Decide which samples belong together: by columns that name the patient, and by the contents of files.

All tasks follow one rule. A column `group` decides, if the user gives one. Otherwise the columns that name a patient
decide. Samples that share the content of an image are in one group in any case.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from preceptor.data.findings import Finding
from preceptor.data.images import content_hash
from preceptor.data.texts import is_given as is_given
from preceptor.data.types import Case, Dialogue, Sample

Row = TypeVar("Row", Sample, Case, Dialogue)

_QUALIFIERS = {"anon", "anonymous", "anonymised", "anonymized", "deid", "deidentified", "dicom", "hashed", "original"}
_PERSONS = {"patient", "pat", "pt", "subject", "subj", "sub", "participant", "person", "individual", "animal"}
_NUMBERS = {"id", "ids", "identifier", "uid", "number", "no", "nr", "num", "key", "code", "name", "hash", "index"}
_JOINED = {person + number for person in _PERSONS for number in _NUMBERS} | {"mrn", "pid", "medicalrecordnumber"}


def names_patient(column: str) -> bool:
    """Return whether a column has a usual name of a patient's identifier, such as PatientID, subject or MRN.

    The whole name must match: `patient_age` and `subject_matter` do not.
    """
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", column).lower())
    while len(words) > 1 and words[0] in _QUALIFIERS:
        words = words[1:]
    if not words:
        return False
    person = words[0] in _PERSONS and all(word in _NUMBERS for word in words[1:])
    return person or "".join(words) in _JOINED


def patient_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that name a patient, in order."""
    return [column for column in columns if names_patient(column)]


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
    """Return the image files of a sample of any task, each once. Label maps are not images."""
    if isinstance(row, Sample):
        return (row.image,)
    if isinstance(row, Case):
        return tuple(dict.fromkeys(file.path for file in row.images.values()))
    return tuple(dict.fromkeys(row.images))


def shared_contents(rows: Iterable[Sample | Case | Dialogue]) -> dict[Path, str]:
    """Return the SHA-256 of every image file whose content occurs under several names.

    Only files with the size of another file are read.

    Raises:
        ImageError: a file cannot be read.
    """
    by_size: defaultdict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(path for row in rows for path in images_of(row)):
        by_size[path.stat().st_size].append(path)
    hashes = {path: content_hash(path) for paths in by_size.values() if len(paths) > 1 for path in paths}
    counts = Counter(hashes.values())
    return {path: digest for path, digest in hashes.items() if counts[digest] > 1}


def group_by_content(rows: Iterable[Row]) -> list[Row]:
    """Give rows that share an image, by path or by content, one group.

    Raises:
        ImageError: a file cannot be read.
    """
    rows = list(rows)
    same = shared_contents(rows)
    return merge_groups(rows, lambda row: [same.get(path, path) for path in images_of(row)])


def unused_patients(column: str, values: Mapping[str, Any], rows: Sequence[Sample | Case | Dialogue]) -> Finding | None:
    """Return a finding for a column that names patients and does not decide the groups, or None if it does no harm.

    Args:
        column: Name of the column.
        values: Cell of each row, by the id of the row.
        rows: Rows after the splits were made.
    """
    splits: defaultdict[str, set[str]] = defaultdict(set)
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if is_given(values.get(row.id)):
            patient = str(values[row.id]).strip()
            splits[patient].add(row.split)
            ids[patient].append(row.id)
    divided = [patient for patient, its_splits in splits.items() if len(its_splits - {"unlabelled"}) > 1]
    if not divided:
        return None
    reason = (
        f"column {column!r} names {len(splits)} patients and is not used, because the table has a column group; "
        f"{len(divided)} of them are in several splits, so that held-out scores are too high; delete the column group, "
        "or make it follow the patients"
    )
    return Finding(tuple(id for patient in divided for id in ids[patient]), None, reason)

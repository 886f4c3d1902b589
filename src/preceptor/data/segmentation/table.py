"""Read a user's own cases from CSV or JSONL: `case`, a column per modality, `mask`, optional `group` and `split`."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.dicom_series import holds_series
from preceptor.data.findings import Finding
from preceptor.data.groups import examination_columns, merge_groups, patient_columns, unread_splits
from preceptor.data.images import backslash_fix, resolve_image
from preceptor.data.segmentation.layouts import FoundCases, patient_of
from preceptor.data.segmentation.modalities import KNOWN, MASK, canonical_name, sort_modalities, stem
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.texts import Row, as_choice, as_identifier, check_column_names, read_rows
from preceptor.data.types import Case, Split, VolumeFile
from preceptor.errors import UserError, nearest

NAMES = ("case", "group", "split")
FOLDER_NAMES = ("cases.jsonl", "cases.csv")
SUFFIXES = (".csv", ".jsonl")


def table_in(root: Path) -> Path | None:
    """Return the table at `root` or in the folder `root`, or None. Raises UserError if the folder has two tables."""
    if root.is_file():
        return root
    tables = [root / name for name in FOLDER_NAMES if (root / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{tables[0]} and {tables[1]} are both tables of cases; keep one, or set data.root to it")
    return tables[0] if tables else None


def find_table(
    file: Path,
    modalities: tuple[str, ...] | None,
    mask: str | None = None,
    *,
    complete: bool = True,
    labels: bool = True,
) -> FoundCases:
    """Read the cases of a table. An empty cell (null in JSONL) is a missing modality; every other cell is a file.

    The files are NIfTI files, or folders of a DICOM series. Cases of one patient are in one group: by the column
    `group` if there is one, else by the columns that name a patient (see `preceptor.data.groups`).

    Args:
        file: CSV or JSONL.
        modalities: Inputs of the network. Default: the columns whose names are known modalities.
        mask: Column of the label maps. Default: `mask`.
        complete: Whether each of `modalities` must have a column.
        labels: Whether to read the column of the label maps.

    Raises:
        UserError: the table is invalid. The message names the file, the line and the fix.
    """
    mask = mask or MASK
    rows = _rows(file, (*NAMES, mask) if labels else ("case",))
    columns = list(dict.fromkeys(name for _, cells in rows for name in cells))
    if "case" not in columns:
        fix = "; if this is not the table of the cases, rename it, or set data.name=brats to read the folder"
        raise UserError(
            f"{file}: no column 'case'{_hint('case', columns)}; the required columns are case, the modalities and mask"
            f"{fix if file.name in FOLDER_NAMES else ''}"
        )
    patients = patient_columns(column for column in columns if column not in (*NAMES, mask))
    images = _image_columns([c for c in columns if c not in (*NAMES, mask, *patients)], modalities, file, complete)
    cases: list[Case] = []
    lines: dict[str, int] = {}
    splits = _given_splits(rows, file)
    cells_of: dict[str, dict[str, str]] = {}
    for line, cells in rows:
        place = f"{file}:{line}"
        case_id = as_identifier(cells.get("case"), f"{place}: case")
        if not case_id:
            raise UserError(f"{place}: the case is empty; fill it in or delete the row")
        require_file_name(case_id, f"{place}: case")
        if case_id in lines:
            raise UserError(f"{place}: case {case_id!r} is also in line {lines[case_id]}; give each case one row")
        lines[case_id] = line
        files = {name: _file(file, cells, column, place) for name, column in images.items()}
        present = {name: volume for name, volume in files.items() if volume is not None}
        if not present:
            raise UserError(f"{place}: case {case_id!r} has no image; a case may lack some modalities, but not all")
        group = as_identifier(cells.get("group"), f"{place}: group") or patient_of(case_id)
        named = {column: as_identifier(cells.get(column), f"{place}: {column}") for column in patients}
        cells_of[case_id] = {column: name for column, name in named.items() if name}
        label = _file(file, cells, mask, place, series=False) if labels else None
        cases.append(Case(case_id, present, label, group, splits.get(line, "train")))
    order = modalities or sort_modalities(images)
    found = FoundCases("table", order, sorted(cases, key=lambda case: case.id), split_given=bool(splits))
    found.group_given = "group" in columns
    if found.group_given:
        found.patients = {
            column: {case: cells.get(column, "") for case, cells in cells_of.items()} for column in patients
        }
    elif patients:
        found.cases = merge_groups(found.cases, lambda case: list(cells_of[case.id].items()))
        found.notes.append(f"Cases of one patient are in one split, by the column {' and '.join(patients)}.")
    unused = [c for c in columns if c not in (*NAMES, mask, *patients, *images.values())]
    for column in [] if patients else examination_columns(unused):
        found.patients[column] = {case.id: cells.get(column) for case, (_, cells) in zip(cases, rows, strict=True)}
    if not splits:
        for column in unused:
            if finding := unread_splits(column, (cells.get(column) for _, cells in rows)):
                found.unread_splits.append(finding)
    _add_findings(found, file, rows, unused)
    return found


def require_file_name(case_id: str, place: str) -> None:
    """Raise UserError if no file in a folder can be named after a case. The message does not contain the id."""
    if case_id in (".", "..") or any(sign in "/\\" or unicodedata.category(sign) == "Cc" for sign in case_id):
        raise UserError(
            f"{place} contains a slash, a backslash or a control character, or is . or .., so that its files cannot be "
            "named after it; write another name"
        )


def _add_findings(found: FoundCases, file: Path, rows: Sequence[Row], unused: Sequence[str]) -> None:
    """Add findings on columns that name volumes and are not used."""
    for column in unused:
        named = [cells[column] for _, cells in rows if isinstance(cells.get(column), str) and stem(cells[column])]
        if named:
            found.findings.append(
                Finding(
                    (),
                    file,
                    f"{file}: the column {column!r} names {len(named)} NIfTI files and is not used; list it in "
                    "data.modalities if it is an image, or set data.mask to it if it is the label map",
                    "warning",
                )
            )
            found.maybe_masks.append(f"those in the column {column!r}")


def _rows(file: Path, known: Sequence[str]) -> list[Row]:
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file} is not named as a table; the name must end in {' or '.join(SUFFIXES)}")
    rows = read_rows(file, lambda names, place: check_column_names(names, known, place))
    if not rows:
        raise UserError(f"{file} has no rows; it needs the columns case, the modalities and mask")
    return rows


def _image_columns(
    columns: Sequence[str], modalities: tuple[str, ...] | None, file: Path, complete: bool
) -> dict[str, str]:
    """Return the column of each modality: those of the user, or all columns whose names are known modalities."""
    wanted = {canonical_name(name): name for name in modalities or KNOWN}
    found: dict[str, str] = {}
    for column in columns:
        name = wanted.get(canonical_name(column))
        if name in found:
            raise UserError(f"{file}: columns {found[name]!r} and {column!r} are the same modality; keep one")
        if name is not None:
            found[name] = column
    absent = [name for name in modalities or () if name not in found]
    if absent and complete:
        raise UserError(f"{file}: no column for the modality {absent[0]!r}{_hint(absent[0], columns)}")
    if not found:
        raise UserError(
            f"{file}: no column is named as a known modality ({', '.join(KNOWN)}); set data.modalities to the columns "
            "of the images"
        )
    return found


def _hint(name: str, columns: Sequence[str]) -> str:
    return nearest(name, columns) if columns else ""


def _given_splits(rows: Sequence[Row], file: Path) -> dict[int, Split]:
    given = {line: as_choice(cells.get("split"), SPLIT_NAMES, f"{file}:{line}: split") for line, cells in rows}
    splits = {line: split for line, split in given.items() if split is not None}
    without = [line for line, _ in rows if line not in splits]
    if splits and without:
        raise UserError(
            f"{file}:{without[0]}: the split is missing, but other rows have one; give every row a split, or none"
        )
    return splits


def _file(table: Path, cells: Mapping[str, Any], column: str, place: str, *, series: bool = True) -> VolumeFile | None:
    """Return the volume that a cell names, or None if the cell is empty."""
    name = cells.get(column)
    if name is None or (isinstance(name, str) and not name.strip()):
        return None
    place = f"{place}: column {column}"
    if not isinstance(name, str):
        raise UserError(f"{place}: {type(name).__name__} instead of the path of a file; leave it out if there is none")
    path = resolve_image(table.parent, name.strip(), place)
    if stem(path.name) is None and not (series and path.is_dir()):
        kinds = "a .nii or .nii.gz file" + " or a folder of a DICOM series" * series
        raise UserError(f"{place}: {name!r} is not {kinds}; leave the cell empty if there is none")
    if series and path.is_dir() and not holds_series(path):
        raise UserError(f"{place}: the folder {path} contains no DICOM file")
    if not path.exists() or (path.is_dir() and not series):
        fix = backslash_fix([path]) or f"paths are relative to {table.parent}"
        raise UserError(f"{place}: {path} does not exist; {fix}")
    return VolumeFile(path)

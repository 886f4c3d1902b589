"""Read a user's own cases from CSV or JSONL: `case`, a column per modality, `mask`, optional `group` and `split`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.dicom_series import holds_series
from preceptor.data.findings import Finding
from preceptor.data.identity import is_given, merge_groups, patient_columns
from preceptor.data.images import resolve_image
from preceptor.data.segmentation.json_text import parse_json
from preceptor.data.segmentation.layouts import FoundCases, patient_of
from preceptor.data.segmentation.modalities import KNOWN, MASK, canonical_name, sort_modalities, stem
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.texts import read_text
from preceptor.data.types import Case, Split, VolumeFile
from preceptor.errors import UserError, nearest

Row = tuple[int, dict[str, Any]]
"""Line and cells of a row. Cells of CSV are texts."""

NAMES = ("case", "group", "split")
FOLDER_NAMES = ("cases.jsonl", "cases.csv")


def table_in(root: Path) -> Path | None:
    """Return the table at `root` or in the folder `root`, or None. Raises UserError if the folder has two tables."""
    if root.is_file():
        return root
    tables = [root / name for name in FOLDER_NAMES if (root / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{tables[0]} and {tables[1]} are both tables of cases; keep one, or set data.root to it")
    return tables[0] if tables else None


def find_table(
    file: Path, modalities: tuple[str, ...] | None, mask: str | None = None, *, complete: bool = True
) -> FoundCases:
    """Read the cases of a table. An empty cell (null in JSONL) is a missing modality; every other cell is a file.

    The files are NIfTI files, or folders of a DICOM series. Cases of one patient are in one group: by the column
    `group` if there is one, else by the columns that name a patient (see `preceptor.data.identity`).

    Args:
        file: CSV or JSONL.
        modalities: Inputs of the network. Default: the columns whose names are known modalities.
        mask: Column of the label maps. Default: `mask`.
        complete: Whether each of `modalities` must have a column.

    Raises:
        UserError: the table is invalid. The message names the file, the line and the fix.
    """
    rows = _rows(file)
    columns = list(dict.fromkeys(name for _, cells in rows for name in cells))
    mask = mask or MASK
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
        case_id = _name(cells, "case", place)
        if not case_id:
            raise UserError(f"{place}: the case is empty; fill it in or delete the row")
        if case_id in lines:
            raise UserError(f"{place}: case {case_id!r} is also in line {lines[case_id]}; give each case one row")
        lines[case_id] = line
        files = {name: _file(file, cells, column, place) for name, column in images.items()}
        present = {name: volume for name, volume in files.items() if volume is not None}
        if not present:
            raise UserError(f"{place}: case {case_id!r} has no image; a case may lack some modalities, but not all")
        group = _name(cells, "group", place) or patient_of(case_id)
        cells_of[case_id] = {column: name for column in patients if (name := _name(cells, column, place))}
        label = _file(file, cells, mask, place, series=False)
        cases.append(Case(case_id, present, label, group, splits.get(line, "train")))
    order = modalities or sort_modalities(images)
    found = FoundCases("table", order, sorted(cases, key=lambda case: case.id), split_given=bool(splits))
    if "group" in columns:
        found.patients = {
            column: {case: cells.get(column, "") for case, cells in cells_of.items()} for column in patients
        }
    elif patients:
        found.cases = merge_groups(found.cases, lambda case: list(cells_of[case.id].items()))
        found.notes.append(f"Cases of one patient are in one split, by the column {' and '.join(patients)}.")
    _add_findings(found, file, rows, [c for c in columns if c not in (*NAMES, mask, *patients, *images.values())])
    return found


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


def _name(cells: Mapping[str, Any], column: str, place: str) -> str:
    """Return an identifier as text, or "" if the cell is empty. 0 is an identifier.

    Raises:
        UserError: the cell is neither text nor an integer.
    """
    value = cells.get(column)
    if not is_given(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(
            f"{place}: {column} is of the type {type(value).__name__}; give a text or an integer as identifier"
        )
    return str(value).strip()


def _rows(file: Path) -> list[Row]:
    readers = {".csv": _csv, ".jsonl": _jsonl}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file} is not named as a table; the name must end in {' or '.join(readers)}")
    rows = readers[file.suffix.lower()](read_text(file, "save the table with the encoding UTF-8"), file)
    if not rows:
        raise UserError(f"{file} has no rows; it needs the columns case, the modalities and mask")
    return rows


def _csv(text: str, file: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if not header:
                header = [name.strip() for name in fields]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise UserError(f"{file}:{line}: column {twice[0]!r} occurs twice; keep one")
            elif fields:
                if len(fields) != len(header):
                    raise UserError(f"{file}:{line}: {len(fields)} fields, but the header has {len(header)}")
                rows.append((line, {name: cell.strip() for name, cell in zip(header, fields, strict=True)}))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{line}: invalid CSV ({error}); correct the quotes of this row") from error
    return rows


def _jsonl(text: str, file: Path) -> list[Row]:
    rows: list[Row] = []
    for line, record in enumerate(text.split("\n"), start=1):
        if record.strip():
            cells = parse_json(record, f"{file}:{line}", "every line must be one JSON object")
            if not isinstance(cells, dict):
                kind = type(cells).__name__
                raise UserError(f"{file}:{line}: {kind} instead of a JSON object such as {{'case': ...}}")
            rows.append((line, cells))
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
    splits: dict[int, Split] = {}
    for line, cells in rows:
        value = _name(cells, "split", f"{file}:{line}")
        if value and value.lower() not in SPLIT_NAMES:
            raise UserError(f"{file}:{line}: split {value!r} is not known{nearest(value.lower(), SPLIT_NAMES)}")
        if value:
            splits[line] = SPLIT_NAMES[value.lower()]
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
        raise UserError(f"{place}: {path} does not exist; paths are relative to {table.parent}")
    return VolumeFile(path)

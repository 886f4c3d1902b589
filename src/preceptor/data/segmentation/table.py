"""Read a user's own cases from CSV or JSONL: `case`, a column per modality, `mask`, optional `group` and `split`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from preceptor.data.images import resolve_image
from preceptor.data.segmentation.layouts import FoundCases, patient_of
from preceptor.data.segmentation.modalities import MASK, canonical_name, sort_modalities, stem
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.texts import read_text
from preceptor.data.types import Case, Split, VolumeFile
from preceptor.errors import UserError, nearest

RESERVED = ("case", MASK, "group", "split")
FOLDER_NAMES = ("cases.jsonl", "cases.csv")


def table_in(root: Path) -> Path | None:
    """Return the table at `root` or in the folder `root`, or None."""
    if root.is_file():
        return root
    return next((root / name for name in FOLDER_NAMES if (root / name).is_file()), None)


def find_table(file: Path, modalities: tuple[str, ...] | None) -> FoundCases:
    """Read the cases of a table. An empty cell is a missing modality.

    Without `modalities`, every other column with .nii or .nii.gz files is a modality.

    Raises:
        UserError: the table is invalid. The message names the file, the line and the fix.
    """
    rows = _rows(file)
    columns = {name for _, cells in rows for name in cells}
    if "case" not in columns:
        raise UserError(
            f"{file}: no column 'case'{_hint('case', columns)}; the required columns are case, the modalities and mask"
        )
    images = _image_columns(rows, columns, modalities, file)
    cases: list[Case] = []
    lines: dict[str, int] = {}
    splits = _given_splits(rows, file)
    for line, cells in rows:
        place = f"{file}:{line}"
        case_id = cells.get("case", "")
        if not case_id:
            raise UserError(f"{place}: the case is empty; fill it in or delete the row")
        if case_id in lines:
            raise UserError(f"{place}: case {case_id!r} is also in line {lines[case_id]}; give each case one row")
        lines[case_id] = line
        files = {name: _file(file, cells[column], place) for name, column in images.items() if cells.get(column)}
        if not files:
            raise UserError(f"{place}: case {case_id!r} has no image; a case may lack some modalities, but not all")
        mask = _file(file, cells[MASK], place) if cells.get(MASK) else None
        group = cells.get("group") or patient_of(case_id)
        cases.append(Case(case_id, files, mask, group, splits.get(line, "train")))
    order = modalities or sort_modalities(images)
    return FoundCases("table", order, sorted(cases, key=lambda case: case.id), split_given=bool(splits))


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    readers = {".csv": _csv, ".jsonl": _jsonl}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file} is not named as a table; the name must end in {' or '.join(readers)}")
    rows = readers[file.suffix.lower()](read_text(file, "save the table with the encoding UTF-8"), file)
    if not rows:
        raise UserError(f"{file} has no rows; it needs the columns case, the modalities and mask")
    return rows


def _csv(text: str, file: Path) -> list[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
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


def _jsonl(text: str, file: Path) -> list[tuple[int, dict[str, str]]]:
    rows = []
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            cells: Any = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{line}: invalid JSON ({error}); every line must be one JSON object") from error
        if not isinstance(cells, dict):
            raise UserError(f"{file}:{line}: {type(cells).__name__} instead of a JSON object such as {{'case': ...}}")
        rows.append((line, {name: "" if cell is None else str(cell).strip() for name, cell in cells.items()}))
    return rows


def _image_columns(
    rows: list[tuple[int, dict[str, str]]], columns: set[str], modalities: tuple[str, ...] | None, file: Path
) -> dict[str, str]:
    """Return the column of each modality."""
    others = columns - set(RESERVED)
    if modalities is not None:
        column_of = {canonical_name(column): column for column in others}
        absent = [name for name in modalities if canonical_name(name) not in column_of]
        if absent:
            raise UserError(f"{file}: no column for the modality {absent[0]!r}{_hint(absent[0], others)}")
        return {name: column_of[canonical_name(name)] for name in modalities}
    columns_found: dict[str, str] = {}
    for column in sorted(others):
        cells = [row[column] for _, row in rows if row.get(column)]
        if cells and all(stem(cell) is not None for cell in cells):
            if canonical_name(column) in columns_found:
                raise UserError(
                    f"{file}: columns {columns_found[canonical_name(column)]!r} and {column!r} are the same modality; "
                    "keep one"
                )
            columns_found[canonical_name(column)] = column
    if not columns_found:
        raise UserError(f"{file}: no column contains .nii or .nii.gz files; give one column per modality, such as t1ce")
    return columns_found


def _hint(name: str, columns: set[str]) -> str:
    return nearest(name, columns) if columns else ""


def _given_splits(rows: list[tuple[int, dict[str, str]]], file: Path) -> dict[int, Split]:
    splits: dict[int, Split] = {}
    for line, cells in rows:
        value = cells.get("split", "")
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


def _file(table: Path, name: str, place: str) -> VolumeFile:
    path = resolve_image(table.parent, name, place)
    if stem(path.name) is None:
        raise UserError(f"{place}: {name!r} is not a .nii or .nii.gz file")
    if not path.is_file():
        raise UserError(f"{place}: {path} does not exist; paths are relative to {table.parent}")
    return VolumeFile(path)

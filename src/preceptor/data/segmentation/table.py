"""A user's own cases as CSV or JSONL: `case`, one column per modality, `mask`, and optionally `group` and `split`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from preceptor.data.images import resolve_image
from preceptor.data.segmentation.layouts import Found, patient_of
from preceptor.data.segmentation.modalities import MASK, in_order, plain, stem
from preceptor.data.texts import read_text
from preceptor.data.types import Case, Split, VolumeFile
from preceptor.data.vqa.table import SPLITS
from preceptor.errors import UserError, nearest

OWN = ("case", MASK, "group", "split")
FOLDER_NAMES = ("cases.jsonl", "cases.csv")


def table_in(root: Path) -> Path | None:
    """Return the table that `root` is or holds."""
    if root.is_file():
        return root
    return next((root / name for name in FOLDER_NAMES if (root / name).is_file()), None)


def find_table(file: Path, modalities: tuple[str, ...] | None) -> Found:
    """Return the cases of a table; an empty cell is a missing modality.

    Without `modalities`, every other column whose cells are .nii or .nii.gz files is one. Raises UserError with file,
    line and fix.
    """
    rows = _rows(file)
    columns = {name for _, cells in rows for name in cells}
    if "case" not in columns:
        raise UserError(f"{file}: no column 'case'{_close('case', columns)}; needed are case, the modalities and mask")
    images = _image_columns(rows, columns, modalities, file)
    cases: list[Case] = []
    lines: dict[str, int] = {}
    splits = _parts(rows, file)
    for line, cells in rows:
        place = f"{file}:{line}"
        name = cells.get("case", "")
        if not name:
            raise UserError(f"{place}: the case is empty; fill it in or delete the row")
        if name in lines:
            raise UserError(f"{place}: case {name!r} is that of line {lines[name]} too; one row per case")
        lines[name] = line
        held = {own: _file(file, cells[column], place) for own, column in images.items() if cells.get(column)}
        if not held:
            raise UserError(f"{place}: case {name!r} has no image; a case may lack modalities, but not all of them")
        mask = _file(file, cells[MASK], place) if cells.get(MASK) else None
        group = cells.get("group") or patient_of(name)
        cases.append(Case(name, held, mask, group, splits.get(line, "train")))
    order = modalities or in_order(images)
    return Found("table", order, sorted(cases, key=lambda case: case.id), split_given=bool(splits))


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
    found: list[tuple[int, dict[str, str]]] = []
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
                    raise UserError(f"{file}:{line}: {len(fields)} fields where the header has {len(header)}")
                found.append((line, {name: cell.strip() for name, cell in zip(header, fields, strict=True)}))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{line}: broken CSV ({error}); mend the quotes of this row") from error
    return found


def _jsonl(text: str, file: Path) -> list[tuple[int, dict[str, str]]]:
    found = []
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            cells: Any = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{line}: broken JSON ({error}); every line is one JSON object") from error
        if not isinstance(cells, dict):
            raise UserError(f"{file}:{line}: {type(cells).__name__} instead of a JSON object such as {{'case': ...}}")
        found.append((line, {name: "" if cell is None else str(cell).strip() for name, cell in cells.items()}))
    return found


def _image_columns(
    rows: list[tuple[int, dict[str, str]]], columns: set[str], modalities: tuple[str, ...] | None, file: Path
) -> dict[str, str]:
    """Return the column of every modality, by the modality's name."""
    others = columns - set(OWN)
    if modalities is not None:
        meant = {plain(column): column for column in others}
        absent = [name for name in modalities if plain(name) not in meant]
        if absent:
            raise UserError(f"{file}: no column for the modality {absent[0]!r}{_close(absent[0], others)}")
        return {name: meant[plain(name)] for name in modalities}
    found: dict[str, str] = {}
    for column in sorted(others):
        cells = [row[column] for _, row in rows if row.get(column)]
        if cells and all(stem(cell) is not None for cell in cells):
            if plain(column) in found:
                raise UserError(f"{file}: columns {found[plain(column)]!r} and {column!r} are one modality; keep one")
            found[plain(column)] = column
    if not found:
        raise UserError(f"{file}: no column holds .nii or .nii.gz files; give one column per modality, such as t1ce")
    return found


def _close(name: str, columns: set[str]) -> str:
    return nearest(name, columns) if columns else ""


def _parts(rows: list[tuple[int, dict[str, str]]], file: Path) -> dict[int, Split]:
    splits: dict[int, Split] = {}
    for line, cells in rows:
        value = cells.get("split", "")
        if value and value.lower() not in SPLITS:
            raise UserError(f"{file}:{line}: split {value!r} is not known{nearest(value.lower(), SPLITS)}")
        if value:
            splits[line] = SPLITS[value.lower()]
    without = [line for line, _ in rows if line not in splits]
    if splits and without:
        raise UserError(f"{file}:{without[0]}: no split, though other rows have one; give it to every row or to none")
    return splits


def _file(table: Path, name: str, place: str) -> VolumeFile:
    path = resolve_image(table.parent, name, place)
    if stem(path.name) is None:
        raise UserError(f"{place}: {name!r} is no .nii or .nii.gz file")
    if not path.is_file():
        raise UserError(f"{place}: {path} does not exist; paths are relative to {table.parent}")
    return VolumeFile(path)

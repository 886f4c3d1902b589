"""Read text, JSON, CSV and JSONL files, and convert their cells to texts, identifiers and choices.

Every reader of a data set uses these functions, so that a value has one meaning in all formats. Nothing is converted
with `str`: a value whose text is not defined is an error that names the place.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import numbers
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from preceptor.errors import UserError, nearest

AS_RELEASED = "take the file as released"
AS_UTF8 = "save the file with the encoding UTF-8"
_BINARY = {
    b"PK\x03\x04": "an Excel workbook or another ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "compressed with gzip",
    b"%PDF": "a PDF document",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_LARGEST_EXACT = 2**53
"""From here on a float no longer holds every integer."""
MISSING = frozenset({"na", "n/a", "nan", "nat", "none", "null", "<na>"})
"""Texts in lower case that programs write for a missing value."""

T = TypeVar("T")
Row = tuple[int, dict[str, Any]]
"""A line number, counted from 1, and its cells by column name."""


def read_text(file: Path, fix: str = AS_RELEASED) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, or is not UTF-8; the message then names the line and ends in `fix`.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a file; give the path of a file")  # a pipe would be waited for
    try:
        data = file.read_bytes()
    except PermissionError as error:  # other errors, such as too many open files, are not about this file
        raise UserError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    for mark, kind in _BINARY.items():
        if data.startswith(mark):
            raise UserError(f"{file} is {kind}, whatever its name; export it as text in UTF-8")
    if data.startswith(_UTF16):
        raise UserError(f"{file} is UTF-16; {fix if fix != AS_RELEASED else AS_UTF8}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; {fix}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}:{line}: a NUL character, as in UTF-16 or in a damaged file; {fix}")
    return text


# JSON


def parse_json(text: str, place: str, fix: str = "") -> Any:
    """Return the value of a JSON text.

    Raises:
        UserError: the text is not JSON, is nested too deeply, repeats a key of an object, or contains an integer of
            more digits than Python converts or half of a surrogate pair. The message starts with `place`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        reason = "the brackets are nested too deeply"
    except json.JSONDecodeError as error:
        reason = str(error)
    except ValueError as error:
        reason = "an integer has too many digits" if "integer string conversion" in str(error) else str(error)
    else:
        if _HALF_PAIR.search(text):
            _require_unicode(value, place)
        return value
    raise UserError(f"{place}: invalid JSON ({reason}){fix and '; '}{fix}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated[:60]!r} occurs twice in one object")
    return entries


def _require_unicode(value: Any, place: str) -> None:
    for name, part in value.items() if isinstance(value, dict) else [("a text", value)]:
        try:
            json.dumps({name: part}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            what = name if name.isascii() and name.isprintable() else "a key"
            reason = f"{what} contains half of a surrogate pair (\\ud800 to \\udfff)"
            raise UserError(f"{place}: {reason}; correct the encoding") from None


def read_json(file: Path, fix: str = AS_RELEASED) -> Any:
    """Return the content of a JSON file. Raises UserError as `read_text` and `parse_json`."""
    return parse_json(read_text(file, fix), f"{file} cannot be read as JSON", fix)


def read_json_rows(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entries of a JSON list. Raises UserError if the file is invalid or an entry lacks a needed key."""
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is not a list of questions; {AS_RELEASED}")
    for number, row in enumerate(rows, start=1):
        absent = [name for name in needed if name not in row] if isinstance(row, dict) else list(needed)
        if absent:
            raise UserError(f"{file}: entry {number} lacks {', '.join(absent)}; {AS_RELEASED}")
    return rows


@dataclass(frozen=True)
class RecordPlace:
    """The place of a record of a file: ``line 3`` of JSONL, or ``record 3`` of a JSON list, counted from 1.

    As a text, it is the file with the place, such as ``answers.jsonl:3``.
    """

    file: str
    number: int
    in_list: bool = False

    @property
    def name(self) -> str:
        return f"record {self.number}" if self.in_list else f"line {self.number}"

    def __str__(self) -> str:
        return f"{self.file}, {self.name}" if self.in_list else f"{self.file}:{self.number}"


def json_records(text: str, file: str, fix: str) -> list[tuple[RecordPlace, Any]]:
    """Return the places and values of JSONL, or of a JSON list of objects, whatever the suffix of the file.

    Raises:
        UserError: as `json_lines`.
    """
    if text.lstrip().startswith("["):
        try:
            is_list = all(isinstance(row, dict) for row in json.loads(text))
        except (ValueError, RecursionError):
            is_list = False
        if is_list:
            rows = enumerate(parse_json(text, file, fix), start=1)
            return [(RecordPlace(file, number, in_list=True), row) for number, row in rows]
    return [(RecordPlace(file, line), row) for line, row in json_lines(text, file, fix)]


def json_lines(text: str, place: str, fix: str = "every line must be one JSON object") -> list[tuple[int, Any]]:
    """Return the line number, counted from 1, and the value of every line of JSONL that is not blank.

    Raises:
        UserError: a line is invalid (see `parse_json`). `place` names the file, and the message ends in `fix`.
    """
    # str.splitlines would also split at characters such as U+2028, which are legal inside a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return [(line, parse_json(record, f"{place}:{line}", fix)) for line, record in lines if record.strip()]


# Tables


def read_rows(file: Path, check_names: Callable[[list[str], str], None] = lambda names, place: None) -> list[Row]:
    """Return the rows of a CSV file (commas, header in the first line) or of a JSONL file.

    Rows of CSV in which no cell has a value (see `is_given`) are left out. Cells of CSV are texts without the blanks
    before them or before their quotes. Cells of JSONL are JSON values; `as_text` and its neighbours convert both.

    Args:
        file: Table; its suffix .csv or .jsonl decides the format.
        check_names: Called with every new set of column names and its place. It raises UserError if they are wrong.

    Raises:
        UserError: the file is not a table. The message names the line.
    """
    text = read_text(file, "save the table with the encoding UTF-8")
    if file.suffix.lower() == ".csv":
        return _csv_rows(text, file, check_names)
    rows: list[Row] = []
    seen: set[tuple[str, ...]] = set()
    for line, cells in json_lines(text, str(file)):
        if not isinstance(cells, dict):
            raise UserError(f"{file}:{line}: {type(cells).__name__} instead of a JSON object such as {{'image': ...}}")
        if tuple(cells) not in seen:
            seen.add(tuple(cells))
            check_names(list(cells), f"{file}:{line}")
        rows.append((line, cells))
    return rows


def _csv_rows(text: str, file: Path, check_names: Callable[[list[str], str], None]) -> list[Row]:
    # A quote after a comma and a space would otherwise be part of the text.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    rows: list[Row] = []
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if not any(is_given(field) for field in fields):
                pass  # spreadsheets write rows without a value after the last one
            elif header is None:
                header = [field.strip() for field in fields]
                _check_header(header, f"{file}:{line}")
                check_names(header, f"{file}:{line}")
            elif len(fields) != len(header):
                raise UserError(
                    f"{file}:{line}: {len(fields)} fields, but the header has {len(header)}; put texts with "
                    "commas or line breaks in double quotes"
                )
            else:
                rows.append((line, dict(zip(header, fields, strict=True))))
            line = reader.line_num + 1  # a quoted field may span lines; report the first one
    except csv.Error as error:
        raise UserError(f"{file}:{line}: invalid CSV ({error}); correct the quotes of this row") from error
    return rows


def check_column_names(names: Iterable[str], known: Sequence[str], place: str) -> None:
    """Raise UserError if a column name is nearly a known one, such as ``Split``, and would silently count as missing.

    Args:
        names: Columns of the table.
        known: Columns that the reader understands, in lower case.
        place: Where the names are. The message starts with it.
    """
    names = list(names)
    for name in names:
        if name in known:
            continue
        normalised = name.strip().lower().replace(" ", "_").replace("-", "_")
        if normalised in known and normalised in names:
            raise UserError(f"{place}: the columns {normalised!r} and {name!r} differ only in case; keep one")
        # Of a name of two letters, such as id, other short names are no misspellings: uid, pid, idx.
        similar = [one for one in known if len(one) > 2 or one == normalised]
        close = difflib.get_close_matches(normalised, similar, n=1, cutoff=0.8)
        if close and close[0] not in names:
            raise UserError(f"{place}: unknown column {name!r}; did you mean {close[0]!r}? Rename the column")


def _check_header(header: list[str], place: str) -> None:
    if header[0].lower().startswith("sep=") and not any(header[1:]):
        line = ",".join(header)
        raise UserError(f"{place}: the line {line!r} is an instruction for Excel and not a header; delete the line")
    line = ",".join(header)
    for sign in ";\t|":
        if line.count(sign) >= len(header):  # more often than commas, which may be part of a name or of a text
            how = "has no comma" if len(header) == 1 else f"is separated by {sign!r}"
            raise UserError(f"{place}: the header {line!r} {how}; save the table with commas")
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise UserError(f"{place}: column {repeated[0]!r} occurs twice; keep one")


# Cells


def is_given(value: Any) -> bool:
    """Return whether a cell has a value: not None, not NaN, not a text without a visible sign.

    0 and False are values. Invisible signs are white space and those of the Unicode category Cf, such as the zero-width
    space.
    """
    if isinstance(value, str):
        return any(not sign.isspace() and unicodedata.category(sign) != "Cf" for sign in value)
    return value is not None and not (isinstance(value, numbers.Number) and value != value)


def as_text(value: Any, place: str) -> str:
    """Return a cell as a text without white space around it. A cell without a value (see `is_given`) is "".

    A text stays as written. A number becomes its shortest decimal text; 1.0 is the same number as 1 and becomes "1".

    Args:
        value: Cell of a table, a JSON document or a parquet file.
        place: Where the cell is, with its column, such as ``table.jsonl:4: answer``. Errors start with it.

    Raises:
        UserError: the cell is a truth value, an infinite number, a date, bytes, a list, a structure or the like.
    """
    if not is_given(value):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        raise UserError(f"{place} is {str(value).lower()}; write a text in quotes, such as yes or no")
    if not isinstance(value, numbers.Real | Decimal):
        shown = json.dumps(value, default=_kind)[:60] if isinstance(value, dict | list | tuple) else _kind(value)
        raise UserError(f"{place} is {shown}; write a text in quotes")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if not math.isfinite(value):
        raise UserError(f"{place} is an infinite number; write a text in quotes")
    if isinstance(value, Decimal):
        return f"{value.normalize():f}" if value else "0"
    number = float(str(value))  # float32 prints the shortest text, too
    return str(int(number)) if number.is_integer() and abs(number) < _LARGEST_EXACT else str(number)


def as_identifier(value: Any, place: str) -> str:
    """Return a cell that names something (a sample, a group, a patient, a file) as a text, or "" if it has no value.

    0 is an identifier. Texts are in the Unicode form NFC, so that the same name is never two identifiers. Errors do not
    contain the value, because it may be that of a patient.

    Raises:
        UserError: as `as_text`, and for a number whose digits are not certain: a fraction (1.10 and 1.1 are one number)
            or a float of 2^53 and more.
    """
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value.strip())
    if is_given(value) and not isinstance(value, numbers.Real | Decimal):
        raise UserError(f"{place} is {_kind(value)}; write a text in quotes")
    text = as_text(value, place)
    if text.lstrip("-").isdigit() or not text:
        return text
    raise UserError(f"{place} is a number that is not whole, or too large to be exact; write a text in quotes")


def as_choice(value: Any, known: Mapping[str, T], place: str) -> T | None:
    """Return the entry of `known` that a cell names, in any case, or None if the cell has no value.

    Raises:
        UserError: as `as_text`, and for an unknown name.
    """
    text = as_text(value, place)
    if text and text.lower() not in known:
        raise UserError(f"{place} {text!r} is not known{nearest(text.lower(), known)}")
    return known[text.lower()] if text else None


def _kind(value: Any) -> str:
    names = {"dict": "a structure", "list": "a list", "tuple": "a list", "ndarray": "a list", "bytes": "binary data"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")

"""Read the text files of data sets. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.errors import UserError

AS_RELEASED = "take the file as released"


def read_text(file: Path, fix: str = AS_RELEASED) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, or is not UTF-8; the message then names the line and ends in `fix`.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; {fix}") from error


def read_json_rows(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entries of a JSON list. Raises UserError if the file is invalid or an entry lacks a needed key."""
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); {AS_RELEASED}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is not a list of questions; {AS_RELEASED}")
    for number, row in enumerate(rows, start=1):
        absent = [name for name in needed if name not in row] if isinstance(row, dict) else list(needed)
        if absent:
            raise UserError(f"{file}: entry {number} lacks {', '.join(absent)}; {AS_RELEASED}")
    return rows

"""Find columns of a table of questions that are not read although their content or name suggests that they matter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.groups import names_examination, unread_splits
from preceptor.data.image_folder import IMAGE_SUFFIXES
from preceptor.data.texts import as_text, is_given

REQUIRED = ("image", "question", "answer")
COLUMNS = (*REQUIRED, "id", "answer_type", "group", "split", "question_type")
ANSWER_NAMES = ("label", "labels", "target", "targets", "gold", "gt", "ground_truth", "reference", "correct")
"""Names under which other tables keep their answers."""
_OPTION = re.compile(r"(?:(?:op|opt|option|choice)s?)?[\W_]*[a-j]|(?:opt|option|choice)s?[\W_]*\d")
"""Name of a column with one option of a question: option_A, Choice A, opa, A, option_1."""
_OPTIONS = re.compile(r"(?:\w+[\W_])?(?:option|choice)s?")
"""Name of a column with all options of a question: options, answer_choices."""
_LABEL = re.compile(r"\(?([a-j]|\d)[.):]?")
_WRITTEN_LABEL = re.compile(r"\b[a-jA-J][.):]")
_BETWEEN = re.compile(r"[,;|\n\[\]{}'\"]+")


def lists_options(column: str) -> bool:
    """Return whether a column has a usual name for all options of a question."""
    return bool(_OPTIONS.fullmatch(column.lower()))


def unread_columns(cells: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[Finding]:
    """Return a finding for every column that is not read although it has the content or the name of one that is.

    Args:
        cells: Cells of each row by column, by the id of the row.
        columns: All columns of the table.
    """
    return [*_misplaced(list(cells.values()), columns), *_labels_of_options(cells, columns)]


def _misplaced(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[Finding]:
    findings = []
    for column in (column for column in columns if column not in COLUMNS):
        given = [cells for cells in rows if is_given(cells.get(column))]
        values = {_folded(cells[column]) for cells in given}
        # The images of parquet tables have no column of names.
        images = "image" in columns and bool(values) and all(Path(value).suffix in IMAGE_SUFFIXES for value in values)
        other = "image" if images else "answer" if column.lower() in ANSWER_NAMES else ""
        close = next(iter(difflib.get_close_matches(column.lower(), COLUMNS, n=1, cutoff=0.8)), "")
        if column.lower().endswith("id"):  # question_id names a question and does not contain one
            close = ""
        if splits := unread_splits(column, values):
            findings.append(splits)
        elif all(_folded(cells[column]) == _folded(cells.get(other or close)) for cells in given):
            continue  # nothing is lost
        elif other:
            reason = (
                f"column {column!r} contains names of image files and is not read: a question has one image, that of "
                "the column 'image'"
                if images
                else f"column {column!r} may contain answers and is not read, only 'answer' is; put all answers there"
            )
            findings.append(Finding((), None, reason, "warning"))
        elif close and not names_examination(column):
            reason = f"column {column!r} is not read, only {close!r} is; put all values there, or rename the column"
            findings.append(Finding((), None, reason, "warning"))
    return findings


def _labels_of_options(cells: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[Finding]:
    """Return an error if answers are letters or numbers of options that other columns contain.

    A number may count from 0 or from 1, so that the text cannot be looked up. An answer that is the text of an option
    of its row is an answer, even if it is a letter or a number.
    """
    single = [column for column in columns if _OPTION.fullmatch(column.lower())]
    single = single if len(single) > 1 else []
    lists = [column for column in columns if lists_options(column)]
    labels: dict[str, str] = {}
    for id, row in cells.items():
        options = [_text(row[column]) for column in single if is_given(row.get(column))]
        options = options or [option for column in lists for option in _listed(row.get(column))]
        known = {*"abcdefghij"[: len(options)], *map(str, range(len(options) + 1))} if options else set()
        given = row.get("answer")
        for answer in given if isinstance(given, list) else [given]:
            text = as_text(answer, "answer")
            match = _LABEL.fullmatch(text.lower())
            if match and match[1] in known and text not in options:
                labels.setdefault(id, text)
    if not labels:
        return []
    names = ", ".join(map(repr, [*single, *lists]))
    reason = (
        f"{len(labels)} of {len(cells)} answers, such as {next(iter(labels.values()))!r}, are letters or numbers of "
        f"the options in {names}, and would be learned as such; write the text of the option into 'answer'"
    )
    return [Finding(tuple(labels), None, reason)]


def _listed(cell: Any) -> list[str]:
    """Return the options in a cell: a list, a structure with or without labels, or a text that lists at least two."""
    if isinstance(cell, dict):
        cell = [part for key, part in cell.items() if key.lower() not in ("label", "labels", "key", "id")]
    if isinstance(cell, list):
        return [
            option for part in cell for option in (_listed(part) if isinstance(part, dict | list) else [_text(part)])
        ]
    if not is_given(cell):
        return []
    text = _text(cell)
    options = [option for part in _BETWEEN.split(text) if (option := part.strip())]
    labels = _WRITTEN_LABEL.findall(text)
    return (options if len(options) >= len(labels) else labels) if max(len(options), len(labels)) > 1 else []


def _text(cell: Any) -> str:
    return str(cell).strip() if is_given(cell) else ""


def _folded(cell: Any) -> str:
    return _text(cell).lower()

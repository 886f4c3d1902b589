"""Find columns of a table of questions that are not read although their content or name suggests that they matter."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.groups import unread_splits
from preceptor.data.identifying_columns import names_examination
from preceptor.data.image_folder import IMAGE_SUFFIXES
from preceptor.data.options import label_in_question, label_of_option, option_columns
from preceptor.data.texts import is_given

REQUIRED = ("image", "question", "answer")
COLUMNS = (*REQUIRED, "id", "answer_type", "group", "split", "question_type")
ANSWER_NAMES = ("label", "labels", "target", "targets", "gold", "gt", "ground_truth", "reference", "correct")
"""Names under which other tables keep their answers."""


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
    """Return an error if answers are letters or numbers of options that other columns or the question contain."""
    rows = [(row.get("answer"), row) for row in cells.values()]
    columns = option_columns((column for column in columns if column not in COLUMNS), rows)
    labels = {id: label for id, row in cells.items() if (label := label_of_option(row.get("answer"), row, columns))}
    asked = {
        id: label
        for id, row in cells.items()
        if id not in labels and (label := label_in_question(row.get("answer"), _text(row.get("question"))))
    }
    findings = []
    for found, where in ((labels, ", ".join(map(repr, columns))), (asked, "their question")):
        if found:
            reason = (
                f"{len(found)} of {len(cells)} answers, such as {next(iter(found.values()))!r}, are letters or numbers "
                f"of the options in {where}, and would be learned as such; write the text of the option into 'answer'"
            )
            findings.append(Finding(tuple(found), None, reason))
    return findings


def _text(cell: Any) -> str:
    return str(cell).strip() if is_given(cell) else ""


def _folded(cell: Any) -> str:
    return _text(cell).lower()

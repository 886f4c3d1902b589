"""Find answers that are letters or numbers of options, which the question or other columns list (multiple choice).

A number may count from 0 or from 1, so that its text cannot be looked up; readers report such answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from preceptor.data.texts import as_text, is_given

_OPTION = re.compile(r"(?:(?:op|opt|option|choice)s?)?[\W_]*[a-j]|(?:opt|option|choice)s?[\W_]*\d")
"""Name of a column with one option of a question: option_A, Choice A, opa, A, option_1."""
_OPTIONS = re.compile(r"(?:\w+[\W_])?(?:option|choice)s?")
"""Name of a column with all options of a question: options, answer_choices."""
_AFTER = "[.):\\]\u3001\uff0e\uff1a\uff09]"
"""Sign after a label, in Chinese and Japanese, too."""
_LABEL = re.compile(rf"[(\[\uff08]?([a-j]|\d){_AFTER}?")
_WRITTEN_LABEL = re.compile(rf"\b[a-jA-J]{_AFTER}")
_LABELLED = re.compile(
    rf"(?<![a-z\d])(?:[a-j]{_AFTER}|\d{_AFTER}(?!\d))(?!\s*(?:\Z|[,;.?!]|(?:or|and)\b))", re.IGNORECASE
)
"""A label of an option with its text in a question. ``Panel (A) or (B)?`` has no texts, and 2.5 is a number."""
_ORDERS = ("abcdefghij", "0123456789", "123456789")
_BETWEEN = re.compile(r"[,;|\n\[\]{}'\"]+")


def lists_options(column: str) -> bool:
    """Return whether a column has a usual name for all options of a question."""
    return bool(_OPTIONS.fullmatch(column.lower()))


def option_columns(columns: Iterable[str], rows: Sequence[tuple[Any, Mapping[str, Any]]] = ()) -> list[str]:
    """Return the columns that contain options: those with one each, of which there are at least two, and lists of all.

    The name of a column decides. A column of another name contains options if its cells are lists of at least two
    texts, and every answer in its rows is the letter, the number or the text of one.

    Args:
        columns: Names of columns.
        rows: Answers, one or a list of them, and cells of each row.
    """
    columns = list(columns)
    single = [column for column in columns if _OPTION.fullmatch(column.lower())]
    named = (single if len(single) > 1 else []) + [column for column in columns if lists_options(column)]
    return named + [column for column in columns if column not in named and _lists_answers(column, rows)]


def _lists_answers(column: str, rows: Iterable[tuple[Any, Mapping[str, Any]]]) -> bool:
    listed = [(_texts(answer), _listed(row[column])) for answer, row in rows if _is_list_of_texts(row.get(column))]
    return bool(listed) and all(
        _is_label(text, options) or text.lower() in {option.lower() for option in options}
        for texts, options in listed
        for text in texts
    )


def _is_list_of_texts(cell: Any) -> bool:
    """Return whether a cell is a list of at least two texts, or a structure of texts by the labels of options."""
    if isinstance(cell, dict) and all(_LABEL.fullmatch(key.lower()) for key in cell):
        cell = list(cell.values())
    return isinstance(cell, list) and len(cell) > 1 and all(isinstance(text, str) and is_given(text) for text in cell)


def options_of(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the texts of the options of a row in its `option_columns`."""
    single = [column for column in columns if _OPTION.fullmatch(column.lower())]
    texts = [_text(row[column]) for column in single if is_given(row.get(column))]
    return texts or [option for column in columns if column not in single for option in _listed(row.get(column))]


def label_of_option(answer: Any, row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return an answer, or one of a list, that is the letter or the number of an option of its row, otherwise "".

    An answer that is the text of an option is an answer, even if it is a letter or a number.
    """
    options = options_of(row, columns)
    return next((text for text in _texts(answer) if _is_label(text, options)), "")


def label_in_question(answer: Any, question: str) -> str:
    """Return an answer, or one of a list, that is the label of an option in its question, otherwise "".

    A question lists options if it has at least two labels in order with a text each, such as ``A. liver B. lung``.
    """
    written = [match[0][0].lower() for match in _LABELLED.finditer(question)]
    known: set[str] = set()
    for order in _ORDERS:
        count = 0
        for label in written:
            count += count < len(order) and label == order[count]
        known.update(order[:count] if count > 1 else "")
    matches = ((text, _LABEL.fullmatch(text.lower())) for text in _texts(answer))
    return next((text for text, match in matches if match and match[1] in known), "")


def _is_label(text: str, options: Sequence[str]) -> bool:
    known = {*"abcdefghij"[: len(options)], *map(str, range(len(options) + 1))} if options else set()
    match = _LABEL.fullmatch(text.lower())
    return match is not None and match[1] in known and text not in options


def _texts(answer: Any) -> list[str]:
    return [as_text(one, "answer") for one in (answer if isinstance(answer, list) else [answer])]


def contains_options(text: str, options: Sequence[str]) -> bool:
    """Return whether a text contains all options, or lists options with the labels A and B, such as ``A)`` or ``B.``"""
    lowered = text.lower()
    labels = {label[0] for label in _WRITTEN_LABEL.findall(lowered)}
    return {"a", "b"} <= labels or all(option.lower() in lowered for option in options)


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

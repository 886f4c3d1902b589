"""Read a user's own questions from a CSV or JSONL table with `image, question, answer` and optional columns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from preceptor.data.groups import (
    column_findings,
    folder_findings,
    group_by_content,
    group_by_patient,
    note_leaks,
    without_group,
)
from preceptor.data.identifying_columns import examination_columns, patient_columns
from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import SPLIT_NAMES, cut_validation
from preceptor.data.texts import (
    Row,
    as_choice,
    as_identifier,
    as_text,
    check_column_names,
    read_rows,
)
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import ANSWER_TYPES, as_answers, inferred_type, mixed_types
from preceptor.data.vqa.columns import COLUMNS, REQUIRED, unread_columns
from preceptor.errors import UserError

FOLDER_NAMES = ("questions.jsonl", "questions.csv")
SUFFIXES = (".csv", ".jsonl")
ONLY_ANSWERED = ("answer", "answer_type", "split")
"""Columns that are not read from a table whose questions are to be answered."""


def read_table(
    path: Path, *, name: str | None = None, validation_fraction: float = 0.1, seed: int = 0, answered: bool = True
) -> Dataset[Sample]:
    """Read a CSV or JSONL table of questions, or a folder with one `questions.csv` or `questions.jsonl`.

    Required columns are `image` (path relative to the table), `question` and `answer`. In JSONL, `answer` may be a list
    of accepted answers; the first is the training target. Optional columns are

    - `id`: default `row-<line>`;
    - `answer_type`: open or closed; default closed if the answer is yes or no;
    - `group`: samples that must stay in one split, such as those of a patient; default the columns that name a patient
      (`patient_id`, `MRN`, see `identifying_columns.patient_columns`), else the image;
    - `split`: train, validation or test;
    - `question_type`.

    Other columns are ignored. Unless groups are given, images of equal content are in one group. Without a `split`
    column, the split of a group follows from a hash of its name (70 : 15 : 15), so that adding rows moves no group to
    another split unless it joins two groups. If there are no validation rows, `cut_validation` moves
    `validation_fraction` of the training rows by group.

    With `answered=False` the columns `answer`, `answer_type` and `split` are not read, and all rows are in the test
    split.

    Raises:
        UserError: the table is invalid. The message names the file, the line and the fix.
    """
    file = _table_file(path)
    root = file.parent
    default_name = root.resolve().name if file.name in FOLDER_NAMES else file.stem
    required = REQUIRED if answered else REQUIRED[:2]
    known = COLUMNS if answered else tuple(name for name in COLUMNS if name not in ONLY_ANSWERED)
    rows = read_rows(file, lambda names, place: _check_names(names, place, known, required))
    if not rows:
        raise UserError(f"{file} has no rows; it needs the columns {', '.join(required)}")

    samples: list[Sample] = []
    lines: dict[str, int] = {}
    places: dict[Path, str] = {}
    unanswered: dict[int, Split] = {line: "test" for line, _ in rows}
    splits = _given_splits(rows, file) if answered else unanswered
    for line, cells in rows:
        sample = _sample(cells, line, file, splits.get(line, "train"), answered)
        if sample.id in lines:
            raise UserError(f"{file}:{line}: id {sample.id!r} is also used in line {lines[sample.id]}; make ids unique")
        lines[sample.id] = line
        places.setdefault(sample.image, f"{file.name}:{line}")
        samples.append(sample)
    require_images(places, file)
    data = Dataset(name or default_name, "given" if splits else "by-group-hash", root, samples)
    if not answered:
        return data

    columns = list(dict.fromkeys(name for _, cells in rows for name in cells))

    def identifiers(name: str) -> dict[str, str]:
        return {
            sample.id: as_identifier(cells.get(name), f"{file}:{line}: {name}")
            for sample, (line, cells) in zip(samples, rows, strict=True)
        }

    groups = identifiers("group")
    patients = {column: identifiers(column) for column in patient_columns(columns)}
    by_id = {sample.id: cells for sample, (_, cells) in zip(samples, rows, strict=True)}
    examinations = {
        column: {id: cells.get(column) for id, cells in by_id.items()} for column in examination_columns(columns)
    }
    if not any(groups.values()):
        samples = group_by_content(group_by_patient(samples, patients, data.notes), data.notes)
    if not splits:
        samples = [replace(sample, split=_split_by_hash(sample.group)) for sample in samples]
    if not any(sample.split == "validation" for sample in samples):
        samples = cut_validation(samples, validation_fraction, seed)
    data.samples = samples
    data.findings += column_findings(groups, patients, examinations, samples)
    data.findings += unread_columns(by_id, columns)
    data.findings += folder_findings((s.image, s.split) for s in without_group(samples, groups, patients))
    note_leaks(data)
    data.findings += mixed_types([cells.get("answer") for _, cells in rows], f"{file.name}: column answer")
    if not splits and not data.split("test"):
        data.notes.append("The table has no split column and too few groups for a test split.")
    return data


def _table_file(path: Path) -> Path:
    if path.is_dir():
        tables = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
        if len(tables) != 1:
            state = "both" if tables else "neither"
            raise UserError(f"{path} contains {state} of {' and '.join(FOLDER_NAMES)}; keep one, or give the file")
        return tables[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a CSV or JSONL file, or the folder with {FOLDER_NAMES[0]}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is not named as a table; the name must end in {' or '.join(SUFFIXES)}")
    return path


def _check_names(names: list[str], place: str, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    check_column_names(names, known, place)
    absent = [name for name in required if name not in names]
    if absent:
        raise UserError(f"{place}: no column {absent[0]!r}; the required columns are {', '.join(required)}")


def _given_splits(rows: list[Row], file: Path) -> dict[int, Split]:
    """Return the split of every line, or an empty dict if the table has no splits."""
    splits: dict[int, Split] = {}
    without = 0
    for line, cells in rows:
        split = as_choice(cells.get("split"), SPLIT_NAMES, f"{file}:{line}: split")
        if split:
            splits[line] = split
        else:
            without = without or line
    if splits and without:
        raise UserError(
            f"{file}:{without}: the split is missing, but other rows have one; give every row a split, or none"
        )
    return splits


def _sample(cells: Mapping[str, Any], line: int, file: Path, split: Split, answered: bool) -> Sample:
    def place(column: str) -> str:
        return f"{file}:{line}: {column}"

    image, question = as_text(cells["image"], place("image")), as_text(cells["question"], place("question"))
    answers = as_answers(cells["answer"], place("answer")) if answered else ("",)
    answer_type = as_choice(cells.get("answer_type"), ANSWER_TYPES, place("answer_type")) if answered else None
    filled = {"image": image, "question": question, "answer": not answered or (all(answers) and answers)}
    for column, value in filled.items():
        if not value:
            raise UserError(f"{file}:{line}: the {column} is empty; fill it in or delete the row")
    path = resolve_image(file.parent, image, f"{file}:{line}")
    return Sample(
        id=as_identifier(cells.get("id"), place("id")) or f"row-{line}",
        image=path,
        question=question,
        answers=answers,
        answer_type=answer_type or inferred_type(answers[0]),
        group=as_identifier(cells.get("group"), place("group")) or path.relative_to(file.parent).as_posix(),
        split=split,
        question_type=as_text(cells.get("question_type"), place("question_type")),
    )


def _split_by_hash(group: str) -> Split:
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.70 else "validation" if share < 0.85 else "test"


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the table that `data.root` names."""
    if config.root is None:
        raise UserError("data.name=table needs data.root=FILE, a CSV or JSONL table with image, question, answer")
    return read_table(Path(config.root), validation_fraction=config.validation_fraction, seed=config.split_seed)

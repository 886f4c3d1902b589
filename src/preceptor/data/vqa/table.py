"""Read a user's own questions from a CSV or JSONL table with `image, question, answer` and optional columns."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import SPLIT_NAMES, cut_validation, note_leaks
from preceptor.data.texts import read_text
from preceptor.data.types import AnswerType, Dataset, Sample, Split
from preceptor.data.vqa.answers import inferred_type
from preceptor.errors import UserError, nearest

REQUIRED = ("image", "question", "answer")
COLUMNS = (*REQUIRED, "id", "answer_type", "group", "split", "question_type")
ANSWER_TYPES: dict[str, AnswerType] = {kind: kind for kind in get_args(AnswerType)}
FOLDER_NAMES = ("questions.jsonl", "questions.csv")

T = TypeVar("T")
Row = tuple[int, dict[str, Any]]
"""A line number, counted from 1, and its cells by column name."""


def read_table(
    path: Path, *, name: str | None = None, validation_fraction: float = 0.1, seed: int = 0, answered: bool = True
) -> Dataset[Sample]:
    """Read a CSV or JSONL table of questions, or a folder with one `questions.csv` or `questions.jsonl`.

    Required columns are `image` (path relative to the table), `question` and `answer`. In JSONL, `answer` may be a list
    of accepted answers; the first is the training target. Optional columns are

    - `id`: default `row-<line>`;
    - `answer_type`: open or closed; default closed if the answer is yes or no;
    - `group`: samples that must stay in one split, such as those of a patient; default the image;
    - `split`: train, validation or test;
    - `question_type`.

    Other columns are ignored. Without a `split` column, the split of a group follows from a hash of its name
    (70 : 15 : 15), so that adding rows never moves a group to another split. If there are no validation rows,
    `cut_validation` moves `validation_fraction` of the training rows by group.

    With `answered=False` answers may be missing, and all rows are in the test split.

    Raises:
        UserError: the table is invalid. The message names the file, the line and the fix.
    """
    file = _table_file(path)
    read_rows = _READERS[file.suffix.lower()]
    root = file.parent
    default_name = root.resolve().name if file.name in FOLDER_NAMES else file.stem
    required = REQUIRED if answered else REQUIRED[:2]
    rows = list(read_rows(read_text(file, "save the table with the encoding UTF-8"), file, required))
    if not rows:
        raise UserError(f"{file} has no rows; it needs the columns {', '.join(required)}")

    samples: list[Sample] = []
    lines: dict[str, int] = {}
    places: dict[Path, str] = {}
    unanswered: dict[int, Split] = {line: "test" for line, _ in rows}
    splits = _given_splits(rows, file) if answered else unanswered
    for line, cells in rows:
        sample = _sample(cells, line, file, splits, answered)
        if sample.id in lines:
            raise UserError(f"{file}:{line}: id {sample.id!r} is also used in line {lines[sample.id]}; make ids unique")
        lines[sample.id] = line
        places.setdefault(sample.image, f"line {line}")
        samples.append(sample)
    require_images(places)

    if answered and not any(sample.split == "validation" for sample in samples):
        samples = cut_validation(samples, validation_fraction, seed)
    data = Dataset(name or default_name, "given" if splits else "by-group-hash", root, samples)
    note_leaks(data)
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
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} is not named as a table; the name must end in {' or '.join(_READERS)}")
    return path


def _csv_rows(text: str, file: Path, required: tuple[str, ...]) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None:
                header = [field.strip() for field in fields]
                _check_header(header, line, file, required)
            elif fields:
                if len(fields) != len(header):
                    raise UserError(
                        f"{file}:{line}: {len(fields)} fields, but the header has {len(header)}; put texts with "
                        "commas or line breaks in double quotes"
                    )
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1  # a quoted field may span lines; report the first one
    except csv.Error as error:
        raise UserError(f"{file}:{line}: invalid CSV ({error}); correct the quotes of this row") from error


def _check_header(header: list[str], line: int, file: Path, required: tuple[str, ...]) -> None:
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise UserError(f"{file}:{line}: the header {header[0]!r} has no comma; save the table with commas")
    repeated = sorted({name for name in header if header.count(name) > 1 and name in COLUMNS})
    if repeated:
        raise UserError(f"{file}:{line}: column {repeated[0]!r} occurs twice; keep one")
    _check_names(header, f"{file}:{line}", required)


def _jsonl_rows(text: str, file: Path, required: tuple[str, ...]) -> Iterator[Row]:
    seen: set[tuple[str, ...]] = set()
    # str.splitlines would also split at characters such as U+2028, which are legal inside a JSON string.
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            cells = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{line}: invalid JSON ({error}); every line must be one JSON object") from error
        if not isinstance(cells, dict):
            raise UserError(f"{file}:{line}: {type(cells).__name__} instead of a JSON object such as {{'image': ...}}")
        if tuple(cells) not in seen:
            seen.add(tuple(cells))
            _check_names(list(cells), f"{file}:{line}", required)
        yield line, cells


_READERS: dict[str, Callable[[str, Path, tuple[str, ...]], Iterator[Row]]] = {".csv": _csv_rows, ".jsonl": _jsonl_rows}


def _check_names(names: list[str], place: str, required: tuple[str, ...]) -> None:
    """Raise UserError for missing required columns and for misspelled names, which would silently count as missing."""
    for name in names:
        normalised = name.strip().lower().replace(" ", "_").replace("-", "_")
        close = difflib.get_close_matches(normalised, COLUMNS, n=1, cutoff=0.8) if name not in COLUMNS else []
        if close and close[0] not in names:
            raise UserError(f"{place}: unknown column {name!r}; did you mean {close[0]!r}? Rename the column")
    absent = [name for name in required if name not in names]
    if absent:
        raise UserError(f"{place}: no column {absent[0]!r}; the required columns are {', '.join(required)}")


def _given_splits(rows: list[Row], file: Path) -> dict[int, Split]:
    """Return the split of every line, or an empty dict if the table has no splits."""
    splits: dict[int, Split] = {}
    without = 0
    for line, cells in rows:
        value = _text(cells, "split", line, file)
        if value:
            splits[line] = _choice(value, SPLIT_NAMES, "split", line, file)
        else:
            without = without or line
    if splits and without:
        raise UserError(
            f"{file}:{without}: the split is missing, but other rows have one; give every row a split, or none"
        )
    return splits


def _sample(cells: Mapping[str, Any], line: int, file: Path, splits: Mapping[int, Split], answered: bool) -> Sample:
    image, question = _text(cells, "image", line, file), _text(cells, "question", line, file)
    answers = _answers(cells, line, file) if answered else ("",)
    filled = {"image": image, "question": question, "answer": not answered or (all(answers) and answers)}
    for column, value in filled.items():
        if not value:
            raise UserError(f"{file}:{line}: the {column} is empty; fill it in or delete the row")
    path = resolve_image(file.parent, image, f"{file}:{line}")
    group = _text(cells, "group", line, file) or path.relative_to(file.parent).as_posix()
    kind = _text(cells, "answer_type", line, file)
    return Sample(
        id=_text(cells, "id", line, file) or f"row-{line}",
        image=path,
        question=question,
        answers=answers,
        answer_type=(_choice(kind, ANSWER_TYPES, "answer_type", line, file) if kind else inferred_type(answers[0])),
        group=group,
        split=splits[line] if splits else _split_by_hash(group),
        question_type=_text(cells, "question_type", line, file),
    )


def _text(cells: Mapping[str, Any], column: str, line: int, file: Path) -> str:
    return _as_text(cells.get(column), column, line, file)


def _as_text(value: Any, column: str, line: int, file: Path) -> str:
    if value is None or value != value:  # pandas writes NaN for a missing value
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{file}:{line}: {column} is {json.dumps(value)[:60]}; write a text in quotes")
    text = str(value).strip()
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise UserError(
            f"{file}:{line}: {column} contains half of a surrogate pair (\\ud800 to \\udfff); correct the encoding"
        )
    return text


def _answers(cells: Mapping[str, Any], line: int, file: Path) -> tuple[str, ...]:
    answer = cells["answer"]
    return tuple(_as_text(value, "answer", line, file) for value in (answer if isinstance(answer, list) else [answer]))


def _choice(value: str, known: Mapping[str, T], column: str, line: int, file: Path) -> T:
    if value.lower() not in known:
        raise UserError(f"{file}:{line}: {column} {value!r} is not known{nearest(value.lower(), known)}")
    return known[value.lower()]


def _split_by_hash(group: str) -> Split:
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.70 else "validation" if share < 0.85 else "test"


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the table that `data.root` names."""
    if config.root is None:
        raise UserError("data.name=table needs data.root=FILE, a CSV or JSONL table with image, question, answer")
    return read_table(Path(config.root), validation_fraction=config.validation_fraction, seed=config.split_seed)

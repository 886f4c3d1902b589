"""Tables of questions in CSV, JSON Lines and parquet with cells of any type, against the rows that were written."""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.parquet import read_parquet
from preceptor.data.vqa.table import read_table
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely, texts
from tests.fuzz.outcome import Wrong, attempt, command, require
from tests.fuzz.target import Target

IMAGES = tuple(f"{folder}{name}.png" for folder in ("", "p1/", "p2/") for name in "ab")
GROUPS = ("group", "patient_id", "patient", "subject", "PatientID", "MRN")
"""Columns that may say whose image it is."""

WORDS = ("yes", "no", "Yes.", "left lung", "1", "1.0", "2.50", "é", "肺", "normal, mild", 'a "b"', "line\nbreak")
WORD = st.sampled_from(WORDS)
ANY = st.one_of(WORD, texts(), json_values())
PERSON = st.sampled_from([0, "0", 1, 1.0, "1", "p1", "p2", "P1 ", "é", "e\u0301", "", None])
PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "image": st.sampled_from(IMAGES),
    "question": st.one_of(WORD, st.integers(-3, 3)),
    "answer": st.one_of(WORD, WORD, st.sampled_from([1, 1.0, 2.5, -0.0, 0])),
    "id": st.one_of(st.uuids().map(str), st.integers(0, 999), st.sampled_from([0, "0", 1.0])),
    "answer_type": st.sampled_from(["open", "closed", "Open", "OPEN ", "", None]),
    "split": st.sampled_from(["train", "test", "val", "Train", "validation", "dev"]),
    "question_type": WORD,
    **dict.fromkeys(GROUPS, PERSON),
    "extra": json_values(),
}
ODD = {**dict.fromkeys(PLAIN, ANY), "image": st.one_of(st.sampled_from(IMAGES), texts(), json_values(2))}


@dataclass(frozen=True)
class TableInput:
    """The rows of a table, how they are written, and damage to the bytes."""

    kind: str
    rows: tuple[dict[str, Any], ...]
    columns: tuple[str, ...]
    header: tuple[str, ...]
    delimiter: str
    quoting: int
    line_end: str
    bom: bool
    encoding: str
    mutations: tuple[Mutation, ...]
    by_command: bool


@st.composite
def tables(draw: st.DrawFn) -> TableInput:
    optional = draw(st.lists(st.sampled_from(sorted(PLAIN.keys() - {"image", "question", "answer"})), max_size=3))
    columns = list(dict.fromkeys(["image", "question", "answer", *optional]))
    odd = draw(st.lists(st.sampled_from(columns), max_size=2))
    cells = {name: st.one_of(PLAIN[name], ODD[name]) if name in odd else PLAIN[name] for name in columns}
    rows = [{name: draw(cells[name]) for name in columns} for _ in range(draw(st.integers(1, 6)))]
    header = list(columns)
    if draw(rarely(16)):
        place = draw(st.integers(0, len(header) - 1))
        header[place] = draw(
            st.one_of(texts(), st.sampled_from(["Image", "anwser", "question ", "split", "", "image"]))
        )
    if draw(rarely(16)) and len(rows) > 1:
        rows[-1].pop(draw(st.sampled_from(columns)))
    return TableInput(
        draw(st.sampled_from(["csv", "jsonl", "jsonl"])),
        tuple(rows),
        tuple(columns),
        tuple(header),
        draw(mostly(st.just(","), st.sampled_from(";\t|"), 12)),
        draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])),
        draw(st.sampled_from(["\n", "\r\n", "\r"])),
        draw(st.booleans()),
        draw(mostly(st.just("utf-8"), st.sampled_from(["utf-16", "latin-1"]), 16)),
        draw(DAMAGE),
        draw(rarely(25)),
    )


def encode(case: TableInput) -> bytes:
    """Return the bytes of the undamaged table."""
    names = dict(zip(case.columns, case.header, strict=True))
    if case.kind == "jsonl":
        rows = [{names.get(key, key): value for key, value in row.items()} for row in case.rows]
        end = "\n" if case.line_end == "\n" else "\r\n"
        text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter=case.delimiter, quoting=case.quoting, lineterminator=case.line_end)
        writer.writerow(case.header)
        for row in case.rows:
            writer.writerow([written(row.get(name)) for name in case.columns])
        text = buffer.getvalue()
    data = text.encode(case.encoding, errors="surrogatepass" if case.encoding == "utf-8" else "replace")
    return b"\xef\xbb\xbf" + data if case.bom and case.encoding == "utf-8" else data


def written(value: Any) -> Any:
    """Return a cell as pandas writes it."""
    if value is None:
        return ""
    return value if isinstance(value, str | int | float) else str(value)


def write_images(folder: Path) -> None:
    """Write the images of all tables, each of another content."""
    for number, name in enumerate(IMAGES):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))


def picture(number: int) -> bytes:
    """Return a small PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (2, 2), 10 * number).save(file, "PNG")
    return file.getvalue()


def check(case: TableInput, folder: Path) -> bool:
    """Read a table and compare its samples with the rows that an independent reader finds."""
    write_images(folder)
    data = mutate(encode(case), case.mutations)
    path = folder / f"t.{case.kind}"
    path.write_bytes(data)
    if case.by_command:
        return command("doctor", path, place=path.name).accepted
    outcome = attempt(lambda: read_table(path), place=path.name)
    if not outcome.accepted:
        return False
    rows = csv_rows(data) if case.kind == "csv" else json_rows(data)
    compare(outcome.value, rows, folder, case.kind == "csv")
    return True


def csv_rows(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a CSV table by column."""
    text = data.decode("utf-8-sig")
    first = text.splitlines()[0] if text.strip() else ""
    delimiter = max(",;\t|", key=lambda sign: (first.count(sign), sign == ","))
    lines = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    header = [name.strip() for name in lines[0]]
    return [dict(zip(header, line, strict=False)) for line in lines[1:]]


def json_rows(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of JSON Lines. A repeated key is refused: which one counts is open."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len({key for key, _ in pairs}) == len(pairs), "a JSON object with a repeated key was read", pairs)
        return dict(pairs)

    lines = data.decode("utf-8-sig").split("\n")
    return [json.loads(line, object_pairs_hook=unique) for line in lines if line.strip()]


def missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def texts_of(value: Any) -> set[str]:
    """Return the texts that a cell may become. Numbers may lose a fraction of zeros."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Wrong(f"a {type(value).__name__} became a text", repr(value)[:100])
    if isinstance(value, str):
        return {value.strip(), " ".join(value.split())}
    if isinstance(value, float) and not math.isfinite(value):
        raise Wrong("a number that is not finite became a text", repr(value))
    return {str(value), str(int(value))} if value == int(value) else {str(value), json.dumps(value)}


def compare(data: Dataset[Sample], rows: list[dict[str, Any]], folder: Path, from_csv: bool) -> None:
    """Raise Wrong unless the samples are those of the rows, in their order, and no group is divided."""
    require(len(data.samples) == len(rows), "another number of rows", f"{len(data.samples)} of {len(rows)}")
    names: dict[Any, str] = {}
    for sample, row in zip(data.samples, rows, strict=True):
        require(str(sample.image.relative_to(folder)) == str(Path(row["image"].strip())), "another image", sample.image)
        require(
            " ".join(sample.question.split()) in {" ".join(text.split()) for text in texts_of(row["question"])},
            "another question",
            sample.question,
        )
        given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        require(len(given) == len(sample.answers) and given, "another number of answers", sample.answers)
        for answer, cell in zip(sample.answers, given, strict=True):
            require(
                " ".join(answer.split()) in {" ".join(text.split()) for text in texts_of(cell)},
                "another answer",
                answer,
            )
            # 1 and 1.0 are one number, and must not become two answers.
            if isinstance(cell, int | float) and not from_csv:
                require(names.setdefault(float(cell), answer) == answer, "one number became two answers", answer)
        if not missing(row.get("id")):
            require(sample.id in texts_of(row["id"]), "another id", sample.id)
        if not missing(row.get("split")):
            wanted = {"val": "validation", "valid": "validation", "dev": "validation"}
            word = str(row["split"]).strip().lower()
            require(sample.split in (wanted.get(word, word), "validation"), "another split", sample.split)
        if not missing(row.get("answer_type")):
            require(sample.answer_type == str(row["answer_type"]).strip().lower(), "another answer type")
        if not missing(row.get("question_type")):
            require(sample.question_type in texts_of(row["question_type"]), "another question type")
    if any(not missing(row.get("split")) for row in rows):
        return
    for column in ("image", *GROUPS):
        parts: dict[str, set[str]] = {}
        for sample, row in zip(data.samples, rows, strict=True):
            if not missing(row.get(column)):
                parts.setdefault(unicodedata.normalize("NFC", str(row[column]).strip()), set()).add(sample.split)
        divided = [name for name, splits in parts.items() if len(splits) > 1]
        told = any(column in finding.reason for finding in data.findings) or any(column in note for note in data.notes)
        shared = column == "image" and any(not missing(row.get(name)) for row in rows for name in GROUPS)
        what = "an image" if column == "image" else "a patient"
        require(not divided or told or data.leaking or shared, f"{what} is in several splits", (column, divided))


TARGET = Target(tables(), check, 400)


@dataclass(frozen=True)
class ParquetInput:
    """The columns of parquet files of a training and a test split, and damage to the bytes of the first."""

    questions: tuple[Any, ...]
    answers: tuple[Any, ...]
    images: tuple[Any, ...]
    columns: tuple[str, ...]
    shards: tuple[str, ...]
    mutations: tuple[Mutation, ...]


@st.composite
def parquets(draw: st.DrawFn) -> ParquetInput:
    count = draw(st.integers(1, 4))
    plain = st.one_of(st.sampled_from(WORDS), st.none(), st.text(max_size=8).filter(lambda text: text.isprintable()))
    kinds = [
        plain,
        plain,
        st.integers(-5, 5),
        st.booleans(),
        st.sampled_from([0.5, 1.0, float("nan")]),
        st.lists(st.sampled_from(WORDS), max_size=2),
        st.fixed_dictionaries({"text": st.sampled_from(WORDS)}),
        st.binary(max_size=4),
    ]
    column = st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=count, max_size=count))
    image = mostly(st.integers(0, 3), st.sampled_from([None, b"", b"no image"]), 16)
    return ParquetInput(
        tuple(draw(st.one_of(st.lists(st.sampled_from(WORDS), min_size=count, max_size=count), column))),
        tuple(draw(column)),
        tuple(draw(st.lists(image, min_size=count, max_size=count))),
        ("image", "question", draw(mostly(st.just("answer"), st.just("label"), 16))),
        draw(
            st.sampled_from(
                [("train-00000-of-00001", "test-00000-of-00001")] * 4
                + [
                    ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"),
                    ("train-00000-of-00003", "test-00000-of-00001"),
                    ("train-00000-of-00002", "train-00000-of-00002 (1)", "test-00000-of-00001"),
                    ("train-00000-of-00001",),
                    ("train-00000-of-00001", "validation-00001-of-00002", "test-00000-of-00001"),
                ]
            )
        ),
        draw(DAMAGE),
    )


def check_parquet(case: ParquetInput, folder: Path) -> bool:
    """Read parquet files and compare their samples with the columns that were written."""
    contents = [{"bytes": picture(cell) if isinstance(cell, int) else cell, "path": None} for cell in case.images]
    try:
        table = pyarrow.table(
            dict(zip(case.columns, (contents, list(case.questions), list(case.answers)), strict=True))
        )
    except (pyarrow.ArrowException, UnicodeEncodeError):
        return False
    for number, shard in enumerate(case.shards):
        # Tables of equal content are refused.
        told = table.append_column("shard", [[number] * len(table)])
        parquet.write_table(told, folder / f"{shard}.parquet")
    damaged = folder / f"{case.shards[0]}.parquet"
    damaged.write_bytes(mutate(damaged.read_bytes(), case.mutations))
    scratch = folder / "scratch"
    outcome = attempt(lambda: read_parquet(folder, name="path-vqa", variant="", scratch=scratch), place=folder.name)
    if not outcome.accepted:
        return False
    numbers = [tuple(map(int, shard.partition(" ")[0].split("-")[1::2])) for shard in case.shards]
    kinds = [shard.partition("-")[0] for shard in case.shards]
    for kind in set(kinds):
        found = sorted(number for number, name in zip(numbers, kinds, strict=True) if name == kind)
        total = found[0][1]
        require(found == [(index, total) for index in range(total)], "a shard is missing or repeated", case.shards)
    if case.mutations:
        return True
    rows = list(zip(case.questions, case.answers, strict=True)) * len(case.shards)
    require(len(outcome.value.samples) == len(rows), "another number of rows", len(outcome.value.samples))
    for sample, (question, answer) in zip(outcome.value.samples, rows, strict=True):
        for text, cell in ((sample.question, question), (sample.answer, answer)):
            cells = cell if isinstance(cell, list) and cell else [cell]
            require(text in {" ".join(found.split()) for found in texts_of(cells[0])}, "another text", (text, cell))
    return True


PARQUET = Target(parquets(), check_parquet, 150)

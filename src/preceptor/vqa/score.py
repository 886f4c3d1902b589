"""Score a file of predictions, whoever made it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from preceptor.data.types import AnswerType, Dataset, Prediction, Sample
from preceptor.data.vqa.answers import inferred_type
from preceptor.errors import UserError, nearest
from preceptor.normalizers import NORMALISERS
from preceptor.vqa.metrics import Scores, score
from preceptor.vqa.protocols import Metric, Protocol, protocol_named, protocols_for, settings_for

References = Literal["data", "file"]
_NO_IMAGE = Path()
_FORM = '{"id": ..., "answer": ...}'
# Where these stand in a line, an evaluation of ours wrote it, and its `answer` is what was said.
_OURS = {"answers", "target", "correct", "score"}
_MOST_LISTED = 5


def score_file(
    path: Path,
    protocol: str,
    *,
    root: Path | None = None,
    references: References = "data",
    normaliser: str | None = None,
    metric: Metric | None = None,
) -> tuple[Scores, list[str]]:
    """Return the scores of a JSONL file of predictions under a protocol, and notes to be shown beside them.

    A line has `id` (the data set's, see `Sample.id`) and `answer`, the text as the system said it, or `prediction`; not
    both, unless the line is one of ours: with many systems `answer` is the right answer then. What is right comes from
    the data set of the protocol, read from `root` or PRECEPTOR_DATA; an id of no public data set means the table at
    `root`. With ``references="file"`` it comes from the lines themselves, which then need `answers` (a list) or
    `target`, and may have `answer_type` and `question_type`: the files that evaluation writes do.

    `normaliser` and `metric` replace the protocol's; a note says so, since the number then compares with no other.

    Raises:
        UserError: names the file, the line and the fix; also where predictions are missing or given twice.
    """
    rows = _read(path)
    predictions = [Prediction(row["id"], _said(row, path, number), _probability(row)) for number, row in rows]
    if references == "file":
        chosen, notes = protocol_alone(protocol, normaliser), ["References are those of the file itself."]
        samples = [_reference(row, path, number) for number, row in rows]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            data = read_for(protocol, root, Path(scratch))
        samples, chosen, notes = data.split("test"), protocol_named(data, protocol), list(data.notes)
        notes += _check_ids(path, rows, [sample.id for sample in samples if chosen.select(sample)], protocol)
    other = replace(chosen, normaliser=normaliser or chosen.normaliser, metric=metric or chosen.metric)
    for name in ("normaliser", "metric"):
        if getattr(other, name) != getattr(chosen, name):
            notes.append(f"The {name} is {getattr(other, name)}, not the protocol's {getattr(chosen, name)}.")
    chosen = other
    if chosen.normaliser not in NORMALISERS:
        raise UserError(f"unknown answer normaliser {chosen.normaliser!r}{nearest(chosen.normaliser, NORMALISERS)}")
    return score(samples, predictions, chosen), notes


def read_for(protocol: str, root: Path | None, scratch: Path) -> Dataset[Sample]:
    """Return the data set that a protocol scores: the public one of its id, or the table at `root`.

    Raises UserError where the id is of no public data set and there is no table, or the data cannot be read.
    """
    # Here, so that a file with its own references is scored without their half second.
    from preceptor.vqa.config import DataConfig
    from preceptor.vqa.data import read_data

    settings: dict[str, Any] | None = settings_for(protocol)
    if settings is None:
        if root is None:
            raise UserError(
                f"protocol {protocol!r} is of no public data set; give --root TABLE (a CSV or JSONL file with the "
                "answers), or --references file; of answered dialogues the id ends in /birdeval or /strict"
            )
        settings = {"name": "table"}
    return read_data(DataConfig(**settings, root=str(root) if root else None), scratch, needed=("test",))


def protocol_alone(id: str, normaliser: str | None = None) -> Protocol:
    """Return a protocol for the questions that a file brings along: all of them count."""
    settings = settings_for(id)
    if settings is None:
        return Protocol(id, normaliser or "mevf", lambda sample: True, "all questions of the file")
    data: Dataset[Sample] = Dataset(
        settings["name"], settings.get("language", "") or settings.get("variant", ""), Path("."), []
    )
    known = {protocol.id.removesuffix("/published"): protocol for protocol in protocols_for(data)}
    if id.removesuffix("/published") not in known:
        raise UserError(f"there is no protocol {id!r}{nearest(id, known)}")
    return replace(known[id.removesuffix("/published")], id=id, select=lambda sample: True)


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSONL file of {_FORM}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file with the encoding UTF-8") from error
    rows: list[tuple[int, dict[str, Any]]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: broken JSON ({error}); every line is {_FORM}") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
            raise UserError(f"{path}:{number}: no id; every line is {_FORM}")
        row["id"] = str(row["id"])
        if row["id"] in lines:
            raise UserError(
                f"{path}:{number}: id {row['id']!r} is that of line {lines[row['id']]} too; keep one prediction for it"
            )
        lines[row["id"]] = number
        rows.append((number, row))
    if not rows:
        raise UserError(f"{path} holds no predictions; every line is {_FORM}")
    return rows


def _check_ids(path: Path, rows: list[tuple[int, dict[str, Any]]], wanted: list[str], protocol: str) -> list[str]:
    """Refuse a file that lacks questions of the protocol; return a note on predictions for other questions."""
    known, given = set(wanted), {row["id"] for _, row in rows}
    outside = [f"{row['id']!r} (line {number})" for number, row in rows if row["id"] not in known]
    missing = [repr(id) for id in wanted if id not in given]
    if outside and len(outside) == len(rows):
        raise UserError(
            f"{path}: none of its {len(outside)} ids is of {protocol}, whose first is {min(known)!r}; ids must be the "
            "data set's"
        )
    if missing:
        others = f"; {len(outside)} ids are of no question of it: {_first(outside)}" if outside else ""
        raise UserError(
            f"{path}: {len(missing)} of {len(wanted)} questions of {protocol} have no prediction: {_first(missing)}"
            f'{others}; give each a line, with the answer "" where the system has none'
        )
    return (
        [f"{len(outside)} predictions for questions outside the protocol are left out: {_first(outside)}."]
        if outside
        else []
    )


def _first(items: list[str]) -> str:
    return ", ".join(items[:_MOST_LISTED]) + (", ..." if len(items) > _MOST_LISTED else "")


def _said(row: dict[str, Any], path: Path, number: int) -> str:
    if "answer" in row and "prediction" in row and not row.keys() >= _OURS:
        raise UserError(
            f"{path}:{number}: id {row['id']!r} has both answer and prediction, and one of them may be the right "
            "answer; keep what the system said as answer, and what is right as answers"
        )
    said = row.get("answer", row.get("prediction"))
    if not isinstance(said, str):
        raise UserError(f"{path}:{number}: answer is {said!r}; write the answer as a text, empty where there is none")
    return said


def _probability(row: dict[str, Any]) -> float:
    value = row.get("probability")
    return float(value) if isinstance(value, int | float) else 0.0


def _reference(row: dict[str, Any], path: Path, number: int) -> Sample:
    given = row.get("answers", row.get("target"))
    answers = tuple(given) if isinstance(given, list) else (given,)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{path}:{number}: no answers to score against; add answers or target, or --references data")
    kind = row.get("answer_type") or inferred_type(answers[0])
    if kind not in ("open", "closed"):
        raise UserError(f"{path}:{number}: answer_type {kind!r} is not known; known: closed, open")
    question_type = str(row.get("question_type") or "")
    return Sample(row["id"], _NO_IMAGE, "", answers, cast(AnswerType, kind), "", "test", question_type)

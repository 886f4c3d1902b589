"""Score a file of answered dialogues, whoever made it: the rows bring the right answers along."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from preceptor.data.types import GroundingTask
from preceptor.errors import UserError, nearest
from preceptor.grounding.metrics import DESCRIBES, row_score, score_rows
from preceptor.vqa.protocols import settings_for

NEEDED = ("id", "task", "modality", "target", "prediction")
TEXTS = ("task", "modality", "target", "prediction")
MOST_BYTES = 2 * 2**30
"""A larger file is refused before it is read."""
MOST_CHARACTERS = 100_000
"""An answer of more is no answer, and would keep the scorers busy for hours."""
_FORM = '{"id": ..., "task": ..., "modality": ..., "target": ..., "prediction": ...}'


def scores_dialogues(protocol: str) -> bool:
    """Return whether a protocol's id is one of dialogues: ``DATA/SPLIT/birdeval``, ``DATA/SPLIT/strict``."""
    return protocol.rpartition("/")[2] in DESCRIBES and settings_for(protocol) is None


def score_dialogue_file(path: Path, protocol: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the results of a JSONL file of answers, and its rows with the `score` of each (None: no boxes to find).

    A line has the keys `NEEDED`; `turn`, the number of the question in its dialogue, is 1 where it is missing, and
    other keys stay as they are. The results have ``stage`` (the file's name), ``protocols`` (`score_rows` by
    `protocol`), ``describes`` and ``notes``, as those of a run.

    Raises:
        UserError: names the file, the line and the fix.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path} holds no answers; every line is {_FORM}")
    kind = protocol.rpartition("/")[2]
    results = {
        "stage": path.stem,
        "protocols": {protocol: score_rows(rows, kind)},
        "describes": {protocol: DESCRIBES[kind]},
        "notes": ["The right answers are those of the file itself."],
    }
    return results, [row | {"score": row_score(row, kind)} for row in rows]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: broken JSON ({error}); every line is {_FORM}") from error
        absent = [key for key in NEEDED if key not in row] if isinstance(row, dict) else list(NEEDED)
        if absent:
            raise UserError(f"{place}: no {', '.join(absent)}; every line is {_FORM}")
        row = {"turn": 1} | row
        _check(row, place)
        row["id"] = str(row["id"])
        before = seen.setdefault((row["id"], row["turn"]), number)
        if before != number:
            raise UserError(
                f"{place}: id {row['id']!r}, turn {row['turn']} is that of line {before} too; keep one answer to it"
            )
        yield row


def _check(row: dict[str, Any], place: str) -> None:
    if not isinstance(row["id"], str | int) or isinstance(row["id"], bool):
        raise UserError(f"{place}: id is {row['id']!r}; write a text or a whole number")
    if not isinstance(row["turn"], int) or isinstance(row["turn"], bool) or row["turn"] < 1:
        raise UserError(f"{place}: turn is {row['turn']!r}; write the number of the question in its dialogue, from 1")
    for key in TEXTS:
        if not isinstance(row[key], str):
            raise UserError(f"{place}: {key} is {str(row[key])[:80]!r}; write a text, empty where there is none")
        if len(row[key]) > MOST_CHARACTERS:
            raise UserError(f"{place}: {key} has {len(row[key]):,} characters; at most {MOST_CHARACTERS:,} are scored")
    if row["task"] not in get_args(GroundingTask):
        raise UserError(f"{place}: task {row['task']!r} is not known{nearest(row['task'], get_args(GroundingTask))}")


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, and at most {MOST_BYTES:,} are read; score it in parts")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSONL file of {_FORM}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file with the encoding UTF-8") from error

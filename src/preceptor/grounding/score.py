"""Score a file of answered dialogues of any system. The rows contain the references."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from preceptor.data.types import GroundingTask
from preceptor.errors import UserError, nearest
from preceptor.grounding.metrics import DESCRIBES, row_score, score_rows
from preceptor.scores import Scored, percent

NEEDED = ("id", "task", "modality", "target", "prediction")
TEXTS = ("task", "modality", "target", "prediction")
MOST_BYTES = 2 * 2**30
"""Larger files are refused before they are read."""
MOST_CHARACTERS = 100_000
"""Longer texts are refused: the caption scorers would take hours."""
_FORM = '{"id": ..., "task": ..., "modality": ..., "target": ..., "prediction": ...}'


def knows(protocol: str) -> bool:
    """Return whether a protocol's id is one of dialogues: ``DATA/VARIANT/birdeval`` or ``DATA/VARIANT/strict``."""
    return protocol.rpartition("/")[2] in DESCRIBES and protocol.count("/") != 1


def score_file(predictions: Path, protocol: str) -> Scored:
    """Score a JSONL file of answers, which contains the references.

    Args:
        predictions: a line has the keys `NEEDED`. `turn`, the number of the question in its dialogue, defaults to 1.
            Other keys are kept. The returned rows have the `score` of each answer, None if there are no boxes to find.
        protocol: id that ends in ``birdeval`` or ``strict``.

    Raises:
        UserError: names file, line and fix.
    """
    rows = list(_rows(predictions))
    if not rows:
        raise UserError(f"{predictions} contains no answers; every line is {_FORM}")
    kind = protocol.rpartition("/")[2]
    scores = score_rows(rows, kind)
    results = {
        "stage": predictions.stem,
        "protocols": {protocol: scores},
        "describes": {protocol: DESCRIBES[kind]},
        "notes": ["The references are those of the file itself.", *scores["notes"]],
    }
    lines = [
        [task, metric, percent(scores["tasks"][task][metric]), percent(mean[metric]), str(scores["tasks"][task]["n"])]
        for task, mean in scores["mean"].items()
        for metric in mean
    ]
    heads = ["task", "metric", "all", "mean over modalities", "n"]
    return Scored(results, [row | {"score": row_score(row, kind)} for row in rows], heads, lines)


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
                f"{place}: id {row['id']!r}, turn {row['turn']} is also in line {before}; keep one answer to it"
            )
        yield row


def _check(row: dict[str, Any], place: str) -> None:
    if not isinstance(row["id"], str | int) or isinstance(row["id"], bool):
        raise UserError(f"{place}: id is {row['id']!r}; write a text or a whole number")
    if not isinstance(row["turn"], int) or isinstance(row["turn"], bool) or row["turn"] < 1:
        raise UserError(f"{place}: turn is {row['turn']!r}; write the number of the question in its dialogue, from 1")
    for key in TEXTS:
        if not isinstance(row[key], str):
            raise UserError(f"{place}: {key} is {str(row[key])[:80]!r}; write a text, empty if there is none")
        if len(row[key]) > MOST_CHARACTERS:
            raise UserError(f"{place}: {key} has {len(row[key]):,} characters; the limit is {MOST_CHARACTERS:,}")
    if row["task"] not in get_args(GroundingTask):
        raise UserError(f"{place}: task {row['task']!r} is not known{nearest(row['task'], get_args(GroundingTask))}")


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}; score it in parts")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSONL file of {_FORM}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file with the encoding UTF-8") from error

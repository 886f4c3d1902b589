"""Score a file of answered dialogues of any system. The rows contain the references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from preceptor.data.grounding.box_detection import FormatDecision, decide_format, measure_format
from preceptor.data.grounding.box_formats import (
    BOX_FORMATS,
    CANONICAL,
    BoxFormat,
    Size,
    find_boxes,
    require_format,
    to_canonical,
    written_boxes,
)
from preceptor.data.texts import parse_json
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


def score_file(predictions: Path, protocol: str, box_format: str = "auto") -> Scored:
    """Score a JSONL file of answers, which contains the references.

    The boxes of the references are in thousandths, as in Qwen2-VL or Med-GRIT-270k. Those of the answers may be in any
    format of `data.grounding.box_formats`.

    Args:
        predictions: a line has the keys `NEEDED`. `turn`, the number of the question in its dialogue, defaults to 1.
            `width` and `height` of the image are needed for boxes in pixels only. Other keys are kept. The returned
            rows have the `score` of each answer, None if there are no boxes to find.
        protocol: id that ends in ``birdeval`` or ``strict``.
        box_format: format of the boxes in the answers. auto: it follows from syntax and values, or else from the
            agreement with the references; an error if neither is clear.

    Raises:
        UserError: names file, line and fix.
    """
    rows = list(_rows(predictions))
    if not rows:
        raise UserError(f"{predictions} contains no answers; every line is {_FORM}")
    kind = protocol.rpartition("/")[2]
    read, note = _read_boxes(rows, box_format, predictions)
    scores = score_rows(read, kind)
    results = {
        "stage": predictions.stem,
        "protocols": {protocol: scores},
        "describes": {protocol: DESCRIBES[kind]},
        "notes": ["The references are those of the file itself.", *note, *scores["notes"]],
    }
    lines = [
        [task, metric, percent(scores["tasks"][task][metric]), percent(mean[metric]), str(scores["tasks"][task]["n"])]
        for task, mean in scores["mean"].items()
        for metric in mean
    ]
    heads = ["task", "metric", "all", "mean over modalities", "n"]
    scored = [row | {"score": row_score(answer, kind)} for row, answer in zip(rows, read, strict=True)]
    return Scored(results, scored, heads, lines)


def _read_boxes(rows: list[dict[str, Any]], name: str, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows with the boxes of the `vg` answers in the canonical format, and a note about their format.

    Raises:
        UserError: the format is not known or not clear, or the references are in another format.
    """
    asked = [row for row in rows if row["task"] == "vg"]
    targets = _decide(asked, "target")
    if targets.format not in (None, CANONICAL) or targets.reason:
        raise UserError(
            f"{path}: the boxes of the targets are not (x1,y1),(x2,y2) in thousandths "
            f"({targets.reason or targets.format}); rewrite them"
        )
    how = "as --box-format says"
    if name == "auto":
        decision = _decide(asked, "prediction")
        if decision.boxes == 0 or decision.format == CANONICAL:
            return rows, []
        name, how = decision.format or "", "as their syntax and values show"
        if not name:
            name, how = _measured(asked, decision, path)
    source = require_format(name)
    read = [
        row | {"prediction": to_canonical(row["prediction"], name, _size(row, source, path))}
        if row["task"] == "vg"
        else row
        for row in rows
    ]
    boxes = [found for row in read if row["task"] == "vg" for found in find_boxes(row["prediction"])]
    return read, [f"{len(boxes)} boxes of the answers were read in the format {name}, {how}."]


def _decide(rows: Sequence[dict[str, Any]], key: str) -> FormatDecision:
    return decide_format((row[key], f"id {row['id']}", partial(_sizes, row)) for row in rows)


def _sizes(row: dict[str, Any]) -> list[Size] | None:
    width, height = row.get("width"), row.get("height")
    return [(width, height)] if isinstance(width, int) and isinstance(height, int) and width > 0 < height else None


def _size(row: dict[str, Any], source: BoxFormat, path: Path) -> Size | None:
    if "pixels" not in source.unit or not written_boxes(row["prediction"]):
        return None
    sizes = _sizes(row)
    if sizes is None:
        raise UserError(
            f"{path}: id {row['id']}: boxes in pixels ({source.name}) need the width and height of the image in every "
            "row"
        )
    return source.size_seen(sizes[0])


def _measured(rows: Sequence[dict[str, Any]], decision: FormatDecision, path: Path) -> tuple[str, str]:
    """Return the format that agrees best with the references, and the numbers that show it."""
    rows = [row for row in rows if written_boxes(row["prediction"])]
    truths = [[found.box for found in find_boxes(row["target"]) if found.box is not None] for row in rows]
    if any(truths):
        sizes = [known[0] if (known := _sizes(row)) else None for row in rows]
        measured = measure_format([row["prediction"] for row in rows], truths, sizes)
        if measured.clear and measured.best in (decision.candidates or BOX_FORMATS):
            score = measured.mean_iou[measured.best]
            return measured.best, (
                f"which agrees best with the references (mean IoU {score:.2f}, {measured.margin:.2f} above the next)"
            )
    raise UserError(
        f"{path}: the format of the boxes in the answers is not clear: {decision.reason}; name it with --box-format, "
        f"one of {', '.join(decision.candidates or BOX_FORMATS)}"
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        row = parse_json(line, place, f"every line is {_FORM}")
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
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; give a JSONL file of {_FORM}")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}; score it in parts")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSONL file of {_FORM}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file with the encoding UTF-8") from error

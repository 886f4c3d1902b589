"""Score a file of answered dialogues of any system. The rows contain the references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from preceptor.arguments import as_positive
from preceptor.data.grounding.box_detection import (
    LOOKED_AT,
    FormatDecision,
    FormatMeasurement,
    decide_format,
    measure_format,
    measure_scale,
)
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
from preceptor.data.grounding.boxes import SIDE, Box, iou
from preceptor.data.texts import json_records
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
RESCALED = 0.2
"""Gain in mean IoU from which boxes are in pixels of images of another size: a poor system does not gain that much."""
_RESIZED = "if the system saw resized images, give --box-format qwen2.5-vl and the limit of their size, --max-pixels N"
_FORM = '{"id": ..., "task": ..., "modality": ..., "target": ..., "prediction": ...}'


def knows(protocol: str) -> bool:
    """Return whether a protocol's id is one of dialogues: ``DATA/VARIANT/birdeval`` or ``DATA/VARIANT/strict``."""
    return protocol.rpartition("/")[2] in DESCRIBES and protocol.count("/") != 1


def score_file(predictions: Path, protocol: str, box_format: str = "auto", max_pixels: int | None = None) -> Scored:
    """Score a file of answers, which contains the references.

    The boxes of the references are in thousandths, as in Qwen2-VL or Med-GRIT-270k. Those of the answers may be in any
    format of `data.grounding.box_formats`.

    Args:
        predictions: JSONL, or a JSON list of objects. An object has the keys `NEEDED`. `turn`, the number of the
            question in its dialogue, defaults to 1. `width` and `height` of the image are needed for boxes in pixels
            only. Other keys are kept. The returned rows have the `score` of each answer, None if there are no boxes to
            find.
        protocol: id that ends in ``birdeval`` or ``strict``.
        box_format: format of the boxes in the answers. auto: it follows from syntax and values, or else from the
            agreement with the references; an error if neither is clear.
        max_pixels: limit of the number of pixels to which the system resized images, for a format in pixels of resized
            images; None for the published one.

    Raises:
        UserError: names file, line and fix.
    """
    if max_pixels is not None:
        as_positive(max_pixels, "max_pixels")
        if require_format(CANONICAL if box_format == "auto" else box_format).unit != "resized pixels":
            raise UserError("--max-pixels is the limit of resized images; give --box-format qwen2.5-vl with it")
    rows = list(_rows(predictions))
    if not rows:
        raise UserError(f"{predictions} contains no answers; every line is {_FORM}")
    kind = protocol.rpartition("/")[2]
    read, note = _read_boxes(rows, box_format, max_pixels, predictions)
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


def _read_boxes(
    rows: list[dict[str, Any]], name: str, max_pixels: int | None, path: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows with the boxes of the `vg` answers in the canonical format, and notes about their format.

    Raises:
        UserError: the format is not known or not clear, the references are in another format, or all boxes are too
            large or too small by a common factor and the user has not named the unit.
    """
    asked = [row for row in rows if row["task"] == "vg"]
    targets = _decide(asked, "target")
    if targets.format not in (None, CANONICAL) or targets.reason:
        raise UserError(
            f"{path}: the boxes of the targets are not (x1,y1),(x2,y2) in thousandths "
            f"({targets.reason or targets.format}); rewrite them"
        )
    named, how = name != "auto", "as --box-format says"
    notes: list[str] = []
    if not named:
        decision = _decide(asked, "prediction")
        if decision.boxes == 0:
            return rows, []
        name, how, notes = _detected(asked, decision, path)
    source = require_format(name)
    read = rows
    if named or name != CANONICAL:
        read = [
            row | {"prediction": to_canonical(row["prediction"], name, _size(row, source, max_pixels, path))}
            if row["task"] == "vg"
            else row
            for row in rows
        ]
        boxes = [found for row in read if row["task"] == "vg" for found in find_boxes(row["prediction"])]
        notes.insert(0, f"{len(boxes)} boxes of the answers were read in the format {name}, {how}.")
    pairs = [(row, answer) for row, answer in zip(rows, read, strict=True) if row["task"] == "vg"]
    pairs = [pair for pair in pairs[:: 1 + len(pairs) // LOOKED_AT] if _is_one_box(pair[0])]
    overlaps = [
        sum(iou(box, truth) for box in _boxes(answer["prediction"]) for truth in _boxes(row["target"]))
        for row, answer in pairs
    ]
    if factor := _common_factor([row for row, _ in pairs], name, sum(overlaps) / max(len(overlaps), 1)):
        if not named:
            raise UserError(f"{path}: {factor}; {_RESIZED}, or name another format with --box-format")
        if source.unit == "resized pixels" and max_pixels is None:
            raise UserError(f"{path}: {factor}; {_RESIZED}")
        notes.append(f"{factor[0].upper()}{factor[1:]}.")  # a system may really err by a factor
    return read, notes


def _detected(rows: Sequence[dict[str, Any]], decision: FormatDecision, path: Path) -> tuple[str, str, list[str]]:
    """Return a format, how it was found, and notes about a doubt.

    If syntax and values do not decide, or leave a doubt, it is the one that agrees best with the references.
    """
    if decision.format is not None and not decision.doubt:
        return decision.format, "as their syntax and values show", []
    found = _measure(rows)
    if found is not None and found.clear and found.best in (decision.candidates or BOX_FORMATS):
        score = found.mean_iou[found.best]
        how = f"which agrees best with the references (mean IoU {score:.2f}, {found.margin:.2f} above the next)"
        return found.best, how, []
    if decision.format is not None:
        doubt = f"The boxes of the answers are read as {decision.format}, but {decision.doubt}."
        return decision.format, "as their syntax and values show", [doubt]
    if found is not None:
        tried = [name for name in decision.candidates if name in found.mean_iou] or [found.best]
        best = max(tried, key=lambda name: found.mean_iou[name])
        if factor := _common_factor(rows, best, found.mean_iou[best]):
            raise UserError(f"{path}: {factor}; {_RESIZED}")
    raise UserError(
        f"{path}: the format of the boxes in the answers is not clear: {decision.reason}; name it with --box-format, "
        f"one of {', '.join(decision.candidates or BOX_FORMATS)}"
    )


def _decide(rows: Sequence[dict[str, Any]], key: str) -> FormatDecision:
    return decide_format((row[key], f"id {row['id']}", partial(_sizes, row)) for row in rows)


def _sizes(row: dict[str, Any]) -> list[Size] | None:
    width, height = row.get("width"), row.get("height")
    return [(width, height)] if isinstance(width, int) and isinstance(height, int) and width > 0 < height else None


def _size(row: dict[str, Any], source: BoxFormat, max_pixels: int | None, path: Path) -> Size | None:
    if "pixels" not in source.unit or not written_boxes(row["prediction"]):
        return None
    sizes = _sizes(row)
    if sizes is None:
        raise UserError(
            f"{path}: id {row['id']}: boxes in pixels ({source.name}) need the width and height of the image in every "
            "row"
        )
    return source.size_seen(sizes[0], max_pixels=max_pixels)


def _boxes(text: str) -> list[Box]:
    return [found.box for found in find_boxes(text) if found.box is not None]


def _is_one_box(row: dict[str, Any]) -> bool:
    boxes = written_boxes(row["prediction"])
    return len(boxes) == len(_boxes(row["target"])) == 1 and boxes[0].numbers is not None


def _measure(rows: Sequence[dict[str, Any]]) -> FormatMeasurement | None:
    """Return how well each format agrees with the references, or None if there are none."""
    rows = [row for row in rows if written_boxes(row["prediction"])]
    truths = [_boxes(row["target"]) for row in rows]
    sizes = [known[0] if (known := _sizes(row)) else None for row in rows]
    return measure_format([row["prediction"] for row in rows], truths, sizes) if any(truths) else None


def _common_factor(rows: Sequence[dict[str, Any]], name: str, mean_iou: float) -> str:
    """Return that the boxes agree much better with the references after a change of scale, or an empty text.

    Args:
        rows: answers, of which those with one box to one known box count. An unknown size does not matter for
            thousandths, in which an image has 1000 x 1000.
        name: format in which they are read.
        mean_iou: their mean IoU in this format.
    """
    rows = [row for row in rows if _is_one_box(row)]
    sizes = [(_sizes(row) or [(SIDE, SIDE)])[0] for row in rows]
    scale = measure_scale([row["prediction"] for row in rows], [_boxes(row["target"]) for row in rows], sizes)
    if scale is None or scale.mean_iou < max(0.5, mean_iou + RESCALED):
        return ""
    return (
        f"the boxes of the answers have a mean IoU of {mean_iou:.2f} with the references as {name}, but "
        f"{scale.mean_iou:.2f} if all numbers are divided by {scale.factor:.4g} and read as {scale.unit}"
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    seen: dict[tuple[str, int], str] = {}
    for place, row in json_records(_text(path), str(path), f"every line is {_FORM}"):
        absent = [key for key in NEEDED if key not in row] if isinstance(row, dict) else list(NEEDED)
        if absent:
            raise UserError(f"{place}: no {', '.join(absent)}; every line is {_FORM}")
        row = {"turn": 1} | row
        _check(row, str(place))
        row["id"] = str(row["id"])
        before = seen.setdefault((row["id"], row["turn"]), place.name)
        if before != place.name:
            raise UserError(f"{place}: id {row['id']!r}, turn {row['turn']} is also in {before}; keep one answer to it")
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

"""Scores of answered dialogues: Med-GRIT-270k's four tasks, by modality and as means, under two protocols.

A row is a line of the predictions file: ``id, group, turn, task, modality, question, target, prediction``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from preceptor.data.grounding.box_formats import find_boxes, rename_marks
from preceptor.data.types import GroundingTask
from preceptor.errors import UserError, nearest
from preceptor.grounding.box_metrics import (
    bird_boxes,
    bird_named,
    clean_response,
    grounding_scores,
    mean_over,
    strict_boxes,
    strict_named,
)
from preceptor.grounding.captions import METRICS, caption_scores_by_group, require_captions
from preceptor.scores import UnitScore, group_of
from preceptor.text_metrics import token_f1

Row = Mapping[str, Any]

DESCRIBES = {
    "birdeval": (
        "as the scripts published with BiRD and ClinKD: a reference box is found if the IoU with any predicted box is "
        "above 0.5; a name is correct if each of its words occurs in the answer"
    ),
    "strict": "boxes are matched one to one at an IoU of 0.5 or more; a name is correct if it is the same name",
}
_COUNT = {"birdeval": bird_boxes, "strict": strict_boxes}
_NAMED = {"birdeval": bird_named, "strict": strict_named}
MAIN = {"vg": "recall", "roc": "accuracy", "rc": "rouge_l", "mia": "mbmr"}
"""The metric of each task that tables show."""
UNIT = "answer"
ROW_FIELDS = {"id": str, "task": str, "modality": str, "target": str, "prediction": str}
ROW_KEY = ("id", "turn")
RATIO_TO_TEACHER = False
UNIT_METRICS = {"vg": "recall", "roc": "accuracy", "rc": "f1", "mia": "f1"}
"""The metric of single answers by task. The caption metrics of `MAIN` are of a whole corpus."""


def score_rows(rows: Sequence[Row], protocol: str) -> dict[str, Any]:
    """Return the scores of answers under `birdeval` or `strict`.

    Returns:
        ``{"n", "tasks": {task: {metric: value, "n"}}, "modalities": {modality: {task: {...}}}, "mean": {task: {...}},
        "notes"}``. `tasks` is over all rows; `mean` is the mean over modalities, as in the published tables. Caption
        scores are None if pycocoevalcap or Java is missing, and `notes` says so.

    Raises:
        UserError: unknown protocol or task.
    """
    if protocol not in DESCRIBES:
        raise UserError(f"protocol {protocol!r} is not known{nearest(protocol, DESCRIBES)}")
    notes = []
    try:
        require_captions()
        captions = True
    except UserError as error:
        captions = False
        notes.append(str(error))
    unreadable = sum(found.box is None for row in rows for found in find_boxes(row["prediction"]))
    if unreadable:
        notes.append(f"{unreadable} boxes of the answers cannot be read, such as boxes that are cut off.")
    boxless = sum(row["task"] == "vg" and not find_boxes(row["target"]) for row in rows)
    if boxless:
        notes.append(f"{boxless} questions of the task vg have no box in their true answer, and have no score.")
    names = sorted({row["modality"] for row in rows})
    by_modality = {name: [row for row in rows if row["modality"] == name] for name in names}
    texts = _text_scores([rows, *by_modality.values()]) if captions else {}
    modalities = {name: _by_task(selected, protocol, texts) for name, selected in by_modality.items()}
    tasks = _by_task(rows, protocol, texts)
    means = {}
    for task, scores in tasks.items():
        values = [by[task] for by in modalities.values() if task in by]
        means[task] = {
            name: mean_over({str(i): by[name] for i, by in enumerate(values)}) for name in scores if name != "n"
        }
    return {"n": len(rows), "tasks": tasks, "modalities": modalities, "mean": means, "notes": notes}


Pairs = tuple[tuple[str, str], ...]


def _by_task(rows: Sequence[Row], protocol: str, texts: Mapping[Pairs, Mapping[str, float]]) -> dict[str, Any]:
    scores: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["task"] not in get_args(GroundingTask):
            raise UserError(
                f"row {row['id']}: task {row['task']!r} is not known{nearest(row['task'], get_args(GroundingTask))}"
            )
    for task in get_args(GroundingTask):
        selected = [row for row in rows if row["task"] == task]
        if not selected:
            continue
        if task == "vg":
            scores[task] = dict(grounding_scores([_boxes(row, protocol) for row in selected]))
        elif task == "roc":
            accuracy = float(np.mean([_named(row, protocol) for row in selected]))
            scores[task] = {"accuracy": accuracy, "n": len(selected)}
        else:
            captions = texts.get(_pairs(selected), dict.fromkeys((*METRICS, "mbmr")))
            scores[task] = {**captions, "f1": float(np.mean([_f1(row) for row in selected])), "n": len(selected)}
    return scores


def _boxes(row: Row, protocol: str) -> Any:
    return _COUNT[protocol](rename_marks(row["target"], "bird"), rename_marks(row["prediction"], "bird"))


def _named(row: Row, protocol: str) -> bool:
    return _NAMED[protocol](row["target"], row["prediction"])


def _f1(row: Row) -> float:
    return token_f1(clean_response(row["prediction"]), (row["target"],))


def _pairs(rows: Sequence[Row]) -> Pairs:
    # The published scripts clean captions too.
    return tuple((row["target"], clean_response(row["prediction"])) for row in rows)


def _text_scores(groups: Sequence[Sequence[Row]]) -> dict[Pairs, dict[str, float]]:
    """Return the caption scores of the texts of each group of rows, by task."""
    tasks = ([row for row in rows if row["task"] == task] for rows in groups for task in ("rc", "mia"))
    distinct = tuple(dict.fromkeys(_pairs(selected) for selected in tasks if selected))
    return dict(zip(distinct, _scored_texts(distinct), strict=True))


@lru_cache(maxsize=4)
def _scored_texts(groups: tuple[Pairs, ...]) -> list[dict[str, float]]:
    """Return the scores of groups of (target, prediction), cached because both protocols need the same ones."""
    if not groups:
        return []
    return caption_scores_by_group(
        [
            (
                {f"{i}": [target] for i, (target, _) in enumerate(pairs)},
                {f"{i}": prediction for i, (_, prediction) in enumerate(pairs)},
            )
            for pairs in groups
        ]
    )


def row_score(row: Row, protocol: str) -> float | None:
    """Return the score of one answer in [0, 1]: the share of the reference boxes that were found, 1 or 0 for a name,
    F1 over the words of a text. None for visual grounding without a reference box."""
    if row["task"] == "vg":
        count = _boxes(row, protocol)
        return count.matched / count.references if count.references else None
    return float(_named(row, protocol)) if row["task"] == "roc" else _f1(row)


def unit_scores(rows: Sequence[Row], protocol: str) -> list[UnitScore]:
    """Return one value per answer, in the order of the rows. Answers about the same image or patient are a group.

    The last part of the protocol's id is `birdeval` or `strict`. Answers without a score are omitted.
    """
    scores = []
    for task in get_args(GroundingTask):
        for row in (row for row in rows if row["task"] == task):
            value = row_score(row, protocol.rpartition("/")[2])
            if value is not None:
                unit = f"{row['id']}, turn {row['turn']}" if row.get("turn", 1) > 1 else row["id"]
                metric = f"{task}/{UNIT_METRICS[task]}"
                scores.append(UnitScore(unit, group_of(row), metric, value, {"modalities": row["modality"]}))
    return scores


def headline_scores(rows: Sequence[Row], protocol: str) -> dict[str, float | None]:
    """Return the number of answers and the score of each task, by key of the protocol's entry in results.json."""
    by_task = _by_task(rows, protocol.rpartition("/")[2], {})
    return {"n": len(rows)} | {
        f"tasks.{task}.{UNIT_METRICS[task]}": scores[UNIT_METRICS[task]] for task, scores in by_task.items()
    }

"""Answered dialogues scored: Med-GRIT-270k's four tasks, by modality and in the mean, under two protocols.

A row is what a predictions file holds: ``id, task, modality, question, target, prediction``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from preceptor.data.grounding.boxes import restyle
from preceptor.data.types import GroundingTask
from preceptor.errors import UserError, nearest
from preceptor.grounding.box_metrics import (
    bird_boxes,
    bird_named,
    grounding_scores,
    mean_over,
    strict_boxes,
    strict_named,
)
from preceptor.grounding.captions import METRICS, caption_scores_by_group, require_captions
from preceptor.statistics import paired_bootstrap
from preceptor.text_metrics import token_f1

Row = Mapping[str, Any]

DESCRIBES = {
    "birdeval": (
        "as the scripts published with BiRD and ClinKD: a true box is found if any predicted one overlaps it by more "
        "than half (IoU); a name is right if each of its words occurs in the answer"
    ),
    "strict": "boxes are paired one to one at an IoU of half or more; a name is right if it is the same name",
}
_COUNT = {"birdeval": bird_boxes, "strict": strict_boxes}
_NAMED = {"birdeval": bird_named, "strict": strict_named}
MAIN = {"vg": "recall", "roc": "accuracy", "rc": "rouge_l", "mia": "mbmr"}
"""The number of each task that tables show."""


def score_rows(rows: Sequence[Row], protocol: str) -> dict[str, Any]:
    """Return the scores of answers under `birdeval` or `strict`.

    ``{"n", "tasks": {task: {metric: value, "n"}}, "modalities": {modality: {task: {...}}}, "mean": {task: {...}},
    "notes"}``: `tasks` over all rows, `mean` the mean over modalities, as the published tables have it. Caption scores
    are None where pycocoevalcap or Java is missing, and `notes` says so.

    Raises UserError for an unknown protocol or task.
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
    names = sorted({row["modality"] for row in rows})
    by_modality = {name: [row for row in rows if row["modality"] == name] for name in names}
    texts = _text_scores([rows, *by_modality.values()]) if captions else {}
    found: dict[str, Any] = {"n": len(rows), "tasks": _by_task(rows, protocol, texts), "modalities": {}, "mean": {}}
    for name, own in by_modality.items():
        found["modalities"][name] = _by_task(own, protocol, texts)
    for task, scores in found["tasks"].items():
        there = [by[task] for by in found["modalities"].values() if task in by]
        found["mean"][task] = {
            name: mean_over({str(i): by[name] for i, by in enumerate(there)}) for name in scores if name != "n"
        }
    return found | {"notes": notes}


Pairs = tuple[tuple[str, str], ...]


def _by_task(rows: Sequence[Row], protocol: str, texts: Mapping[Pairs, Mapping[str, float]]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["task"] not in get_args(GroundingTask):
            raise UserError(
                f"row {row['id']}: task {row['task']!r} is not known{nearest(row['task'], get_args(GroundingTask))}"
            )
    for task in get_args(GroundingTask):
        own = [row for row in rows if row["task"] == task]
        if not own:
            continue
        if task == "vg":
            found[task] = dict(grounding_scores([_boxes(row, protocol) for row in own]))
        elif task == "roc":
            found[task] = {"accuracy": float(np.mean([_named(row, protocol) for row in own])), "n": len(own)}
        else:
            captions = texts.get(_pairs(own), dict.fromkeys((*METRICS, "mbmr")))
            found[task] = {**captions, "f1": float(np.mean([_f1(row) for row in own])), "n": len(own)}
    return found


def _boxes(row: Row, protocol: str) -> Any:
    return _COUNT[protocol](restyle(row["target"], "bird"), restyle(row["prediction"], "bird"))


def _named(row: Row, protocol: str) -> bool:
    return _NAMED[protocol](row["target"], row["prediction"])


def _f1(row: Row) -> float:
    return token_f1(row["prediction"], (row["target"],))


def _pairs(rows: Sequence[Row]) -> Pairs:
    return tuple((row["target"], row["prediction"]) for row in rows)


def _text_scores(groups: Sequence[Sequence[Row]]) -> dict[Pairs, dict[str, float]]:
    """Return the caption scores of the texts of each group of rows, by task."""
    tasks = ([row for row in rows if row["task"] == task] for rows in groups for task in ("rc", "mia"))
    distinct = tuple(dict.fromkeys(_pairs(own) for own in tasks if own))
    return dict(zip(distinct, _scored_texts(distinct), strict=True))


@lru_cache(maxsize=4)
def _scored_texts(groups: tuple[Pairs, ...]) -> list[dict[str, float]]:
    """Return the scores of groups of (target, prediction): kept, as both protocols ask for the same."""
    if not groups:
        return []
    return caption_scores_by_group(
        [
            (
                {f"{i}": [target] for i, (target, _) in enumerate(pairs)},
                {f"{i}": said for i, (_, said) in enumerate(pairs)},
            )
            for pairs in groups
        ]
    )


def row_score(row: Row, protocol: str) -> float | None:
    """Return one answer's score in [0, 1], for paired comparisons: the share of its boxes that were found, 1 or 0 for
    a name, F1 of the words of a text; None for grounding without a box to find."""
    if row["task"] == "vg":
        count = _boxes(row, protocol)
        return count.found / count.wanted if count.wanted else None
    return float(_named(row, protocol)) if row["task"] == "roc" else _f1(row)


def compare(rows: Sequence[Row], others: Sequence[Row], protocol: str) -> dict[str, dict[str, Any]]:
    """Return by task the mean of `row_score` of `rows` less that of `others`, with a 95 % interval (paired bootstrap).

    Raises ValueError where both are not answers to the same questions.
    """
    theirs = {(row["id"], row.get("turn", 1)): row for row in others}
    if len(theirs) != len(rows) or any((row["id"], row.get("turn", 1)) not in theirs for row in rows):
        raise ValueError("the two lists of answers are not about the same questions")
    found: dict[str, dict[str, Any]] = {}
    for task in get_args(GroundingTask):
        both = [
            (row_score(row, protocol), row_score(theirs[row["id"], row.get("turn", 1)], protocol))
            for row in rows
            if row["task"] == task
        ]
        kept = np.array([pair for pair in both if pair[0] is not None], dtype=np.float64)
        if len(kept):
            interval = paired_bootstrap(kept[:, 0], kept[:, 1])
            found[task] = {
                "difference": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n": len(kept),
                "interval": "95 %, paired bootstrap over answers, one seed",
            }
    return found

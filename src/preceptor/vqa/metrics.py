"""Scores of answers to questions, under a named protocol. This module imports neither torch nor numpy at the top."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

from preceptor.data.types import AnswerType, Prediction, Sample
from preceptor.errors import UserError
from preceptor.normalizers import NORMALISERS
from preceptor.scores import UnitScore, group_of, number_groups
from preceptor.text_metrics import corpus_bleu, imageclef_bleu, token_f1, tokens, vqa_soft
from preceptor.vqa.protocols import Metric, Protocol, metric_of

if TYPE_CHECKING:
    import numpy as np

UNIT = "question"
ROW_FIELDS = {
    "id": str,
    "score": float,
    "answer_type": str,
    "question_type": str,
    "target": str,
    "prediction": str,
}
ROW_KEY = ("id",)
RATIO_TO_TEACHER = True
OTHER = "(other)"
"""Class of a confusion matrix that holds the rare answers. No MEVF-normalised answer has brackets."""


class Row(TypedDict):
    """One scored question: a line of the predictions file.

    `answer` (predicted) and `answers` (accepted) are verbatim, so that anyone can apply another metric. `prediction`
    and `target` are normalised. `score` is the protocol's metric in [0, 1]; `bleu` and `f1` are always included.
    `group` is the number of the image or patient, whose questions are not independent.
    """

    id: str
    group: str
    answer: str
    answers: list[str]
    prediction: str
    probability: float
    target: str
    correct: bool
    answer_type: AnswerType
    question_type: str
    score: float
    bleu: float
    f1: float


@dataclass(frozen=True)
class Scores:
    """The scored questions of one protocol. Scores are means in [0, 1], or None if there is no question.

    `accuracy`, `open`, `closed` and the scores of the question types are means of the protocol's metric. `macro` is
    the unweighted mean over question types.

    `ceiling` is the highest accuracy that the answer classes allow (`AnswerVocabulary.ceiling` of the same samples).
    `score` does not know the classes, so the caller adds it: ``dataclasses.replace(scores, ceiling=...)``.
    """

    protocol: str
    scored: tuple[Row, ...]
    ceiling: float | None = None
    metric: Metric = "accuracy"

    @property
    def accuracy(self) -> float | None:
        return self._accuracy(lambda row: True)

    @property
    def open(self) -> float | None:
        return self._accuracy(lambda row: row["answer_type"] == "open")

    @property
    def closed(self) -> float | None:
        return self._accuracy(lambda row: row["answer_type"] == "closed")

    def interval(self) -> dict[str, float] | None:
        """Return the 95 % interval of the accuracy over questions (`statistics.score_interval`).

        It is None for another metric and for questions of fewer than `statistics.MINIMUM_UNITS` images or patients. It
        is not part of `as_dict`, because scipy takes longer to import than a file of predictions to score.
        """
        from preceptor.statistics import score_interval

        if self.metric != "accuracy":
            return None
        groups = [row["group"] for row in self.scored]
        spread = score_interval([[row["score"] for row in self.scored]], groups=groups)
        return None if spread is None else {"low": spread.low, "high": spread.high}

    def question_types(self) -> dict[str, dict[str, float | int]]:
        """Return ``{question type: {"accuracy": share, "n": count}}``; questions without a type are omitted."""
        by_type: dict[str, list[float]] = {}
        for row in self.scored:
            if row["question_type"]:
                by_type.setdefault(row["question_type"], []).append(row["score"])
        return {name: {"accuracy": sum(hits) / len(hits), "n": len(hits)} for name, hits in sorted(by_type.items())}

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol's entry in results.json."""
        kinds = Counter(row["answer_type"] for row in self.scored)
        types = self.question_types()
        n = len(self.scored)
        pooled = corpus_bleu(
            [tokens(row["answer"]) for row in self.scored],
            [[tokens(answer) for answer in row["answers"]] for row in self.scored],
        )
        return {
            "metric": self.metric,
            "accuracy": self.accuracy,
            "open": self.open,
            "closed": self.closed,
            "macro": sum(one["accuracy"] for one in types.values()) / len(types) if types else None,
            "bleu": sum(row["bleu"] for row in self.scored) / n if n else None,
            **{f"bleu_{order}": value if n else None for order, value in enumerate(pooled, start=1)},
            "f1": sum(row["f1"] for row in self.scored) / n if n else None,
            "n": n,
            "n_open": kinds["open"],
            "n_closed": kinds["closed"],
            "ceiling": None if self.ceiling is None or math.isnan(self.ceiling) else self.ceiling,
            "question_types": types,
        }

    def rows(self) -> list[Row]:
        """Return the lines of the predictions file, in the order of the samples."""
        return list(self.scored)

    def _accuracy(self, selected: Callable[[Row], bool]) -> float | None:
        scores = [row["score"] for row in self.scored if selected(row)]
        return sum(scores) / len(scores) if scores else None


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], protocol: Protocol) -> Scores:
    """Score `predictions` on those `samples` that `protocol` selects, matched by id.

    A prediction is correct if its normalised text equals any normalised accepted answer. The target of a row is the
    matched answer, or the first one if none matches. Predictions for other questions are ignored.

    Raises:
        UserError: a selected question has no prediction, or an id occurs twice among the predictions or the samples.
    """
    normalise, metric = lru_cache(maxsize=None)(NORMALISERS[protocol.normaliser]), protocol.metric
    selected = [sample for sample in samples if protocol.select(sample)]
    groups = number_groups(samples)
    _refuse_repeated("samples", [sample.id for sample in selected], protocol)
    _refuse_repeated("predictions", [prediction.id for prediction in predictions], protocol)
    by_id = {prediction.id: prediction for prediction in predictions}
    missing = [sample.id for sample in selected if sample.id not in by_id]
    if missing:
        raise UserError(
            f"protocol {protocol.id}: {len(missing)} of {len(selected)} questions have no prediction, the first is "
            f"{missing[0]!r}; predict the whole test split again"
        )
    rows: list[Row] = []
    for sample in selected:
        prediction = by_id[sample.id]
        text = normalise(prediction.answer)
        accepted = [normalise(answer) for answer in sample.answers]
        correct = text in accepted
        bleu = imageclef_bleu(prediction.answer, sample.answers)
        if metric == "accuracy":
            value = float(correct)
        else:
            value = bleu if metric == "bleu" else vqa_soft(text, accepted)
        rows.append(
            Row(
                id=sample.id,
                group=groups[sample.id],
                answer=prediction.answer,
                answers=list(sample.answers),
                prediction=text,
                probability=prediction.probability,
                target=text if correct else accepted[0],
                correct=correct,
                answer_type=sample.answer_type,
                question_type=protocol.category(sample),
                score=value,
                bleu=bleu,
                f1=token_f1(prediction.answer, sample.answers),
            )
        )
    return Scores(protocol.id, tuple(rows), metric=metric)


def unit_scores(rows: Sequence[Mapping[str, Any]], protocol: str) -> list[UnitScore]:
    """Return one value per question, in the order of the ids, with the type of the answer and of the question."""
    metric = metric_of(protocol)
    return [
        UnitScore(
            row["id"],
            group_of(row),
            metric,
            float(row["score"]),
            {"answer_types": row["answer_type"]}
            | ({"question_types": row["question_type"]} if row["question_type"] else {}),
        )
        for row in sorted(rows, key=lambda row: row["id"])
    ]


def headline_scores(rows: Sequence[Mapping[str, Any]], protocol: str) -> dict[str, float | None]:
    """Return the number of questions and their mean score, by key of the protocol's entry in results.json."""
    return {"n": len(rows), "accuracy": sum(row["score"] for row in rows) / len(rows) if rows else None}


def confusion(rows: Sequence[Row], most: int = 12) -> tuple[list[str], np.ndarray]:
    """Return labels and the confusion matrix of the `most` frequent targets.

    The last label, `OTHER`, stands for every other answer. The matrix is int64 (labels, labels): rows are targets,
    columns predictions. Its last diagonal element counts right and wrong answers.
    """
    import numpy as np  # `preceptor score` does not need it

    counts = Counter(row["target"] for row in rows)
    frequent = sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]
    index = {answer: position for position, answer in enumerate(frequent)}
    matrix = np.zeros((len(frequent) + 1, len(frequent) + 1), dtype=np.int64)
    for row in rows:
        matrix[index.get(row["target"], -1), index.get(row["prediction"], -1)] += 1
    return [*frequent, OTHER], matrix


def _refuse_repeated(what: str, ids: list[str], protocol: Protocol) -> None:
    id, count = Counter(ids).most_common(1)[0] if ids else ("", 0)
    if count > 1:
        raise UserError(f"protocol {protocol.id}: id {id!r} occurs {count} times among the {what}; ids must be unique")

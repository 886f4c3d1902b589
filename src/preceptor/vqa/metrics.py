"""Accuracy of answers to questions, under a named protocol."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

from preceptor.data.types import AnswerType, Prediction, Sample
from preceptor.errors import UserError
from preceptor.normalizers import NORMALISERS
from preceptor.statistics import wilson
from preceptor.text_metrics import corpus_bleu, imageclef_bleu, token_f1, tokens, vqa_soft
from preceptor.vqa.protocols import Metric, Protocol

if TYPE_CHECKING:
    import numpy as np

OTHER = "(other)"
"""The class of a confusion matrix that gathers the rare answers; no MEVF-normalised answer has brackets."""


class Row(TypedDict):
    """One scored question: a line of the predictions file.

    `answer` and `answers` are what was said and what is accepted, as written, so that anyone can score them otherwise;
    `prediction` and `target` are normalised. `score` is the protocol's metric in [0, 1]; of the others, `bleu` and `f1`
    are always there.
    """

    id: str
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
    """The scored questions of one protocol. Scores are means in [0, 1], None where there is no question.

    `accuracy`, `open`, `closed` and those of the question types are means of the protocol's metric, so shares of
    right answers unless the metric is another. `macro` is the mean over question types, each weighing the same.

    `ceiling` is the share that the answer classes can reach (`AnswerVocabulary.ceiling` of the same samples); `score`
    does not know the classes, so the caller adds it: `dataclasses.replace(scores, ceiling=...)`.
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
        """Return Wilson's 95 % interval of the accuracy over questions; None for another metric or without questions."""
        if self.metric != "accuracy" or not self.scored:
            return None
        found = wilson(sum(row["correct"] for row in self.scored), len(self.scored))
        return {"low": found.low, "high": found.high}

    def question_types(self) -> dict[str, dict[str, float | int]]:
        """Return ``{question type: {"accuracy": share, "n": count}}``; questions without a type are left out."""
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
            "interval": self.interval(),
            "open": self.open,
            "closed": self.closed,
            "macro": sum(found["accuracy"] for found in types.values()) / len(types) if types else None,
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
        found = [row["score"] for row in self.scored if selected(row)]
        return sum(found) / len(found) if found else None


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], protocol: Protocol) -> Scores:
    """Score `predictions` on those `samples` that `protocol` selects, matched by id.

    A prediction is correct if its normalised text equals any normalised accepted answer. The target of a row is the
    answer that was matched, else the first one. Predictions for other questions are not looked at. Raises UserError
    if a selected question has no prediction, or if an id occurs twice among the predictions or the samples.
    """
    normalise, metric = lru_cache(maxsize=None)(NORMALISERS[protocol.normaliser]), protocol.metric
    selected = [sample for sample in samples if protocol.select(sample)]
    _refuse_repeated("samples", [sample.id for sample in selected], protocol)
    _refuse_repeated("predictions", [prediction.id for prediction in predictions], protocol)
    by_id = {prediction.id: prediction for prediction in predictions}
    missing = [sample.id for sample in selected if sample.id not in by_id]
    if missing:
        raise UserError(
            f"protocol {protocol.id}: {len(missing)} of {len(selected)} questions have no prediction, the first is "
            f"{missing[0]!r}; predict the whole test part again"
        )
    rows: list[Row] = []
    for sample in selected:
        prediction = by_id[sample.id]
        text = normalise(prediction.answer)
        accepted = [normalise(answer) for answer in sample.answers]
        correct = text in accepted
        bleu = imageclef_bleu(prediction.answer, sample.answers)
        if metric == "accuracy":
            worth = float(correct)
        else:
            worth = bleu if metric == "bleu" else vqa_soft(text, accepted)
        rows.append(
            Row(
                id=sample.id,
                answer=prediction.answer,
                answers=list(sample.answers),
                prediction=text,
                probability=prediction.probability,
                target=text if correct else accepted[0],
                correct=correct,
                answer_type=sample.answer_type,
                question_type=protocol.category(sample),
                score=worth,
                bleu=bleu,
                f1=token_f1(prediction.answer, sample.answers),
            )
        )
    return Scores(protocol.id, tuple(rows), metric=metric)


def confusion(rows: Sequence[Row], most: int = 12) -> tuple[list[str], np.ndarray]:
    """Return labels and the confusion matrix of the `most` frequent targets.

    The last label, `OTHER`, gathers every other answer. The matrix is int64 (labels, labels): rows are targets,
    columns predictions. On its last diagonal element lie right and wrong answers alike.
    """
    import numpy as np  # here, so that `preceptor score` starts without it

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

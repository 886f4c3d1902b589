"""Measure the accuracy on a test split that is possible without looking at an image."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.normalizers import NORMALISERS
from preceptor.vqa.baselines import baselines

TITLES = {
    "majority": "most frequent answer",
    "majority_by_type": "most frequent answer of the question type",
    "question_only": "most frequent answer to the same question",
    "look_up": "answer to the most similar training question",
    "text_model": "linear model on the words of the question",
    "look_up_same_image": "answer to the most similar question about the same image file",
}


@dataclass(frozen=True)
class Shortcut:
    """A prediction method that does not use the image, and its accuracy.

    Attributes:
        name: Name of the method, a key of `TITLES`.
        accuracy: Accuracy in [0, 1] on all questions.
        open: Accuracy on open questions, or None if there are none.
        closed: Accuracy on closed questions, or None if there are none.
        reads: Input in addition to the question.
    """

    name: str
    accuracy: float
    open: float | None
    closed: float | None
    reads: str = ""

    @property
    def title(self) -> str:
        return TITLES[self.name]


def shortcuts(data: Dataset[Sample], normaliser: str = "mevf") -> list[Shortcut]:
    """Return the test accuracy of every shortcut, trained on the training split. Without either split there are none.

    `text_model` (TF-IDF of words and word pairs, multinomial logistic regression) needs scikit-learn and is skipped
    without it.
    """
    train, test = data.split("train"), data.split("test")
    if not train or not test:
        return []
    predictions = baselines(data, normaliser)
    predictions["majority_by_type"] = majority_by_type(train, test, normaliser)
    if model := text_model(train, test, normaliser):
        predictions["text_model"] = model
    reads = {"look_up_same_image": "the image's file name", "majority_by_type": "the question type"}
    results = []
    for name in TITLES:
        if name in predictions:
            correct = _correct(test, predictions[name], normaliser)
            correct_by_type = {
                kind: [r for r, sample in zip(correct, test, strict=True) if sample.answer_type == kind]
                for kind in ("open", "closed")
            }
            accuracies = {kind: sum(hits) / len(hits) if hits else None for kind, hits in correct_by_type.items()}
            accuracy = sum(correct) / len(correct)
            results.append(Shortcut(name, accuracy, accuracies["open"], accuracies["closed"], reads.get(name, "")))
    return results


def majority_by_type(train: Sequence[Sample], test: Sequence[Sample], normaliser: str) -> list[Prediction]:
    """Predict the most frequent training answer of the answer type and question type of a sample.

    Both are annotations and not inputs. The result shows how informative they are, not what a model could achieve.
    """
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sample in train:
        answer = NORMALISERS[normaliser](sample.answer)
        for key in ((), (sample.answer_type,), (sample.answer_type, sample.question_type)):
            counts[key][answer] += 1
    predictions = []
    for sample in test:
        keys = ((sample.answer_type, sample.question_type), (sample.answer_type,), ())
        best = next(counts[key] for key in keys if key in counts)
        answer = min(best, key=lambda text: (-best[text], text))
        predictions.append(Prediction(sample.id, answer, best[answer] / best.total()))
    return predictions


def text_model(train: Sequence[Sample], test: Sequence[Sample], normaliser: str) -> list[Prediction]:
    """Predict with a logistic regression on the question. Without scikit-learn or with one class return []."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return []
    answers = [NORMALISERS[normaliser](sample.answer) for sample in train]
    if len(set(answers)) < 2:
        return []
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+")
    try:
        features = words.fit_transform([sample.question for sample in train])
    except ValueError:  # no question contains a word
        return []
    model = LogisticRegression(C=10, max_iter=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, answers)
    probabilities = model.predict_proba(words.transform([sample.question for sample in test]))
    best = probabilities.argmax(axis=1)
    return [
        Prediction(sample.id, str(model.classes_[k]), float(row[k]))
        for sample, row, k in zip(test, probabilities, best.tolist(), strict=True)
    ]


def _correct(test: Sequence[Sample], predictions: Sequence[Prediction], normaliser: str) -> list[bool]:
    normalise = NORMALISERS[normaliser]
    return [
        normalise(prediction.answer) in {normalise(answer) for answer in sample.answers}
        for sample, prediction in zip(test, predictions, strict=True)
    ]

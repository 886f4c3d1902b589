"""How much of a test is answered without looking at an image."""

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
    """A way to answer that never sees an image, and its share of right answers in [0, 1] on all, open and closed
    questions (None where there are none). `reads` says what it is told beside the question."""

    name: str
    accuracy: float
    open: float | None
    closed: float | None
    reads: str = ""

    @property
    def title(self) -> str:
        return TITLES[self.name]


def shortcuts(data: Dataset[Sample], normaliser: str = "mevf") -> list[Shortcut]:
    """Return the accuracy on the test split of every shortcut, learnt from the training split; empty without either.

    `text_model` (TF-IDF of words and pairs of words, multinomial logistic regression) needs scikit-learn and is left
    out without it.
    """
    train, test = data.split("train"), data.split("test")
    if not train or not test:
        return []
    answered = baselines(data, normaliser)
    answered["majority_by_type"] = majority_by_type(train, test, normaliser)
    if model := text_model(train, test, normaliser):
        answered["text_model"] = model
    reads = {"look_up_same_image": "the image's file name", "majority_by_type": "the question type"}
    found = []
    for name in TITLES:
        if name in answered:
            right = _right(test, answered[name], normaliser)
            kinds = {
                kind: [r for r, sample in zip(right, test, strict=True) if sample.answer_type == kind]
                for kind in ("open", "closed")
            }
            shares = {kind: sum(hits) / len(hits) if hits else None for kind, hits in kinds.items()}
            accuracy = sum(right) / len(right)
            found.append(Shortcut(name, accuracy, shares["open"], shares["closed"], reads.get(name, "")))
    return found


def majority_by_type(train: Sequence[Sample], test: Sequence[Sample], normaliser: str) -> list[Prediction]:
    """Answer with the most frequent training answer of the row's answer type and question type.

    Both are annotations, not inputs: this is how far knowing them leads, not what a model could do.
    """
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sample in train:
        answer = NORMALISERS[normaliser](sample.answer)
        for key in ((), (sample.answer_type,), (sample.answer_type, sample.question_type)):
            counts[key][answer] += 1
    found = []
    for sample in test:
        keys = ((sample.answer_type, sample.question_type), (sample.answer_type,), ())
        best = next(counts[key] for key in keys if key in counts)
        answer = min(best, key=lambda text: (-best[text], text))
        found.append(Prediction(sample.id, answer, best[answer] / best.total()))
    return found


def text_model(train: Sequence[Sample], test: Sequence[Sample], normaliser: str) -> list[Prediction]:
    """Answer with a logistic regression on the words of the question; [] without scikit-learn or with one class."""
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
    except ValueError:  # not one word in any question
        return []
    model = LogisticRegression(C=10, max_iter=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, answers)
    shares = model.predict_proba(words.transform([sample.question for sample in test]))
    best = shares.argmax(axis=1)
    return [
        Prediction(sample.id, str(model.classes_[k]), float(share[k]))
        for sample, share, k in zip(test, shares, best.tolist(), strict=True)
    ]


def _right(test: Sequence[Sample], predictions: Sequence[Prediction], normaliser: str) -> list[bool]:
    normalise = NORMALISERS[normaliser]
    return [
        normalise(prediction.answer) in {normalise(answer) for answer in sample.answers}
        for sample, prediction in zip(test, predictions, strict=True)
    ]

"""Baselines that do not look at the image: lower bounds for a result, and measures of how much a split leaks.

They learn from the training split. Of a test sample they use the question and the name of the image, but no labels:
neither the answer nor its annotations (answer type and question type). Answers are normalised. `probability` is the
fraction of training answers that agree or, for the look-ups, the similarity of the question.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.normalizers import NORMALISERS

_WORD = re.compile(r"\w+")


def baselines(data: Dataset[Sample], normaliser: str = "mevf") -> dict[str, list[Prediction]]:
    """Return the test predictions of every baseline by name, or an empty dict if there are no training samples."""
    train, test = data.split("train"), data.split("test")
    if not train:
        return {}
    return {
        "majority": majority(train, test, normaliser),
        "question_only": question_only(train, test, normaliser),
        "look_up": look_up(train, test, normaliser),
        "look_up_same_image": look_up(train, test, normaliser, same_image=True),
    }


def majority(train: Sequence[Sample], test: Sequence[Sample], normaliser: str = "mevf") -> list[Prediction]:
    """Predict the most frequent training answer."""
    answer, share = _most_frequent(_answers(train, normaliser))
    return [Prediction(sample.id, answer, share) for sample in test]


def question_only(train: Sequence[Sample], test: Sequence[Sample], normaliser: str = "mevf") -> list[Prediction]:
    """Predict the most frequent answer to the same question (ignoring case and punctuation), else `majority`."""
    answers = _answers(train, normaliser)
    by_question: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for sample, answer in zip(train, answers, strict=True):
        by_question[question_words(sample.question)].append(answer)
    fallback = _most_frequent(answers)
    answer_of = {question: _most_frequent(group) for question, group in by_question.items()}
    return [Prediction(sample.id, *answer_of.get(question_words(sample.question), fallback)) for sample in test]


def look_up(
    train: Sequence[Sample], test: Sequence[Sample], normaliser: str = "mevf", *, same_image: bool = False
) -> list[Prediction]:
    """Predict the answer to the most similar training question, the first one if several are equally similar.

    Similarity is the Jaccard index of the sets of words. With `same_image`, only training questions about the same
    image file are used, if there are any. This baseline uses the name of the image and not its content. It measures how
    much of an answer a split gives away by sharing images and question frames between training and test.
    """
    answers = _answers(train, normaliser)
    sizes, rows_with_word = _index(train)
    rows_with_image: dict[Path, list[int]] = defaultdict(list)
    for row, sample in enumerate(train):
        rows_with_image[sample.image].append(row)
    predictions = []
    for sample in test:
        similarity = _jaccard(set(question_words(sample.question)), sizes, rows_with_word)
        rows = rows_with_image.get(sample.image, []) if same_image else []
        best = rows[int(similarity[rows].argmax())] if rows else int(similarity.argmax())
        predictions.append(Prediction(sample.id, answers[best], float(similarity[best])))
    return predictions


def _answers(samples: Sequence[Sample], normaliser: str) -> list[str]:
    return [NORMALISERS[normaliser](sample.answer) for sample in samples]


def _most_frequent(answers: Sequence[str]) -> tuple[str, float]:
    """Return the most frequent answer and its fraction. Ties are resolved alphabetically."""
    counts = Counter(answers)
    answer = min(counts, key=lambda text: (-counts[text], text))
    return answer, counts[answer] / len(answers)


def question_words(question: str) -> tuple[str, ...]:
    """Return the words of a question in lower case, without punctuation."""
    return tuple(_WORD.findall(question.lower()))


def _index(train: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the number of distinct words of each training question, and the rows that contain each word."""
    bags = [set(question_words(sample.question)) for sample in train]
    rows: dict[str, list[int]] = defaultdict(list)
    for row, bag in enumerate(bags):
        for word in bag:
            rows[word].append(row)
    return np.array([len(bag) for bag in bags]), {word: np.array(found) for word, found in rows.items()}


def _jaccard(words: set[str], sizes: np.ndarray, rows_with_word: dict[str, np.ndarray]) -> np.ndarray:
    """Return the Jaccard index (rows,) of `words` with each training question; 0 if both are empty."""
    shared = np.zeros(len(sizes))
    for word in words & rows_with_word.keys():
        shared[rows_with_word[word]] += 1
    return shared / np.maximum(sizes + len(words) - shared, 1)

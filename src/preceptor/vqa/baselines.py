"""Answers without looking at the image: what a result has to beat, and how far a split leaks.

All learn from the training split alone, and of a test row they read the question and the image's name, never its
labels: not the answer, and neither the answer type nor the question type, which are annotations of the answer too.
Answers are normalised. `probability` is the share of the training rows asked that agree, or for the look-ups the
similarity of the question found.
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
    """Return the predictions of every baseline for the test split of `data`, by name.

    Empty if there are no training rows to learn from.
    """
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
    """Answer everything with the most frequent training answer."""
    answer, share = _most_frequent(_answers(train, normaliser))
    return [Prediction(sample.id, answer, share) for sample in test]


def question_only(train: Sequence[Sample], test: Sequence[Sample], normaliser: str = "mevf") -> list[Prediction]:
    """Answer with the most frequent answer to the same question (case and punctuation aside), else with `majority`."""
    answers = _answers(train, normaliser)
    by_question: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for sample, answer in zip(train, answers, strict=True):
        by_question[_words(sample.question)].append(answer)
    back_off = _most_frequent(answers)
    found = {question: _most_frequent(given) for question, given in by_question.items()}
    return [Prediction(sample.id, *found.get(_words(sample.question), back_off)) for sample in test]


def look_up(
    train: Sequence[Sample], test: Sequence[Sample], normaliser: str = "mevf", *, same_image: bool = False
) -> list[Prediction]:
    """Answer with the answer to the most similar training question, the earliest one among equals.

    Similarity is the Jaccard index of the two sets of words. With `same_image` only the training questions about the
    same image file are asked, where there are any: this uses the image's name, not its content, and so measures how
    much of the answer a split hands over when it shares images and question frames between training and test.
    """
    answers = _answers(train, normaliser)
    sizes, rows_with_word = _index(train)
    rows_with_image: dict[Path, list[int]] = defaultdict(list)
    for row, sample in enumerate(train):
        rows_with_image[sample.image].append(row)
    predictions = []
    for sample in test:
        similarity = _jaccard(set(_words(sample.question)), sizes, rows_with_word)
        rows = rows_with_image.get(sample.image, []) if same_image else []
        best = rows[int(similarity[rows].argmax())] if rows else int(similarity.argmax())
        predictions.append(Prediction(sample.id, answers[best], float(similarity[best])))
    return predictions


def _answers(samples: Sequence[Sample], normaliser: str) -> list[str]:
    return [NORMALISERS[normaliser](sample.answer) for sample in samples]


def _most_frequent(answers: Sequence[str]) -> tuple[str, float]:
    """Return the most frequent answer, the first in the alphabet among equals, and its share."""
    counts = Counter(answers)
    answer = min(counts, key=lambda text: (-counts[text], text))
    return answer, counts[answer] / len(answers)


def _words(question: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(question.lower()))


def _index(train: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the number of distinct words of each training question, and for each word the rows that hold it."""
    bags = [set(_words(sample.question)) for sample in train]
    rows: dict[str, list[int]] = defaultdict(list)
    for row, bag in enumerate(bags):
        for word in bag:
            rows[word].append(row)
    return np.array([len(bag) for bag in bags]), {word: np.array(found) for word, found in rows.items()}


def _jaccard(words: set[str], sizes: np.ndarray, rows_with_word: dict[str, np.ndarray]) -> np.ndarray:
    """Return the Jaccard index (rows,) of `words` with each training question; 0 where both have no words."""
    shared = np.zeros(len(sizes))
    for word in words & rows_with_word.keys():
        shared[rows_with_word[word]] += 1
    return shared / np.maximum(sizes + len(words) - shared, 1)

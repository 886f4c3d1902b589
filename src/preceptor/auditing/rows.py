"""Find leaks in the rows: shared groups, question frames, and the same question about the same image."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from preceptor.data.types import Sample
from preceptor.normalizers import NORMALISERS

RESTATED = 0.5
"""Smallest Jaccard index of the words of two questions with the same image and answer that count as restated."""
FRAME = "-frame"
_WORD = re.compile(r"\w+")

Match = tuple[Sample, Sample]
"""A held-out sample, and the training sample that reveals its answer."""


def shared_groups(training: Sequence[Sample], held_out: Sequence[Sample]) -> list[Match]:
    """Return the held-out samples whose group (patient, case or image) also occurs in training."""
    groups = {sample.group: sample for sample in training if sample.group}
    return [(sample, groups[sample.group]) for sample in held_out if sample.group in groups]


def frames_of(training: Sequence[Sample], held_out: Sequence[Sample]) -> list[Match]:
    """Return the held-out samples whose question frame is a training sample.

    A frame (VQA-RAD) is a question as a template, with the same image and answer. Its id is that of the sample with the
    suffix `-frame`.
    """
    frames = {
        sample.id.removesuffix(FRAME): sample
        for sample in training
        if sample.tags.get("phrase_type") == "frame" or sample.id.endswith(FRAME)
    }
    return [(sample, frames[sample.id]) for sample in held_out if sample.id in frames]


def asked_in_both(
    training: Sequence[Sample], held_out: Sequence[Sample], image: Callable[[Sample], Hashable]
) -> list[Match]:
    """Return the held-out samples whose question also occurs in training about the same image.

    Case and punctuation are ignored. `image` returns a key that is equal for samples about the same image.
    """
    training_questions = {(image(sample), _words(sample.question)): sample for sample in training}
    keys = [(image(sample), _words(sample.question)) for sample in held_out]
    return [
        (sample, training_questions[key])
        for sample, key in zip(held_out, keys, strict=True)
        if key in training_questions
    ]


def restated(
    training: Sequence[Sample],
    held_out: Sequence[Sample],
    image: Callable[[Sample], Hashable],
    normaliser: str = "mevf",
) -> list[Match]:
    """Return the held-out samples that share image, answer and at least half of the words with a training sample."""
    rows: defaultdict[tuple[Hashable, str], list[tuple[set[str], Sample]]] = defaultdict(list)
    for sample in training:
        rows[image(sample), NORMALISERS[normaliser](sample.answer)].append((set(_words(sample.question)), sample))
    matches = []
    for sample in held_out:
        words = set(_words(sample.question))
        keys = dict.fromkeys((image(sample), NORMALISERS[normaliser](answer)) for answer in sample.answers)
        other = next(
            (
                row
                for key in keys
                for training_words, row in rows.get(key, ())
                if len(words & training_words) >= RESTATED * max(1, len(words | training_words))
            ),
            None,
        )
        if other is not None:
            matches.append((sample, other))
    return matches


def _words(question: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(question.lower()))

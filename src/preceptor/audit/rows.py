"""Leaks that are in the rows: shared groups, question frames, the same question about the same image."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from preceptor.data.types import Sample
from preceptor.normalizers import NORMALISERS

RESTATED = 0.5
"""Jaccard index of the words of two questions from which one restates the other, if image and answer are the same."""
FRAME = "-frame"
_WORD = re.compile(r"\w+")

Match = tuple[Sample, Sample]
"""A held-out row, and the training row that gives it away."""


def shared_groups(learnt: Sequence[Sample], held_out: Sequence[Sample]) -> list[Match]:
    """Return the held-out rows whose group (patient, case, image: what the data set says) is in training too."""
    groups = {sample.group: sample for sample in learnt if sample.group}
    return [(sample, groups[sample.group]) for sample in held_out if sample.group in groups]


def frames_of(learnt: Sequence[Sample], held_out: Sequence[Sample]) -> list[Match]:
    """Return the held-out rows whose own question frame is a training row.

    A frame (VQA-RAD) is the question in template form with the row's image and answer; its id is the row's with
    `-frame` behind.
    """
    frames = {
        sample.id.removesuffix(FRAME): sample
        for sample in learnt
        if sample.tags.get("phrase_type") == "frame" or sample.id.endswith(FRAME)
    }
    return [(sample, frames[sample.id]) for sample in held_out if sample.id in frames]


def asked_in_both(
    learnt: Sequence[Sample], held_out: Sequence[Sample], image: Callable[[Sample], Hashable]
) -> list[Match]:
    """Return the held-out rows that ask, of the same image, what a training row asks; letters' case and punctuation
    aside. `image` gives what two rows about the same image have in common."""
    asked = {(image(sample), _words(sample.question)): sample for sample in learnt}
    keys = [(image(sample), _words(sample.question)) for sample in held_out]
    return [(sample, asked[key]) for sample, key in zip(held_out, keys, strict=True) if key in asked]


def restated(
    learnt: Sequence[Sample], held_out: Sequence[Sample], image: Callable[[Sample], Hashable], normaliser: str = "mevf"
) -> list[Match]:
    """Return the held-out rows of which a training row has the image, the answer, and half of the words."""
    rows: defaultdict[tuple[Hashable, str], list[tuple[set[str], Sample]]] = defaultdict(list)
    for sample in learnt:
        rows[image(sample), NORMALISERS[normaliser](sample.answer)].append((set(_words(sample.question)), sample))
    found = []
    for sample in held_out:
        words = set(_words(sample.question))
        keys = dict.fromkeys((image(sample), NORMALISERS[normaliser](answer)) for answer in sample.answers)
        other = next(
            (
                row
                for key in keys
                for their, row in rows.get(key, ())
                if len(words & their) >= RESTATED * max(1, len(words | their))
            ),
            None,
        )
        if other is not None:
            found.append((sample, other))
    return found


def _words(question: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(question.lower()))

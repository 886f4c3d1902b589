"""The answer classes of a data set."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.data.types import AnswerType, Sample
from preceptor.errors import UserError, nearest
from preceptor.normalizers import NORMALISERS

UNSEEN = -100
"""The label of an answer outside the classes: PyTorch's `ignore_index`."""


def inferred_type(answer: str) -> AnswerType:
    """Return the answer type where the data set gives none: yes and no are closed, all else is open."""
    return "closed" if answer.strip().lower() in ("yes", "no") else "open"


@dataclass(frozen=True)
class AnswerVocabulary:
    """Answer classes: `answers[label]` is the normalised text of class `label`."""

    answers: list[str]
    normaliser: str = "mevf"
    _labels: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise UserError(f"unknown answer normaliser {self.normaliser!r}{nearest(self.normaliser, NORMALISERS)}")
        object.__setattr__(self, "_labels", {answer: label for label, answer in enumerate(self.answers)})

    @classmethod
    def build(
        cls, train_samples: Sequence[Sample], normaliser: str = "mevf", minimum_count: int = 1
    ) -> AnswerVocabulary:
        """Return the classes of `train_samples`: most frequent first, ties in the order of their text.

        Each sample counts for its first answer, the one that is learnt. Raises UserError for a sample that is not of
        the training split (classes taken from test answers would leak them), for an unknown normaliser, and if no
        answer occurs `minimum_count` times.
        """
        for sample in train_samples:
            if sample.split != "train":
                raise UserError(
                    f"answer classes come from the training split alone, but {sample.id!r} is of the {sample.split} "
                    "split; give the training samples only"
                )
        vocabulary = cls([], normaliser)
        counts = Counter(vocabulary.normalise(sample.answer) for sample in train_samples)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        answers = [answer for answer, count in ranked if count >= minimum_count]
        if not answers:
            raise UserError(
                f"no answer occurs {minimum_count} time(s) among the {len(train_samples)} training samples; "
                "lower minimum_count or give more training data"
            )
        return cls(answers, normaliser)

    def normalise(self, answer: str) -> str:
        return NORMALISERS[self.normaliser](answer)

    def encode(self, answers: Iterable[str]) -> int:
        """Return the label of the first of the accepted `answers` that is a class, or -100 if none is."""
        return next(
            (self._labels[text] for text in map(self.normalise, answers) if text in self._labels),
            UNSEEN,
        )

    def __len__(self) -> int:
        return len(self.answers)

    def ceiling(self, samples: Sequence[Sample]) -> float:
        """Return the share of `samples` with an accepted answer among the classes: no classifier scores higher.

        NaN if there are no samples.
        """
        if not samples:
            return math.nan
        return sum(self.encode(sample.answers) != UNSEEN for sample in samples) / len(samples)

    def fingerprint(self) -> str:
        """Return the SHA-256 of normaliser and classes in order: equal labels mean equal answers."""
        return hashlib.sha256(json.dumps(self.as_dict(), ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, ready for JSON."""
        return {"normaliser": self.normaliser, "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> AnswerVocabulary:
        """Read what `as_dict` wrote; raises UserError if it is not a list of distinct texts and a known normaliser."""
        answers, normaliser = saved.get("answers"), saved.get("normaliser")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"saved answer classes: 'answers' must be a list of texts, not {answers!r:.80}")
        if not isinstance(normaliser, str):
            raise UserError(f"saved answer classes: 'normaliser' must be a text, not {normaliser!r:.80}")
        repeated = [answer for answer, count in Counter(answers).items() if count > 1]
        if repeated:
            raise UserError(f"saved answer classes: {repeated[0]!r} occurs twice, so its label is ambiguous")
        return cls(answers, normaliser)

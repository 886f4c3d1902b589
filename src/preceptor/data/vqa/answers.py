"""The answer classes of a data set."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from preceptor.data.findings import Finding
from preceptor.data.texts import as_text, is_given
from preceptor.data.types import AnswerType, Sample
from preceptor.errors import UserError, nearest
from preceptor.normalizers import NORMALISERS, plain

_AROUND = string.punctuation + string.whitespace
ANSWER_TYPES: dict[str, AnswerType] = {kind: kind for kind in get_args(AnswerType)}
UNSEEN = -100
"""Label of an answer that is not a class (the `ignore_index` of PyTorch)."""


def inferred_type(answer: str) -> AnswerType:
    """Return the answer type of an answer: closed for yes and no in any case and punctuation, otherwise open."""
    return "closed" if plain(answer).strip(_AROUND).lower() in ("yes", "no") else "open"


def as_answers(value: Any, place: str) -> tuple[str, ...]:
    """Return the accepted answers in a cell: one text, or a list of them. The first one is the training target.

    Raises:
        UserError: an answer is not a text or a number (see `data.texts.as_text`).
    """
    return tuple(as_text(one, place) for one in (value if isinstance(value, list) else [value]))


def mixed_types(cells: Iterable[Any], place: str) -> list[Finding]:
    """Return a finding if some answers of a column are numbers and others are texts."""
    values = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell]) if is_given(one)]
    texts = sum(isinstance(value, str) for value in values)
    if texts in (0, len(values)):
        return []
    reason = f"{place} has {texts} texts and {len(values) - texts} numbers; write all answers as texts"
    return [Finding((), None, reason, "warning")]


@dataclass(frozen=True)
class AnswerVocabulary:
    """Answer classes. `answers[label]` is the normalised text of the class with that label."""

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
        """Build the classes from the first answers of the training samples, the most frequent first.

        Classes of equal frequency are sorted by their text.

        Raises:
            UserError: a sample is not in the training split (classes from test answers would leak them), the normaliser
                is unknown, or no answer occurs `minimum_count` times.
        """
        for sample in train_samples:
            if sample.split != "train":
                raise UserError(
                    f"answer classes must come from the training split, but {sample.id!r} is in the {sample.split} "
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
        """Return the label of the first accepted answer that is a class, or -100 if there is none."""
        return next(
            (self._labels[text] for text in map(self.normalise, answers) if text in self._labels),
            UNSEEN,
        )

    def __len__(self) -> int:
        return len(self.answers)

    def ceiling(self, samples: Sequence[Sample]) -> float:
        """Return the fraction of samples with an accepted answer among the classes, the highest possible accuracy.

        The result is NaN if there are no samples.
        """
        if not samples:
            return math.nan
        return sum(self.encode(sample.answers) != UNSEEN for sample in samples) / len(samples)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the normaliser and the ordered classes."""
        return hashlib.sha256(json.dumps(self.as_dict(), ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the classes as a dict for JSON, which `from_dict` reads."""
        return {"normaliser": self.normaliser, "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> AnswerVocabulary:
        """Read the dict of `as_dict`. Raises UserError unless it has distinct texts and a known normaliser."""
        answers, normaliser = saved.get("answers"), saved.get("normaliser")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"saved answer classes: 'answers' must be a list of strings, not {answers!r:.80}")
        if not isinstance(normaliser, str):
            raise UserError(f"saved answer classes: 'normaliser' must be a string, not {normaliser!r:.80}")
        repeated = [answer for answer, count in Counter(answers).items() if count > 1]
        if repeated:
            raise UserError(f"saved answer classes: {repeated[0]!r} occurs twice, so its label is ambiguous")
        return cls(answers, normaliser)

"""Reflective correction (ClinKD, section 3.3 of its paper): wrong answers are found, corrected and learnt from again.

Every round the student answers a slice of the training set. An answer fails where its boxes miss, or where it is not
like the true one. A teacher, or the student itself, is shown the wrong answer and the truth and writes corrections; the
best goes into a buffer of bounded size, which is mixed into the training. The buffer is part of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from preceptor.data.grounding.boxes import find_boxes
from preceptor.grounding.selection import box_agreement

Reason = Literal["no box", "wrong box", "unlike"]
Alike = Callable[[str, str], float]
"""Similarity of two texts, in [0, 1]."""


@dataclass(frozen=True)
class Judgement:
    """Of one answer: similarity to the truth, agreement of the boxes (1 where neither has any), and why it fails."""

    similarity: float
    boxes: float
    reason: Reason | None

    @property
    def score(self) -> float:
        """What corrections are ranked by: similarity plus agreement of boxes."""
        return self.similarity + self.boxes


def judge(answer: str, truth: str, alike: Alike, *, tau: float = 0.5, overlap: float = 0.5) -> Judgement:
    """Judge an answer: it fails without a box where the truth has one, with boxes whose mean IoU is under `overlap`, or
    with a similarity under `tau`."""
    wanted, said = ([f.box for f in find_boxes(text) if f.box is not None] for text in (truth, answer))
    agreed = box_agreement(wanted, said)
    similarity = alike(answer, truth)
    reason: Reason | None = None
    if wanted and not said:
        reason = "no box"
    elif wanted and agreed < overlap:
        reason = "wrong box"
    elif similarity < tau:
        reason = "unlike"
    return Judgement(similarity, agreed, reason)


def best_correction(
    candidates: Sequence[str], truth: str, alike: Alike, *, tau: float = 0.5, overlap: float = 0.5
) -> tuple[str, Judgement] | None:
    """Return the correction most like the truth, with its judgement; of equals the first; None where all fail."""
    judged = [(text, judge(text, truth, alike, tau=tau, overlap=overlap)) for text in candidates]
    good = [(text, found) for text, found in judged if found.reason is None]
    return max(good, key=lambda pair: pair[1].score) if good else None


@dataclass(frozen=True)
class Correction:
    """One lesson: the sample, what was said wrongly, what is right, when it was found and why."""

    id: str
    question: str
    wrong: str
    corrected: str
    reason: Reason
    round: int

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.id, self.question]).encode()).hexdigest()


class CorrectionBuffer:
    """At most `size` corrections, one per question: a newer one replaces an older, and the oldest go first."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a buffer of {size} corrections holds nothing")
        self.size = size
        self._kept: dict[str, Correction] = {}
        self.rounds: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def corrections(self) -> list[Correction]:
        """The corrections, oldest first."""
        return list(self._kept.values())

    def add(self, correction: Correction) -> None:
        self._kept.pop(correction.key, None)
        self._kept[correction.key] = correction
        while len(self._kept) > self.size:
            del self._kept[next(iter(self._kept))]

    def forget(self, id: str, question: str) -> None:
        """Drop what was corrected of a question that is answered rightly now."""
        self._kept.pop(Correction(id, question, "", "", "unlike", 0).key, None)

    def close_round(self, asked: int, failures: dict[Reason, int], corrected: int) -> dict[str, Any]:
        """Note a round for the report: how many were asked, failed and why, were corrected, and the buffer's size."""
        failed = sum(failures.values())
        entry = {
            "round": len(self.rounds),
            "asked": asked,
            "failed": failed,
            "failure_rate": failed / asked if asked else 0.0,
            "reasons": dict(failures),
            "corrected": corrected,
            "size": len(self),
        }
        self.rounds.append(entry)
        return entry

    def state(self) -> str:
        """Return all that a checkpoint keeps, as JSON."""
        kept = [asdict(correction) for correction in self.corrections]
        return json.dumps({"size": self.size, "corrections": kept, "rounds": self.rounds}, ensure_ascii=False)

    @classmethod
    def restore(cls, state: str) -> CorrectionBuffer:
        """Return the buffer that `state` described, its order too."""
        document = json.loads(state)
        buffer = cls(document["size"])
        for fields in document["corrections"]:
            buffer.add(Correction(**fields))
        buffer.rounds = document["rounds"]
        return buffer

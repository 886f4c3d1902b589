"""Reflective correction (ClinKD, section 3.3): wrong answers are corrected and used for training again.

In every round the student answers a part of the training set. An answer fails if its boxes miss or if it is not similar
to the true answer. Its correction is stored in a buffer of limited size, which is mixed into the training and is part
of the checkpoint. A correction is used a few times, after all that were used less often, and then forgotten.

In the paper, a model that sees the truth generates corrections, and the best one is trained on. A sample that passes
can be much worse than the truth (IoU 0.5), so here the correction is the true answer. In a free text, a sample that
contains all of it may take its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from preceptor.data.grounding.box_formats import find_boxes, without_boxes
from preceptor.grounding.selection import box_agreement
from preceptor.text_metrics import tokens

Reason = Literal["no box", "wrong box", "unlike"]
Alike = Callable[[str, str], float]
"""Similarity of two texts, in [0, 1]."""


@dataclass(frozen=True)
class Judgement:
    """Similarity of an answer to the truth, agreement of the boxes (1 if neither has any) and reason of failure."""

    similarity: float
    boxes: float
    reason: Reason | None

    @property
    def score(self) -> float:
        """Similarity plus agreement of boxes, by which corrections are ranked."""
        return self.similarity + self.boxes


def judge(answer: str, truth: str, alike: Alike, *, tau: float = 0.5, overlap: float = 0.5) -> Judgement:
    """Judge an answer.

    It fails if it has no box although the truth has one, if the mean IoU of its boxes is below `overlap`, or if the
    similarity of the texts without their boxes is below `tau`. As words, two boxes would differ unless they are the
    same. A truth that consists of boxes has no text to compare.
    """
    true_boxes, boxes = ([f.box for f in find_boxes(text) if f.box is not None] for text in (truth, answer))
    agreement = box_agreement(true_boxes, boxes)
    text = without_boxes(truth)
    similarity = alike(without_boxes(answer), text) if text or not true_boxes else 1.0
    reason: Reason | None = None
    if true_boxes and not boxes:
        reason = "no box"
    elif true_boxes and agreement < overlap:
        reason = "wrong box"
    elif similarity < tau:
        reason = "unlike"
    return Judgement(similarity, agreement, reason)


def best_correction(
    candidates: Sequence[str], truth: str, alike: Alike, *, tau: float = 0.5, overlap: float = 0.5
) -> tuple[str, Judgement] | None:
    """Return the best correction of a free text that is no worse than the truth, with its judgement, or None.

    It contains all words of the truth one after the other, has no box and does not fail. Of equal ones it is the first.
    """
    complete = [text for text in candidates if contains(text, truth) and not find_boxes(text)]
    judged = [(text, judge(text, truth, alike, tau=tau, overlap=overlap)) for text in complete]
    passing = [(text, found) for text, found in judged if found.reason is None]
    return max(passing, key=lambda pair: pair[1].score) if passing else None


def contains(text: str, truth: str) -> bool:
    """Return whether the words of the truth occur in a text one after the other, and there are any."""
    wanted, words = tokens(truth), tokens(text)
    starts = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[start : start + len(wanted)] == wanted for start in starts)


@dataclass(frozen=True)
class Correction:
    """The correction of a wrong answer to a question, with the reason of failure, the round and the number of uses."""

    id: str
    question: str
    wrong: str
    corrected: str
    reason: Reason
    round: int
    uses: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.id, self.question]).encode()).hexdigest()


class CorrectionBuffer:
    """At most `size` corrections, one per question. New ones replace those of the same question, then the oldest."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size={size} of a correction buffer must be at least 1")
        self.size = size
        self._by_key: dict[str, Correction] = {}
        self.rounds: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def corrections(self) -> list[Correction]:
        """The corrections, the oldest first."""
        return list(self._by_key.values())

    def order(self, seed: int) -> list[Correction]:
        """Return the corrections in the order of their next use: those used least first, in an order by `seed`."""

        def position(item: tuple[str, Correction]) -> tuple[int, str]:
            key, correction = item
            text = f"{seed}:{len(self.rounds)}:{correction.uses}:{key}"
            return correction.uses, hashlib.sha256(text.encode()).hexdigest()

        return [correction for _, correction in sorted(self._by_key.items(), key=position)]

    def use(self, corrections: Sequence[Correction], limit: int) -> None:
        """Count a use of corrections, and forget those that were used `limit` times."""
        for correction in corrections:
            used = replace(correction, uses=correction.uses + 1)
            if used.uses < limit:
                self._by_key[used.key] = used
            else:
                self._by_key.pop(used.key)

    def add(self, correction: Correction) -> None:
        self._by_key.pop(correction.key, None)
        self._by_key[correction.key] = correction
        while len(self._by_key) > self.size:
            del self._by_key[next(iter(self._by_key))]

    def forget(self, id: str, question: str) -> None:
        """Remove the correction of a question that is now answered correctly."""
        self._by_key.pop(Correction(id, question, "", "", "unlike", 0).key, None)

    def close_round(self, asked: int, failures: dict[Reason, int], corrected: int) -> dict[str, Any]:
        """Record the numbers of a round for the report, and return them."""
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
        """Return the state for a checkpoint as JSON."""
        corrections = [asdict(correction) for correction in self.corrections]
        return json.dumps({"size": self.size, "corrections": corrections, "rounds": self.rounds}, ensure_ascii=False)

    @classmethod
    def restore(cls, state: str) -> CorrectionBuffer:
        """Restore a buffer from its `state`."""
        document = json.loads(state)
        buffer = cls(document["size"])
        for fields in document["corrections"]:
            buffer.add(Correction(**fields))
        buffer.rounds = document["rounds"]
        return buffer

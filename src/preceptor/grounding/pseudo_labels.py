"""Pseudo-labels: a teacher answers questions, and a student learns from its answers (ClinKD, section 3.2 of its paper).

`labeling.teach` asks the questions whose answers a store lacks, checks the answers, and writes them
(`teachers.label_store`). `PseudoLabels` reads the usable ones for a data set. Labelers are `endpoint.EndpointTeacher`
and `local_teacher.LocalTeacher`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from preceptor.data.grounding.box_formats import find_boxes, without_boxes
from preceptor.data.grounding.image_marks import images_shown
from preceptor.data.images import content_hash
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.answer_checks import FIXES, asks_for_box, first, most_common
from preceptor.grounding.selection import box_agreement, choose, word_overlap
from preceptor.teachers.label_store import Label, LabelStoreKey, read_boxes, read_labels, read_store

PROMPT_VERSION = 1
"""Version of the prompt's form: the images, the earlier turns, the question. Part of a store's cache key."""
NOT_ASKED = "not asked"


@dataclass(frozen=True)
class Prompt:
    """A question for a teacher: the last turn of `dialogue`, whose answer is empty. `key` is the `question_key`.

    `wants_box` is whether it is answered with boxes. `read` translates the boxes of an answer from the teacher's
    language to that of the data.
    """

    key: str
    turn: int
    dialogue: Dialogue
    wants_box: bool = False
    read: Callable[[str], str] = str


Save = Callable[[Sequence[Label]], None]


class Labeler(Protocol):
    """A teacher that answers questions in words."""

    @property
    def cache_key(self) -> LabelStoreKey:
        """Everything that the answers depend on except the questions."""
        ...

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], save: Save) -> Mapping[str, str]:
        """Answer every prompt whose key is not in `known`, and call `save` with the labels as they come, in any order.

        Returns the reason for every prompt that was not answered, by key.
        """
        ...


AGAIN_TEMPERATURE = 0.7
"""Temperature of a second answer, which is compared with the first, if the first is the most likely one."""


class RepeatingLabeler(Labeler, Protocol):
    """A teacher that can answer a question a second time."""

    def answer_again(self, prompts: Sequence[Prompt], save: Save) -> Mapping[str, str]:
        """Sample another answer to every prompt, as `answer`."""
        ...


def question_key(images: Sequence[str], history: Sequence[tuple[str, str]], question: str, system: str = "") -> str:
    """Return the SHA-256, in hex, of a question's content.

    `images` are the SHA-256 of the image files' bytes, `history` the earlier turns as the data set has them, `system`
    is the system message of the dialogue.
    """
    content = [list(images), [list(turn) for turn in history], question, *([system] if system else [])]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class ContentHashes:
    """SHA-256 of image files. Each file is read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, dialogue: Dialogue) -> tuple[str, ...]:
        for path in dialogue.images:
            if path not in self._known:
                self._known[path] = content_hash(path)
        return tuple(self._known[path] for path in dialogue.images)

    def keys(self, dialogue: Dialogue) -> list[str]:
        """Return the key of each of a dialogue's questions."""
        images = self.of(dialogue)
        return [
            question_key(images, dialogue.turns[:i], turn[0], dialogue.system) for i, turn in enumerate(dialogue.turns)
        ]


def prompts_of_turn(
    dialogues: Sequence[Dialogue], turn: int, hashes: ContentHashes, answers: Mapping[str, str]
) -> Iterator[Prompt]:
    """Return the prompts for question number `turn` (from 0) of each dialogue, every key once.

    Earlier answers are those of the data set, else the teacher's in `answers`, by key. A dialogue with an earlier
    question that has neither is skipped.
    """
    seen: set[str] = set()
    for dialogue in dialogues:
        if turn >= len(dialogue.turns):
            continue
        keys = hashes.keys(dialogue)
        earlier = [
            answer or answers.get(key, "") for key, (_, answer) in zip(keys, dialogue.turns[:turn], strict=False)
        ]
        if keys[turn] in seen or not all(text.strip() for text in earlier):
            continue
        seen.add(keys[turn])
        history = [(question, text) for (question, _), text in zip(dialogue.turns[:turn], earlier, strict=True)]
        yield prompt_of(dialogue, turn, keys[turn], history)


def prompt_of(dialogue: Dialogue, turn: int, key: str, history: Sequence[tuple[str, str]]) -> Prompt:
    """Return the prompt for question number `turn` of a dialogue of the data, after the turns `history`."""
    question, truth = dialogue.turns[turn]
    wants_box = asks_for_box(question, truth, dialogue.task, alone=len(dialogue.turns) == 1)
    images = images_shown([asked for asked, _ in dialogue.turns], dialogue.images, turn + 1)
    return Prompt(key, turn, replace(dialogue, images=images, turns=(*history, (question, ""))), wants_box)


@dataclass(frozen=True)
class PseudoLabelled:
    """A dialogue with a teacher's answers; `confidence` and `margin` are means over all of them, None if unknown."""

    dialogue: Dialogue
    confidence: float | None
    margin: float | None


class PseudoLabels:
    """The labels of a store for a data set; `open` it.

    `teacher` and `settings` are those of the store. `labelled` are the dialogues in which every question has a usable
    answer. `left_out` counts the others by reason: not asked, or one of `answer_checks.Reason`. `boxes` is the way in
    which the teacher wrote boxes (`box_convention.BoxConvention.as_dict`).
    """

    def __init__(
        self,
        cache_key: LabelStoreKey,
        labelled: list[PseudoLabelled],
        left_out: dict[str, int],
        boxes: Mapping[str, Any] | None = None,
    ) -> None:
        self.teacher, self.settings = cache_key.teacher, cache_key.settings
        self.labelled, self.left_out, self.boxes = labelled, left_out, dict(boxes or {})

    @classmethod
    def open(
        cls, folder: Path, data: GroundingDataset, *, split: Split | None = None, allow_truncated: bool = False
    ) -> Self:
        """Read the labels for the dialogues of `data`: those of `split`, by default `train` and `unlabelled`.

        With `allow_truncated`, answers that reached the maximum number of tokens are used, too.

        Raises:
            UserError: there are no labels, they are damaged, or none belongs to a question of these data.
        """
        cache_key, names = read_store(folder)
        labels = {label.key: label for label in read_labels(folder)}
        hashes = ContentHashes()
        splits = ("train", "unlabelled") if split is None else (split,)
        wanted = [dialogue for dialogue in data.samples if dialogue.split in splits]
        labelled: list[PseudoLabelled] = []
        left_out: dict[str, int] = {}
        matched = False
        for dialogue in wanted:
            answers = [labels.get(key) for key in hashes.keys(dialogue)]
            matched = matched or any(answers)
            reason = _unusable(answers, allow_truncated)
            if reason is None:
                labelled.append(_with_answers(dialogue, [label for label in answers if label is not None]))
            else:
                left_out[reason] = left_out.get(reason, 0) + 1
        if not matched:
            others = ", ".join(dict.fromkeys(names.values()))
            raise UserError(
                f"the pseudo-labels in {folder} are of other data ({others}): none of their {len(labels)} questions is "
                f"among the {len(wanted)} dialogues of {data.name}; the images or questions have changed, or "
                "`preceptor teach` was run on other data"
            )
        return cls(cache_key, labelled, left_out, read_boxes(folder))

    @property
    def dialogues(self) -> list[Dialogue]:
        return [row.dialogue for row in self.labelled]

    @property
    def coverage(self) -> float:
        """Fraction of the dialogues that have usable answers."""
        return len(self.labelled) / (len(self.labelled) + sum(self.left_out.values()))

    @property
    def unusable(self) -> dict[str, int]:
        """Number of dialogues that were answered but are left out, by reason."""
        return {reason: count for reason, count in self.left_out.items() if reason != NOT_ASKED}

    def require_usable(self, floor: float, folder: Path, fixes: Mapping[str, str]) -> None:
        """Raise UserError if the fraction of the answered dialogues whose answers are usable is below `floor`."""
        key = "method.pseudo_labels.min_usable="
        require_usable(len(self.labelled), self.unusable, floor, folder, key=key, fixes=fixes)

    def note(self) -> str:
        """Return a sentence for the notes of a run."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        count = len(self.labelled)
        return (
            f"{count} of {count + sum(self.left_out.values())} dialogues have answers of the teacher "
            f"{self.teacher[:12] + '...' if re.fullmatch('[0-9a-f]{64}', self.teacher) else self.teacher}"
            + (f" (left out: {reasons})." if reasons else ".")
        )

    def confidence_and_margin(self, unknown: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (confidence, margin), each (N,) float32, of the labelled dialogues, for `Curriculum.weights`.

        `unknown` replaces values that are not known. Raises UserError if there are such values and `unknown` is None.
        """
        pairs = [(row.confidence, row.margin) for row in self.labelled]
        missing = sum(confidence is None or margin is None for confidence, margin in pairs)
        if missing and unknown is None:
            raise UserError(
                f"{missing} of {len(pairs)} pseudo-labels have no confidence: the server gave no log-probabilities; "
                "ask for several answers with `preceptor teach --candidates 5 --temperature 0.7`, or train without "
                "curriculum"
            )
        known = [(unknown, unknown) if None in pair else pair for pair in pairs]
        table = np.array(known, np.float32).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def _unusable(labels: Sequence[Label | None], allow_truncated: bool) -> str | None:
    if any(label is None for label in labels):
        return NOT_ASKED
    reasons = [reason for label in labels if label is not None for reason in _reasons(label)]
    return first([reason for reason in reasons if not (allow_truncated and reason == "cut off")])


def _reasons(label: Label) -> list[str]:
    return ["empty"] * (not label.answer.strip()) + ["cut off"] * (not label.ended) + list(label.reasons)


def require_usable(
    usable: int,
    unusable: Mapping[str, int],
    floor: float,
    folder: Path,
    *,
    key: str,
    fixes: Mapping[str, str] = FIXES,
) -> None:
    """Raise UserError if the fraction of usable answers is below `floor`, the setting `key`.

    `fixes` says what helps against each reason.
    """
    total = usable + sum(unusable.values())
    if total and usable < floor * total:
        top = max(unusable, key=lambda reason: unusable[reason])
        raise UserError(
            f"{usable:,} of {total:,} answers of the teacher are usable, fewer than {key}{floor:g} "
            f"({most_common(unusable)}): {fixes[top]}; the answers are kept in {folder}"
        )


def _with_answers(dialogue: Dialogue, labels: Sequence[Label]) -> PseudoLabelled:
    turns = tuple((question, label.answer) for (question, _), label in zip(dialogue.turns, labels, strict=True))
    # The mean over the dialogue's tokens, or over its answers if the number of tokens of one is not known.
    weights = [label.tokens or 0 for label in labels]
    if 0 in weights:
        weights = [1] * len(labels)
    means = []
    for values in ([label.confidence for label in labels], [label.margin for label in labels]):
        known = [value for value in values if value is not None]
        means.append(float(np.average(known, weights=weights)) if len(known) == len(labels) else None)
    return PseudoLabelled(replace(dialogue, turns=turns), *means)


def best_of(candidates: Sequence[str]) -> tuple[int, float, float]:
    """Return the index of the answer most like the others, and its (confidence, margin) by agreement.

    The confidence is the fraction of candidates that agree with it, the margin that fraction minus the fraction of the
    most frequent other answer: p1 and p1 - p2 of the distribution of answers (self-consistency, Wang et al., ICLR
    2023). Two answers agree if they have the same words in any order, and boxes with a mean IoU of at least 0.5.
    """
    index = choose(candidates, word_overlap)
    words = word_overlap([without_boxes(text) for text in candidates])
    boxes = [[match.box for match in find_boxes(text) if match.box is not None] for text in candidates]
    same = np.array(
        [
            [words[i, j] > 1 - 1e-9 and box_agreement(boxes[i], boxes[j]) >= 0.5 for j in range(len(candidates))]
            for i in range(len(candidates))
        ]
    )
    shares = same.mean(axis=1)
    others = shares[~same[index]]
    confidence = float(shares[index])
    return index, confidence, max(0.0, confidence - float(others.max(initial=0.0)))

"""Pseudo-labels: a teacher answers questions, and a student learns from its answers (ClinKD, section 3.2 of its paper).

`teach` asks what a store lacks and writes it (`label_store`); `PseudoLabels` reads it for the data that it was written
for. Teachers are `endpoint.EndpointTeacher` and `local_vlm.LocalTeacher`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from preceptor.data.grounding.boxes import find_boxes, without_boxes
from preceptor.data.images import content_hash
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.selection import box_agreement, choose, word_overlap
from preceptor.teachers.label_store import Label, LabelIdentity, LabelStore, read_labels, read_manifest

PROMPT_VERSION = 1
"""Of how a question is put to a teacher: the images, the earlier turns, the question. Part of a store's identity."""


@dataclass(frozen=True)
class Prompt:
    """A question for a teacher: the last of `dialogue`, whose answer there is empty. `key` is its content's."""

    key: str
    turn: int
    dialogue: Dialogue


Keep = Callable[[Sequence[Label]], None]


class Teacher(Protocol):
    """Who answers. `identity` is what its answers depend on, the questions aside."""

    @property
    def identity(self) -> LabelIdentity: ...

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], keep: Keep) -> Mapping[str, str]:
        """Answer every prompt whose key is not `known`, and hand labels to `keep` as they come, in any order.

        Returns the reasons why others were not answered, by key.
        """
        ...


def question_key(images: Sequence[str], history: Sequence[tuple[str, str]], question: str) -> str:
    """Return the SHA-256, in hex, of a question's content.

    `images` are the SHA-256 of the image files' bytes, `history` the earlier turns as the data set has them.
    """
    content = [list(images), [list(turn) for turn in history], question]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class ContentHashes:
    """SHA-256 of image files, each read once."""

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
        return [question_key(images, dialogue.turns[:i], turn[0]) for i, turn in enumerate(dialogue.turns)]


def prompts_of_turn(
    dialogues: Sequence[Dialogue], turn: int, hashes: ContentHashes, answers: Mapping[str, str]
) -> Iterator[Prompt]:
    """Give the prompts of the question number `turn` (from 0) of each dialogue, every key once.

    Earlier answers are the data set's, and where it has none the teacher's, out of `answers` by key; a dialogue one of
    whose earlier questions has neither is passed over.
    """
    seen: set[str] = set()
    for dialogue in dialogues:
        if turn >= len(dialogue.turns):
            continue
        keys = hashes.keys(dialogue)
        said = [given or answers.get(key, "") for key, (_, given) in zip(keys, dialogue.turns, strict=True)]
        if keys[turn] in seen or not all(text.strip() for text in said[:turn]):
            continue
        seen.add(keys[turn])
        history = tuple((asked, text) for (asked, _), text in zip(dialogue.turns[:turn], said, strict=False))
        asked = (*history, (dialogue.turns[turn][0], ""))
        yield Prompt(keys[turn], turn, replace(dialogue, turns=asked))


@dataclass(frozen=True)
class LabelingResult:
    """What `teach` did: questions in all, those that the store held before, those answered now; reasons of the others,
    with how many there are of each."""

    questions: int
    before: int
    answered: int
    unanswered: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "before": self.before,
            "answered": self.answered,
            "unanswered": self.unanswered,
        }


def teach(
    folder: Path,
    data: GroundingDataset,
    dialogues: Sequence[Dialogue],
    teacher: Teacher,
    *,
    hashes: ContentHashes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelingResult:
    """Have a teacher answer all questions of `dialogues`, which are of `data`, that the store in `folder` lacks.

    Answers are on the disk as soon as they have come: whatever ends it, the same call goes on from there. `progress`
    gets the questions that are answered and their number.

    Raises UserError as `LabelStore.open`, and whatever stops the teacher.
    """
    hashes = hashes or ContentHashes()
    names = {data.fingerprint(): data.name}
    with LabelStore.open(folder, teacher.identity, names) as store:
        keys = {key for dialogue in dialogues for key in hashes.keys(dialogue)}
        held = len(keys & store.keys)
        reasons: dict[str, str] = {}
        done = held

        def keep(labels: Sequence[Label]) -> None:
            nonlocal done
            store.append(labels)
            done += len(labels)
            if progress is not None:
                progress(done, len(keys))

        for turn in range(max((len(dialogue.turns) for dialogue in dialogues), default=0)):
            answers = {label.key: label.answer for label in read_labels(folder)} if turn else {}
            prompts = list(prompts_of_turn(dialogues, turn, hashes, answers))
            if any(prompt.key not in store.keys for prompt in prompts):
                reasons.update(teacher.answer(prompts, frozenset(store.keys), keep))
        waiting = len(keys - store.keys) - len(reasons)
    counted = Counter(reasons.values())
    if waiting:
        counted["an earlier question of the dialogue has no answer"] = waiting
    return LabelingResult(len(keys), held, done - held, dict(counted))


@dataclass(frozen=True)
class PseudoLabelled:
    """A dialogue with a teacher's answers; `confidence` and `margin` over all of them, None where not known."""

    dialogue: Dialogue
    confidence: float | None
    margin: float | None


class PseudoLabels:
    """The labels of a store for a data set; `open` it.

    `teacher` and `settings` say who answered and how. `labelled` are the dialogues all of whose questions have a usable
    answer. `left_out` counts the others by reason: not asked, empty, cut off.
    """

    def __init__(self, identity: LabelIdentity, labelled: list[PseudoLabelled], left_out: dict[str, int]) -> None:
        self.teacher, self.settings = identity.teacher, identity.settings
        self.labelled, self.left_out = labelled, left_out

    @classmethod
    def open(cls, folder: Path, data: GroundingDataset, *, split: Split | None = None, cut_off: bool = False) -> Self:
        """Read the labels for the dialogues of `data`, of one `split` or of `train` and `unlabelled`.

        Args:
            cut_off: take answers too that reached the most tokens before they ended.

        Raises:
            UserError: there are no labels, they are damaged, or not one is of a question of this data.
        """
        manifest = read_manifest(folder)
        labels = {label.key: label for label in read_labels(folder)}
        hashes = ContentHashes()
        splits = ("train", "unlabelled") if split is None else (split,)
        wanted = [dialogue for dialogue in data.samples if dialogue.split in splits]
        labelled: list[PseudoLabelled] = []
        left_out: dict[str, int] = {}
        found = False
        for dialogue in wanted:
            mine = [labels.get(key) for key in hashes.keys(dialogue)]
            found = found or any(mine)
            reason = _unusable(mine, cut_off)
            if reason is None:
                labelled.append(_with_answers(dialogue, [label for label in mine if label is not None]))
            else:
                left_out[reason] = left_out.get(reason, 0) + 1
        if not found:
            theirs = ", ".join(dict.fromkeys(manifest["data"].values()))
            raise UserError(
                f"the pseudo-labels in {folder} are of other data ({theirs}): none of their {len(labels)} questions is "
                f"among the {len(wanted)} dialogues of {data.name}; the images or questions have changed "
                "since, or `preceptor teach` was run on something else"
            )
        return cls(LabelIdentity(manifest["teacher"], manifest["settings"]), labelled, left_out)

    @property
    def dialogues(self) -> list[Dialogue]:
        return [row.dialogue for row in self.labelled]

    @property
    def coverage(self) -> float:
        """The share of the data's dialogues that can be learnt from."""
        return len(self.labelled) / (len(self.labelled) + sum(self.left_out.values()))

    def note(self) -> str:
        """Return the sentence to print beside results."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        count = len(self.labelled)
        return (
            f"{count} of {count + sum(self.left_out.values())} dialogues have answers of the teacher "
            f"{self.teacher[:12] + '...' if re.fullmatch('[0-9a-f]{64}', self.teacher) else self.teacher}"
            + (f" (left out: {reasons})." if reasons else ".")
        )

    def confidence_and_margin(self, unknown: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (confidence, margin), each (N,) float32, of the labelled dialogues, for `Curriculum.weights`.

        Where they are not known both are `unknown`. Raises UserError where they are not known and that is None.
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


def _unusable(labels: Sequence[Label | None], cut_off: bool) -> str | None:
    if any(label is None for label in labels):
        return "not asked"
    if any(label is not None and not label.answer.strip() for label in labels):
        return "empty"
    if not cut_off and any(label is not None and not label.ended for label in labels):
        return "cut off"
    return None


def _with_answers(dialogue: Dialogue, labels: Sequence[Label]) -> PseudoLabelled:
    turns = tuple((asked, label.answer) for (asked, _), label in zip(dialogue.turns, labels, strict=True))
    # By tokens, as one mean over the dialogue's; where one answer's number is not known, by answers.
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

    The confidence is the share of the candidates that say the same as it does, the margin what that is above the share
    of the most frequent other answer: p1 and p1 - p2 of the answers' own distribution (self-consistency, Wang et al.,
    ICLR 2023). Two answers say the same where their words are the same, whatever their order, and their boxes overlap
    by a mean IoU of at least 0.5.
    """
    index = choose(candidates, word_overlap)
    words = word_overlap([without_boxes(text) for text in candidates])
    boxes = [[found.box for found in find_boxes(text) if found.box is not None] for text in candidates]
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

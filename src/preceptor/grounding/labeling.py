"""Have a teacher answer the questions of a data set, check every answer, and store both.

The first answers tell whether the teacher is of use: how it writes boxes is measured on questions whose boxes are known
(`box_convention`), and the run stops as soon as too few answers are usable (`answer_checks`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.errors import UserError
from preceptor.grounding.answer_checks import MIN_AGREEMENT, first, same_answers, unusable
from preceptor.grounding.answer_profile import AnswerProfile
from preceptor.grounding.box_convention import BoxConvention, BoxSettings, mentions_box, true_boxes
from preceptor.grounding.label_page import LabelView, write_label_page
from preceptor.grounding.pseudo_labels import (
    ContentHashes,
    Labeler,
    Prompt,
    RepeatingLabeler,
    prompt_of,
    prompts_of_turn,
    require_usable,
)
from preceptor.grounding.selection import agreement
from preceptor.statistics import wilson
from preceptor.teachers.label_store import Label, LabelStore, read_boxes, read_labels

log = logging.getLogger(__name__)

FIRST = 10
"""Number of random questions that are asked first, and of answers on the page of labels."""


@dataclass(frozen=True)
class CheckSettings:
    """How answers are checked.

    Args:
        min_usable: smallest fraction of usable answers. The run stops as soon as it is out of reach.
        agreement: fraction of the questions, at random, that are asked a second time after the same earlier turns. An
            answer that differs from the second one is not usable.
        system_prompt: the teacher's system prompt, whose echo is no answer.
        page: write `labels.html`, with random answers, after the first answers and at the end.
    """

    min_usable: float = 0.0
    agreement: float = 0.0
    system_prompt: str = ""
    page: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.min_usable <= 1 and 0 <= self.agreement <= 1):
            raise UserError(f"min_usable {self.min_usable:g} and agreement {self.agreement:g} must be in [0, 1]")


@dataclass(frozen=True)
class LabelingResult:
    """Counts of `teach`: all questions, those answered before, those answered now, and the others by reason.

    Of all answers, `usable` can be labels, and `unusable` counts the others by reason. `boxes` is the way in which the
    teacher writes boxes (`BoxConvention.as_dict`).
    """

    questions: int
    before: int
    answered: int
    unanswered: dict[str, int]
    usable: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def teach(
    folder: Path,
    data: GroundingDataset,
    dialogues: Sequence[Dialogue],
    teacher: Labeler,
    *,
    hashes: ContentHashes | None = None,
    progress: Callable[[int, int], None] | None = None,
    boxes: BoxSettings | None = None,
    checks: CheckSettings | None = None,
) -> LabelingResult:
    """Have a teacher answer all questions of `dialogues`, a part of `data`, that the store in `folder` lacks.

    Every answer is written as soon as it arrives, so that the same call resumes after any interruption. Answers of
    earlier calls are checked again. `progress` is called with the number of answered questions and of all.

    Raises:
        UserError: as `LabelStore.open`, `Labeler.answer` and `BoxSettings.measure`, or too few answers are usable.
    """
    names = {data.fingerprint(): data.name}
    with LabelStore.open(folder, teacher.cache_key, names) as store:
        boxes, checks = boxes or BoxSettings(), checks or CheckSettings()
        training = [dialogue for dialogue in data.samples if dialogue.split not in ("validation", "test")]
        profile = AnswerProfile.of(turn for dialogue in [*training, *dialogues] for turn in dialogue.turns)
        return _Labeling(store, dialogues, teacher, hashes or ContentHashes(), progress, boxes, checks, profile).run()


class _Labeling:
    """One call of `teach`."""

    def __init__(
        self,
        store: LabelStore,
        dialogues: Sequence[Dialogue],
        teacher: Labeler,
        hashes: ContentHashes,
        progress: Callable[[int, int], None] | None,
        boxes: BoxSettings,
        checks: CheckSettings,
        profile: AnswerProfile,
    ) -> None:
        self.store, self.dialogues, self.teacher, self.hashes = store, dialogues, teacher, hashes
        self.progress, self.boxes, self.checks, self.profile = progress, boxes, checks, profile
        self.labels = {label.key: label for label in read_labels(store.folder)}
        self.prompts, self.truths = self._known_questions()
        self.keys = {key for dialogue in dialogues for key in hashes.keys(dialogue)}
        self.before = len(self.keys & store.keys)
        self.unanswered: dict[str, str] = {}
        self.asked: dict[str, Prompt] = {}
        self.convention: BoxConvention | None = None
        self.next_check = FIRST

    def _known_questions(self) -> tuple[dict[str, Prompt], dict[str, str]]:
        """Return all prompts, with the data's own earlier answers, and the true answers, by key."""
        prompts: dict[str, Prompt] = {}
        truths: dict[str, str] = {}
        for dialogue in [*self.dialogues, *self.boxes.measured]:
            for turn, key in enumerate(self.hashes.keys(dialogue)):
                prompts.setdefault(key, prompt_of(dialogue, turn, key, dialogue.turns[:turn]))
                if dialogue.turns[turn][1].strip():
                    truths.setdefault(key, dialogue.turns[turn][1])
        return prompts, truths

    def run(self) -> LabelingResult:
        self.convention = self._box_convention()
        self._check_again()
        self._stop_early()
        if self.checks.min_usable > 0:
            order = sorted(prompts_of_turn(self.dialogues, 0, self.hashes, {}), key=lambda prompt: prompt.key)
            self._ask(order[:FIRST])
            self._stop_early()
            self._write_page()
        for turn in range(max((len(dialogue.turns) for dialogue in self.dialogues), default=0)):
            # An unusable answer is no history for the next question.
            answers = {key: label.answer for key, label in self.labels.items() if not label.reasons} if turn else {}
            prompts = list(prompts_of_turn(self.dialogues, turn, self.hashes, answers))
            self.asked |= {prompt.key: prompt for prompt in prompts}
            self._ask(prompts)
        self._ask_again()
        self._compare()
        self._write_page()
        usable, bad = self._count()
        require_usable(usable, bad, self.checks.min_usable, self.store.folder, key="--min-usable ")
        counted = Counter(self.unanswered.values())
        if waiting := len(self.keys - self.store.keys - set(self.unanswered)):
            counted["an earlier question of the dialogue has no usable answer"] = waiting
        done = len(self.keys & self.store.keys)
        return LabelingResult(
            len(self.keys), self.before, done - self.before, dict(counted), usable, bad, self.convention.as_dict()
        )

    # Boxes

    def _box_convention(self) -> BoxConvention:
        """Return how the teacher writes boxes: as stored, as given, or as measured now."""
        wanted, stored = self.boxes.given(), read_boxes(self.store.folder)
        if stored:
            found = BoxConvention.restore(stored, self.boxes)
            if wanted is not None and wanted.format != found.format:
                raise UserError(
                    f"the pseudo-labels in {self.store.folder} were asked for with boxes in the format {found.format}, "
                    f"not {wanted.format}: use the same --box-format, or another folder"
                )
            return found
        if wanted is None and not any(mentions_box(prompt) for prompt in self.prompts.values()):
            wanted = BoxConvention(settings=self.boxes)
        if wanted is None:
            measured = [prompt for d in self.boxes.measured for prompt in prompts_of_turn([d], 0, self.hashes, {})]
            self._ask(measured)
            pairs = [
                (prompt.dialogue, self.labels[prompt.key].written, true_boxes(self.truths[prompt.key]))
                for prompt in measured
                if prompt.key in self.labels
            ]
            wanted = self.boxes.measure(pairs)
            log.info("%s", wanted.sentence())
        self.store.set_boxes(wanted.as_dict())
        return wanted

    # Asking

    def _ask(self, prompts: Sequence[Prompt]) -> None:
        prompts = [prompt for prompt in prompts if prompt.key not in self.unanswered]
        if all(prompt.key in self.store.keys for prompt in prompts):
            return
        asked = []
        for prompt in prompts:
            if self.convention is None or self.convention.can_read(prompt):
                asked.append(self._translated(prompt))
            else:
                self.unanswered[prompt.key] = "its images differ in size, and the teacher's boxes are in pixels"
        self.unanswered |= self.teacher.answer(asked, frozenset(self.store.keys), self._save)

    def _translated(self, prompt: Prompt) -> Prompt:
        return self.convention.translate(prompt) if self.convention is not None else prompt

    def _save(self, labels: Sequence[Label]) -> None:
        checked = [self._check(label) for label in labels]
        self.store.append(checked)
        self.labels |= {label.key: label for label in checked}
        if self.progress is not None:
            self.progress(len(self.keys & self.store.keys), len(self.keys))
        self._stop_early()

    def _ask_again(self) -> None:
        """Ask the random fraction of the questions a second time whose answers are usable so far."""
        chosen = [
            prompt
            for key, prompt in self.asked.items()
            if int(key[:12], 16) < self.checks.agreement * 16**12
            and (label := self.labels.get(key)) is not None
            and not label.reasons
            and not label.candidates
        ]

        def save(labels: Sequence[Label]) -> None:
            both = []
            for second in labels:
                one = self.labels[second.key]
                both.append(self._check(replace(one, candidates=(one.written, second.written))))
            self._replace(both)
            self._stop_early()

        if chosen:
            teacher = cast(RepeatingLabeler, self.teacher)
            teacher.answer_again([self._translated(prompt) for prompt in chosen], save)

    # Checking

    def _check(self, label: Label) -> Label:
        """Return a label with its boxes in the language of the data and the reasons against it."""
        if self.convention is None:  # not measured yet
            return label
        prompt, raw = self._translated(self.prompts[label.key]), label.written
        answer = prompt.read(raw)
        question = self.prompts[label.key].dialogue.turns[-1][0]
        reasons = unusable(
            question,
            answer,
            ended=label.ended,
            wants_box=prompt.wants_box,
            system_prompt=self.checks.system_prompt,
            profile=self.profile,
            truth=self.truths.get(label.key, ""),
        )
        if raw in label.candidates:
            texts = [prompt.read(text) for text in label.candidates]
            if agreement(texts, label.candidates.index(raw)) < MIN_AGREEMENT:
                reasons.append("samples disagree")
        return replace(label, answer=answer, raw=raw if raw != answer else "", reasons=tuple(reasons))

    def _check_again(self) -> None:
        known = [self.labels[key] for key in self.prompts if key in self.labels]
        checked = [self._check(label) for label in known]
        self._replace([new for old, new in zip(known, checked, strict=True) if old != new])

    def _compare(self) -> None:
        """Mark the answers of a teacher that gives one answer to most questions."""
        answered = [self.labels[key] for key in sorted(self.keys & self.labels.keys())]
        rows = [(row.key, self.prompts[row.key].dialogue.turns[-1][0], row.answer) for row in answered]
        same, reason = same_answers(rows), "same answer to most questions"
        changed = [label for label in answered if (label.key in same) != (reason in label.reasons)]
        others = {label.key: tuple(r for r in label.reasons if r != reason) for label in changed}
        self._replace(
            [replace(label, reasons=others[label.key] + (reason,) * (label.key in same)) for label in changed]
        )

    def _replace(self, labels: Sequence[Label]) -> None:
        self.store.replace(labels)
        self.labels |= {label.key: label for label in labels}

    def _count(self) -> tuple[int, dict[str, int]]:
        """Return the number of usable answers, and that of the others by reason."""
        reasons = [first(self.labels[key].reasons) for key in self.keys & self.labels.keys()]
        bad = Counter(reason for reason in reasons if reason is not None)
        return len(reasons) - bad.total(), dict(bad.most_common())

    def _stop_early(self) -> None:
        """After 10, 20, 40, ... answers, raise UserError if the fraction of usable ones is clearly too small."""
        if self.convention is None or not self.checks.min_usable or len(self.labels) < self.next_check:
            return
        while len(self.labels) >= self.next_check:
            self.next_check *= 2
        self._compare()
        usable, bad = self._count()
        total = usable + sum(bad.values())
        floor = self.checks.min_usable
        if total >= FIRST and usable < floor * total and wilson(usable, total).high < floor:
            self._write_page()
            require_usable(usable, bad, self.checks.min_usable, self.store.folder, key="--min-usable ")

    def _write_page(self) -> None:
        if not self.checks.page:
            return
        assert self.convention is not None
        usable, bad = self._count()
        keys = sorted(self.keys & self.labels.keys())
        boxed = [key for key in keys[FIRST:] if self.prompts[key].wants_box][: FIRST // 2]
        bad_keys = [key for key in keys[FIRST:] if self.labels[key].reasons and key not in boxed]
        examples = {self.labels[key].reasons[0]: key for key in reversed(bad_keys)}

        def view(key: str) -> LabelView:
            return LabelView(self.prompts[key].dialogue, self.labels[key], self.truths.get(key, ""))

        path = write_label_page(
            self.store.folder,
            self.teacher.cache_key.teacher,
            (usable, bad),
            self.convention,
            [view(key) for key in keys[:FIRST]],
            [view(key) for key in boxed],
            [view(key) for key in examples.values()],
        )
        log.info("%d of the %d answers are shown in %s", min(FIRST, len(keys)), len(keys), path)

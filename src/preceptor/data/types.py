"""The nouns of data that every room shares: questions (Sample, VqaData, Prediction) and volumes (Case, CaseData).

Free of torch, so that scoring starts fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

AnswerType = Literal["open", "closed"]
Split = Literal["train", "validation", "test", "unlabelled", "teacher"]
"""`unlabelled` rows have no answers: a teacher gives them. From those of `teacher` it alone has learnt."""


@dataclass(frozen=True)
class Sample:
    """One question about one image; of an unlabelled row the question may be empty.

    `answers` holds every accepted answer, as written in the data set; the first is the one that is learnt. `group`
    names what must not be divided between splits (an image, a patient). `tags` carries whatever else a protocol selects
    on, such as VQA-RAD's `phrase_type`.
    """

    id: str
    image: Path
    question: str
    answers: tuple[str, ...]
    answer_type: AnswerType
    group: str
    split: Split
    question_type: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return self.answers[0]


@dataclass
class VqaData:
    """A data set as read, divided into splits.

    `name` and `variant` name the protocol (`vqa-rad`, `clean`); `notes` are sentences that must be printed beside every
    result (a leaking split says so here); `leaking` is true where test rows share frames, images of held-out groups
    or patients with training rows.
    """

    name: str
    variant: str
    root: Path
    samples: list[Sample]
    notes: list[str] = field(default_factory=list)
    leaking: bool = False

    def split(self, split: Split) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def fingerprint(self, split: Split | None = None) -> str:
        """Return the SHA-256 of the rows (ids, questions, answers, splits; image names, not their bytes)."""
        digest = hashlib.sha256()
        for s in self.samples:
            if split is None or s.split == split:
                row = [
                    s.id,
                    s.image.name,
                    s.question,
                    list(s.answers),
                    s.answer_type,
                    s.group,
                    s.split,
                    s.question_type,
                ]
                digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


@dataclass
class Prediction:
    """One answer. `answer` is a text of the answer classes; `probability` is its softmax probability."""

    id: str
    answer: str
    probability: float


@dataclass(frozen=True)
class VolumeFile:
    """A 3-D image: a NIfTI file, or one channel of a 4-D one."""

    path: Path
    channel: int | None = None


@dataclass(frozen=True)
class Case:
    """One examination: the modalities that are there, by name, and its label map where it has one.

    All images and the label map share one voxel grid. `group` names the patient, whose cases stay in one
    split.
    """

    id: str
    images: Mapping[str, VolumeFile]
    mask: VolumeFile | None
    group: str
    split: Split
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass
class CaseData:
    """Cases as read, divided into splits.

    `modalities` is the order of the network's inputs; a case may lack some of them, never all. `regions` are what is
    segmented: the label values that make up each (BraTS: ``{"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}``); they may
    overlap. `notes` must be printed beside every result.
    """

    name: str
    variant: str
    root: Path
    modalities: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    cases: list[Case]
    notes: list[str] = field(default_factory=list)
    leaking: bool = False

    def split(self, split: Split) -> list[Case]:
        return [case for case in self.cases if case.split == split]

    def fingerprint(self, split: Split | None = None) -> str:
        """Return the SHA-256 of ids, groups, splits, file names and regions (not of the files' bytes)."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.modalities, {k: list(v) for k, v in self.regions.items()}]).encode())
        for c in self.cases:
            if split is None or c.split == split:
                files = {m: [f.path.name, f.channel] for m, f in sorted(c.images.items())}
                mask = [c.mask.path.name, c.mask.channel] if c.mask else None
                digest.update(json.dumps([c.id, c.group, c.split, files, mask], ensure_ascii=False).encode())
        return digest.hexdigest()


GroundingTask = Literal["vg", "roc", "rc", "mia"]
"""Med-GRIT-270k's four: visual grounding, referring object classification, referring captioning, image analysis."""


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers about images, in their order; boxes are written in the texts (`data.boxes`).

    `modality` is one of the eight of Med-GRIT-270k (ct, mr, x, pet, endoscopy, dermoscopy, fundus, ultrasound) or
    another word, by which scores are divided. `group` names what must not be divided between splits.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    task: GroundingTask
    modality: str
    group: str
    split: Split
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass
class DialogueData:
    """Dialogues as read, divided into splits; `faults` counts the faults of boxes, `faulty` lists where they are."""

    name: str
    variant: str
    root: Path
    dialogues: list[Dialogue]
    faults: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    leaking: bool = False
    faulty: list[str] = field(default_factory=list)

    def split(self, split: Split) -> list[Dialogue]:
        return [dialogue for dialogue in self.dialogues if dialogue.split == split]

    def fingerprint(self, split: Split | None = None) -> str:
        """Return the SHA-256 of ids, image names, turns, tasks, groups and splits."""
        digest = hashlib.sha256()
        for d in self.dialogues:
            if split is None or d.split == split:
                row = [d.id, [image.name for image in d.images], d.turns, d.task, d.modality, d.group, d.split]
                digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()

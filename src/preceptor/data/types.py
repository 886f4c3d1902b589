"""Samples of the three tasks and the `Dataset` that holds them. Does not import torch, so that scoring starts fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from preceptor.data.findings import Finding

AnswerType = Literal["open", "closed"]
Split = Literal["train", "validation", "test", "unlabelled", "teacher"]
"""`unlabelled` samples have no labels; a teacher provides them. `teacher` samples train the teacher only."""


class GroupedSample(Protocol):
    """What the samples of every task have in common."""

    @property
    def id(self) -> str: ...

    @property
    def group(self) -> str:
        """The patient or image whose samples must stay in one split."""

    @property
    def split(self) -> Split: ...

    def fingerprint_row(self) -> list[Any]:
        """Return the JSON values that enter the fingerprint of the data set."""


SampleT = TypeVar("SampleT", bound=GroupedSample)


@dataclass
class Dataset(Generic[SampleT]):
    """Samples of one data set, each assigned to a split.

    Attributes:
        name: Name of the data set, such as `vqa-rad`.
        variant: Version of the data set that a protocol uses, such as `clean`.
        root: Folder of the data set.
        samples: All samples, in the order of the data set.
        notes: Sentences that are printed next to every result.
        leaking: True if test samples share patients, images or question templates with training samples.
        findings: Problems of the rows, which are found without decoding a file. `doctor` lists them before those of
            the files, and a run adds them to its notes.
    """

    name: str
    variant: str
    root: Path
    samples: list[SampleT]
    notes: list[str] = field(default_factory=list)
    leaking: bool = False
    findings: list[Finding] = field(default_factory=list)

    def add_note(self, note: str) -> None:
        """Add a note, unless it is there from an earlier stage."""
        if note not in self.notes:
            self.notes.append(note)

    def split(self, split: Split) -> list[SampleT]:
        """Return the samples of one split, in order."""
        return [sample for sample in self.samples if sample.split == split]

    def fingerprint(self, split: Split | None = None) -> str:
        """Return a SHA-256 over the samples of one split, or of all splits.

        File names enter the hash, the contents of files do not.
        """
        digest = hashlib.sha256(self._fingerprint_header())
        for sample in self.samples:
            if split is None or sample.split == split:
                digest.update(json.dumps(sample.fingerprint_row(), ensure_ascii=False).encode())
        return digest.hexdigest()

    def _fingerprint_header(self) -> bytes:
        return b""


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: Identifier, unique in the data set.
        image: Path of the image.
        question: Text of the question. It may be empty if the sample is unlabelled.
        answers: All accepted answers as the data set spells them. The first one is the training target.
        answer_type: `open` or `closed`.
        group: Image or patient whose samples must stay in one split.
        split: Split of the sample.
        question_type: Category of the question that the data set gives.
        tags: Further properties that protocols select on, such as `phrase_type` of VQA-RAD.
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
        """The training target."""
        return self.answers[0]

    def fingerprint_row(self) -> list[Any]:
        """Return all fields except `tags`, with the file name of the image."""
        return [
            self.id,
            self.image.name,
            self.question,
            list(self.answers),
            self.answer_type,
            self.group,
            self.split,
            self.question_type,
        ]


@dataclass
class Prediction:
    """A predicted answer. `answer` is the text of an answer class and `probability` its softmax probability."""

    id: str
    answer: str
    probability: float


@dataclass(frozen=True)
class VolumeFile:
    """A three-dimensional image: a NIfTI file, or one channel of a four-dimensional NIfTI file."""

    path: Path
    channel: int | None = None

    def fingerprint_row(self) -> list[Any]:
        """Return the file name and the channel."""
        return [self.path.name, self.channel]


@dataclass(frozen=True)
class Case:
    """One examination: its available modalities by name, and its label map if there is one.

    All images and the label map share one voxel grid. `group` is the patient, whose cases must stay in one split.
    `remarks` are sentences for the reader of a prediction, such as on files that were not used.
    """

    id: str
    images: Mapping[str, VolumeFile]
    mask: VolumeFile | None
    group: str
    split: Split
    tags: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def fingerprint_row(self) -> list[Any]:
        """Return identifier, group, split and file names."""
        images = {modality: file.fingerprint_row() for modality, file in sorted(self.images.items())}
        return [self.id, self.group, self.split, images, self.mask.fingerprint_row() if self.mask else None]


@dataclass
class SegmentationDataset(Dataset[Case]):
    """Cases with the modalities and regions of a segmentation task.

    Attributes:
        modalities: Input channels of the network, in order. A case may lack some of them, but not all.
        regions: Label values that form each segmented region, such as ``{"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}``
            for BraTS. Regions may overlap.
    """

    modalities: tuple[str, ...] = field(kw_only=True)
    regions: Mapping[str, tuple[int, ...]] = field(kw_only=True)

    def _fingerprint_header(self) -> bytes:
        return json.dumps([self.modalities, {name: list(values) for name, values in self.regions.items()}]).encode()


GroundingTask = Literal["vg", "roc", "rc", "mia"]
"""Tasks of Med-GRIT-270k: visual grounding, referring object classification, referring captioning, image analysis."""


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers about images, in order. Boxes are part of the texts (see `data.grounding.box_formats`).

    The images precede the first question, unless the questions contain one mark ``<image>`` per image (see
    `data.grounding.image_marks`). `system` is the system message, or an empty text.

    `modality` is one of the eight modalities of Med-GRIT-270k (ct, mr, x, pet, endoscopy, dermoscopy, fundus,
    ultrasound) or another word; scores are reported per modality. `group` is the image or patient whose dialogues must
    stay in one split.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    task: GroundingTask
    modality: str
    group: str
    split: Split
    tags: Mapping[str, str] = field(default_factory=dict)
    system: str = ""

    def fingerprint_row(self) -> list[Any]:
        """Return all fields except `tags`, with the file names of the images. An empty `system` is left out."""
        images = [image.name for image in self.images]
        row = [self.id, images, self.turns, self.task, self.modality, self.group, self.split]
        return [*row, self.system] if self.system else row


@dataclass
class GroundingDataset(Dataset[Dialogue]):
    """Dialogues with the invalid boxes that were found while reading them.

    Attributes:
        faults: Number of boxes by kind of fault.
        faulty: Places of the faulty boxes.
    """

    faults: dict[str, int] = field(default_factory=dict, kw_only=True)
    faulty: list[str] = field(default_factory=list, kw_only=True)

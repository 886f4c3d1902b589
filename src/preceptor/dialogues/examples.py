"""From dialogues to batches: images read once, tokens, which answers are learnt, what a teacher said."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from preceptor.config_vlm import DialogueDataConfig
from preceptor.data.images import content_hash
from preceptor.models.grounded_vlm import GroundedVlm
from preceptor.task import Batch
from preceptor.types import Dialogue


@dataclass(frozen=True)
class Lesson:
    """A dialogue whose last answer is learnt (with `every_turn` all of them), and how sure its teacher was."""

    dialogue: Dialogue
    confidence: float = 1.0
    margin: float = 1.0
    every_turn: bool = True


class DialogueExamples(Dataset):
    """Lessons as a model takes them; indexed by ``(index, epoch)``: every epoch shows them alike.

    `probabilities`: of each image, by its path, those of the eight modalities (8,), for positions that they guide.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        vlm: GroundedVlm,
        config: DialogueDataConfig,
        probabilities: Mapping[Any, Tensor] | None = None,
    ) -> None:
        self.lessons, self.vlm, self.config, self.probabilities = list(lessons), vlm, config, probabilities
        self._hashes: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.lessons)

    def key(self, dialogue: Dialogue) -> str:
        """Return the content key of a dialogue: the bytes of its images and its turns."""
        for image in dialogue.images:
            if str(image) not in self._hashes:
                self._hashes[str(image)] = content_hash(image)
        text = [self._hashes[str(image)] for image in dialogue.images] + [text for turn in dialogue.turns for text in turn]
        return hashlib.sha256("\0".join(text).encode()).hexdigest()

    def encoded(self, lesson: Lesson) -> dict[str, Any]:
        """Return a lesson as `collate` takes it."""
        row = self.vlm.encode(lesson.dialogue, every_turn=lesson.every_turn)
        row |= {"id": lesson.dialogue.id, "key": self.key(lesson.dialogue)}
        row |= {"confidence": lesson.confidence, "margin": lesson.margin}
        if self.probabilities is not None:
            row["probabilities"] = [self.probabilities[image] for image in lesson.dialogue.images]
        return row

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        return self.encoded(self.lessons[item[0] if isinstance(item, tuple) else item])

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Return the batch of rows, padded to the longest."""
        tensors = self.vlm.collate(rows)
        for name in ("confidence", "margin"):
            tensors[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        if self.probabilities is not None:
            every = [found for row in rows for found in row["probabilities"]]
            tensors["probabilities"] = torch.stack(every) if every else torch.zeros(0, 8)
        return Batch(tensors, [row["id"] for row in rows], [row["key"] for row in rows])

    def loader(self, batches: Any, workers: int = 0) -> DataLoader:
        """Return a loader over the lists of items that `batches` yields."""
        return DataLoader(
            self, batch_sampler=batches, collate_fn=self.collate, num_workers=workers,
            pin_memory=torch.cuda.is_available(), persistent_workers=False,
        )  # fmt: skip

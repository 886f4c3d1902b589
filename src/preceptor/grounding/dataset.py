"""Turn dialogues into batches: tokens, images, labels of the answers, and the confidence of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from preceptor.data.images import ImageError
from preceptor.data.types import Dialogue
from preceptor.grounding.dialogue_encoder import IGNORED, DialogueEncoder, EncodedDialogue
from preceptor.grounding.pseudo_labels import ContentHashes
from preceptor.grounding.topk_cache import answers_key
from preceptor.task import Batch
from preceptor.training.batch_loader import Examples


@dataclass(frozen=True)
class TrainingExample:
    """A training dialogue and the confidence of its teacher. With `last` only the last answer is a target."""

    dialogue: Dialogue
    last: bool = False
    confidence: float = 1.0
    margin: float = 1.0


class DialogueBatch(Batch):
    """A batch of dialogues, each with any number of images.

    `images` (B,) is the number of images of each dialogue. `image_grid_thw` (images, 3) and `modalities` have one row
    per image, and `pixel_values` (patches, C) one row per patch of all images.
    """

    def narrow(self, start: int, length: int) -> Self:
        rows = torch.arange(len(self), device=self["images"].device)
        return self.select((rows >= start) & (rows < start + length))

    def select(self, kept_B: torch.Tensor) -> Self:
        """Return the batch of the dialogues for which `kept_B` (B,) is true. Padding stays."""
        images = kept_B.repeat_interleave(self["images"])
        tensors = {}
        for name, tensor in self.tensors.items():
            if name == "pixel_values":
                tensors[name] = tensor[images.repeat_interleave(self["image_grid_thw"].prod(dim=1))]
            else:
                tensors[name] = tensor[images if name in ("image_grid_thw", "modalities") else kept_B]
        if not images.any():
            tensors = {k: v for k, v in tensors.items() if k not in ("pixel_values", "image_grid_thw")}
        rows = kept_B.nonzero().flatten().tolist()
        return replace(
            self, tensors=tensors, ids=[self.ids[i] for i in rows], keys=[self.keys[i] for i in rows], skipped=[]
        )


Item = tuple[TrainingExample, str, EncodedDialogue, tuple[str, ...]]
"""A training example, its content key, its tensors, and the ids of dialogues that it replaces."""


class DialogueExamples(Examples):
    """Training examples as a torch data set, indexed by ``(index, epoch)``. Every epoch gives the same item.

    With `skip_broken`, a dialogue with an unreadable image is replaced by the next readable one, so that no batch is
    empty. Its id is listed in `Batch.skipped`.
    """

    def __init__(
        self, examples: Sequence[TrainingExample], encoder: DialogueEncoder, *, skip_broken: bool = False
    ) -> None:
        self.examples, self.encoder, self.skip_broken = list(examples), encoder, skip_broken
        self._hashes = ContentHashes()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        index = item[0] if isinstance(item, tuple) else item
        skipped: list[str] = []
        while True:
            example = self.examples[(index + len(skipped)) % len(self.examples)]
            try:
                return (*self.read(example)[:3], tuple(skipped))
            except ImageError:
                if not self.skip_broken or len(skipped) + 1 == len(self.examples):
                    raise
                skipped.append(example.dialogue.id)

    def read(self, example: TrainingExample) -> Item:
        """Return the item of an example.

        Raises UserError as `DialogueEncoder.encode` and `DialogueEncoder.require_one_box_size`.
        """
        row = self.encoder.encode(example.dialogue)
        self.encoder.require_one_box_size(example.dialogue, row)
        if example.last:
            row = replace(row, labels=last_answer(row.labels))
        return example, answers_key(example.dialogue, self._hashes), row, ()

    def collate(self, rows: Sequence[Item]) -> DialogueBatch:
        """Return the batch of items, padded to the longest.

        In addition to the tensors of the encoder it contains `images` (B,), the number of images of each dialogue, and
        `confidence` and `margin` (B,).
        """
        tensors: dict[str, Any] = self.encoder.collate([row for _, _, row, _ in rows])
        tensors["images"] = torch.tensor([len(example.dialogue.images) for example, *_ in rows])
        tensors["confidence"] = torch.tensor([example.confidence for example, *_ in rows])
        tensors["margin"] = torch.tensor([example.margin for example, *_ in rows])
        skipped = [id for *_, ids in rows for id in ids]
        return DialogueBatch(
            tensors, [example.dialogue.id for example, *_ in rows], [key for _, key, *_ in rows], skipped
        )


def last_answer(labels_L: torch.Tensor) -> torch.Tensor:
    """Return labels (L,) that keep only the last run of answer tokens."""
    is_answer = labels_L != IGNORED
    positions = is_answer.nonzero().flatten()
    if len(positions) == 0:
        return labels_L
    breaks = (positions[1:] - positions[:-1] > 1).nonzero().flatten()
    first = int(positions[breaks[-1] + 1]) if len(breaks) else int(positions[0])
    return torch.where(torch.arange(len(labels_L)) >= first, labels_L, torch.full_like(labels_L, IGNORED))

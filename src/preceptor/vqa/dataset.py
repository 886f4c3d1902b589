"""From samples to batches: decoding, augmentation, tokens, content keys."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from preceptor.data.images import ImageError, content_hash, load_image
from preceptor.data.types import Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.task import Batch
from preceptor.vqa.config import AugmentConfig, DataConfig

CACHE_BYTES = 2 * 2**30  # decoded, resized images kept in memory per process


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its inputs; saved beside its weights."""

    image_size: int = 112
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    max_question_tokens: int = 24

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Return (size, size, 3) uint8; the aspect ratio is given up, as in the published Med-VQA systems."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def pixels(images_BHW3: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    """Return (B, 3, h, w) floats: value / 255, less the mean, over the standard deviation."""
    x = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float().div_(255)
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return x.sub_(mean).div_(std)


def augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Return a randomly turned, scaled, shifted, brightened view of a (size, size, 3) uint8 image."""
    size = image.shape[0]
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    scale = 1 / (1 + rng.uniform(-config.scale, config.scale))
    dx, dy = rng.uniform(-config.shift, config.shift, 2) * size
    c, s, middle = math.cos(angle) * scale, math.sin(angle) * scale, (size - 1) / 2
    matrix = (
        c,
        s,
        middle - c * (middle + dx) - s * (middle + dy),
        -s,
        c,
        middle + s * (middle + dx) - c * (middle + dy),
    )
    turned = Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    brightness = rng.uniform(-config.brightness, config.brightness) * 255
    values = np.asarray(turned, dtype=np.float32)
    return np.clip((values - 127.5) * contrast + 127.5 + brightness, 0, 255).astype(np.uint8)


class VqaExamples(Dataset):
    """Rows of one split; indexed by ``(index, epoch)``.

    An item is a dict of arrays, or the id of a row whose image is broken where the policy is `skip`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer,
        vocabulary: AnswerVocabulary,
        preprocessing: Preprocessing,
        config: DataConfig,
        *,
        augmented: bool = False,
        seed: int = 0,
    ) -> None:
        self.samples, self.preprocessing, self.config = list(samples), preprocessing, config
        self.augment = config.augment if augmented and config.augment.enabled else None
        # With a fixed number of views they are the same for every seed, so that one teacher cache serves all.
        self.view_seed = seed if config.augment.views == 0 else 0
        self.labels = [vocabulary.encode(sample.answers) for sample in self.samples]
        questions = [sample.question for sample in self.samples]
        limit = preprocessing.max_question_tokens
        self.tokens: list[list[int]] = (
            tokenizer(questions, truncation=True, max_length=limit)["input_ids"] if questions else []
        )
        self.pad = tokenizer.pad_token_id or 0
        self._images: dict[str, np.ndarray] = {}
        self._hashes: dict[str, str] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> np.ndarray:
        """Return the resized image of a row, (size, size, 3) uint8."""
        path = self.samples[index].image
        known = self._images.get(str(path))
        if known is not None:
            return known
        limits = {"max_bytes": self.config.max_image_bytes, "max_pixels": self.config.max_image_pixels}
        image = resize(load_image(path, **limits), self.preprocessing.image_size)
        if self._bytes + image.nbytes <= CACHE_BYTES:
            self._images[str(path)] = image
            self._bytes += image.nbytes
        return image

    def view(self, epoch: int) -> int:
        """Return the augmentation view that an epoch sees; -1 for the image as it is."""
        if self.augment is None:
            return -1
        return epoch % self.augment.views if self.augment.views else epoch

    def key(self, index: int, view: int) -> str:
        """Return the content key of a row: image bytes, question, view."""
        text = f"{self._hash(index)}|{self.samples[index].question}|{view}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _hash(self, index: int) -> str:
        path = str(self.samples[index].image)
        if path not in self._hashes:
            self._hashes[path] = content_hash(self.samples[index].image)
        return self._hashes[path]

    def _view_key(self, index: int, view: int) -> str:
        return hashlib.sha256(f"{self._hash(index)}|{view}".encode()).hexdigest()

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any] | str:
        index, epoch = item if isinstance(item, tuple) else (item, 0)
        try:
            image = self.image(index)
            view = self.view(epoch)
            key = self.key(index, view)
        except ImageError:
            if self.config.broken == "raise":
                raise
            return self.samples[index].id
        if self.augment is not None:
            # A finite number of views is one of the image, whatever is asked about it: what a frozen backbone says of
            # it is then computed once.
            drawn = self._view_key(index, view) if self.augment.views else key
            rng = np.random.default_rng([self.view_seed, int(drawn[:15], 16)])
            image = augment(image, self.augment, rng)
        return {
            "id": self.samples[index].id,
            "key": key,
            "image": image,
            "tokens": self.tokens[index],
            "label": self.labels[index],
        }

    def collate(self, items: list[dict[str, Any] | str]) -> Batch:
        """Return the batch of the rows that could be read, padded to its longest question."""
        rows = [item for item in items if isinstance(item, dict)]
        skipped = [item for item in items if isinstance(item, str)]
        length = max((len(row["tokens"]) for row in rows), default=1)
        ids = np.full((len(rows), length), self.pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row["tokens"])] = row["tokens"]
            mask[i, : len(row["tokens"])] = 1
        size = self.preprocessing.image_size
        images = np.stack([row["image"] for row in rows]) if rows else np.zeros((0, size, size, 3), np.uint8)
        tensors = {
            "pixels": pixels(images, self.preprocessing),
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.tensor([row["label"] for row in rows], dtype=torch.int64),
        }
        return Batch(tensors, [row["id"] for row in rows], [row["key"] for row in rows], skipped)

    def loader(self, batches, workers: int = 0) -> DataLoader:
        """Return a loader over the lists of items that `batches` yields."""
        pinned = torch.cuda.is_available()
        return DataLoader(
            self,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=pinned,
            persistent_workers=False,
        )

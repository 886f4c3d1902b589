"""Turn VQA samples into batches: decoding, augmentation, tokens and content keys."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from preceptor.data.findings import Finding
from preceptor.data.images import ImageError, content_hash, load_image
from preceptor.data.types import Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.task import Batch
from preceptor.training.batch_loader import Examples
from preceptor.vqa.config import AugmentConfig, DataConfig

CACHE_BYTES = 2 * 2**30
"""Limit for decoded, resized images in memory, per process."""
VIEW_BYTES = 2**30
"""Limit for augmented views of images in memory, per process. Views beyond it are computed anew in every epoch."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a model, stored with its weights.

    Attributes:
        image_size: Height and width of the input in pixels.
        mean: Mean of each channel, for pixel values in [0, 1].
        std: Standard deviation of each channel.
        max_question_tokens: Longer questions are truncated.
    """

    image_size: int = 112
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    max_question_tokens: int = 24

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Resize an image to (size, size, 3) uint8. As in published Med-VQA systems, the aspect ratio is not kept."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def pixels(images_BHW3: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    """Convert images (B, h, w, 3) uint8 to normalised floats (B, 3, h, w)."""
    x = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float().div_(255)
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return x.sub_(mean).div_(std)


def augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Return a randomly rotated, scaled, shifted and brightened view of an image (size, size, 3) uint8."""
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


def tokenize(tokenizer, questions: Sequence[str], limit: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of questions, at most `limit` each, and the ids that truncation removed from each.

    The second list of a question is empty if the question is not truncated.
    """
    if not questions:
        return [], []
    encoded = tokenizer(list(questions), truncation=True, max_length=limit)
    if encoded.encodings is None:  # A tokenizer in Python forgets what it removes, so the whole question stands for it.
        whole = tokenizer(list(questions), verbose=False)["input_ids"]
        return encoded["input_ids"], [ids if len(ids) > limit else [] for ids in whole]
    removed = [[id for part in one.overflowing for id in part.ids] for one in encoded.encodings]
    return encoded["input_ids"], removed


def check_questions(samples: Iterable[Sample], tokenizer, limit: int) -> list[Finding]:
    """Return a warning that counts the questions of more than `limit` tokens; nothing if there are none.

    It also counts those that truncation makes equal to a question that differs from them.
    """
    asked = [sample for sample in samples if sample.question]
    questions = list(dict.fromkeys(sample.question for sample in asked))
    tokens, removed = tokenize(tokenizer, questions, limit)
    whole_by_tokens: defaultdict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for start, end in zip(tokens, removed, strict=True):
        whole_by_tokens[tuple(start)].add(tuple(end))
    ambiguous = {
        question: len(whole_by_tokens[tuple(start)]) > 1
        for question, start, end in zip(questions, tokens, removed, strict=True)
        if end
    }
    truncated = [sample for sample in asked if sample.question in ambiguous]
    if not truncated:
        return []
    reason = f"{len(truncated)} of {len(asked)} questions have more than {limit} tokens and are truncated"
    if equal := sum(ambiguous[sample.question] for sample in truncated):
        reason += f", {equal} of them to the tokens of another question"
    ids = tuple(sample.id for sample in truncated)
    return [Finding(ids, None, f"{reason}; train with a larger data.max_question_tokens", "warning")]


class VqaExamples(Examples):
    """Samples of one split as a torch data set, indexed by ``(index, epoch)``.

    An item is a dict of arrays, or the id of a sample whose image is broken if the policy is `skip`. `truncated` tells
    for each sample whether its question has more tokens than the model reads.
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
        # A fixed number of views is the same for every seed, so that all seeds share a teacher cache.
        self.view_seed = seed if config.augment.views == 0 else 0
        self.labels = [vocabulary.encode(sample.answers) for sample in self.samples]
        questions = [sample.question for sample in self.samples]
        self.tokens, removed = tokenize(tokenizer, questions, preprocessing.max_question_tokens)
        self.truncated = [bool(ids) for ids in removed]
        self.pad = tokenizer.pad_token_id or 0
        self._images: dict[str, np.ndarray] = {}
        self._views: dict[tuple[str, int], np.ndarray] = {}
        self._hashes: dict[str, str] = {}
        self._bytes = self._view_bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> np.ndarray:
        """Return the resized image of a sample, (size, size, 3) uint8."""
        path = self.samples[index].image
        cached = self._images.get(str(path))
        if cached is not None:
            return cached
        limits = {"max_bytes": self.config.max_image_bytes, "max_pixels": self.config.max_image_pixels}
        image = resize(load_image(path, **limits), self.preprocessing.image_size)
        if self._bytes + image.nbytes <= CACHE_BYTES:
            self._images[str(path)] = image
            self._bytes += image.nbytes
        return image

    def augmented(self, index: int, view: int) -> np.ndarray:
        """Return a view of the image of a sample, (size, size, 3) uint8, or the image itself without augmentation.

        If the number of views is finite, all questions about an image share its views, so that each of them, and the
        features of a frozen backbone, are computed only once.
        """
        finite = self.augment is not None and self.augment.views > 0
        place = str(self.samples[index].image), view
        if finite and place in self._views:
            return self._views[place]
        image = self.image(index)
        if self.augment is None:
            return image
        key = hashlib.sha256(f"{self._hash(index)}|{view}".encode()).hexdigest() if finite else self.key(index, view)
        image = augment(image, self.augment, np.random.default_rng([self.view_seed, int(key[:15], 16)]))
        if finite and self._view_bytes + image.nbytes <= VIEW_BYTES:
            self._views[place] = image
            self._view_bytes += image.nbytes
        return image

    def is_used(self, index: int) -> bool:
        """Return whether a sample is in a batch: it is left out if its image is broken and the policy is `skip`."""
        if self.config.broken == "raise":
            return True
        try:
            self.image(index)
        except ImageError:
            return False
        return True

    def view(self, epoch: int) -> int:
        """Return the number of the augmentation view in an epoch, or -1 without augmentation."""
        if self.augment is None:
            return -1
        return epoch % self.augment.views if self.augment.views else epoch

    def key(self, index: int, view: int) -> str:
        """Return the content key of a sample: a hash of the image bytes, the question and the view."""
        text = f"{self._hash(index)}|{self.samples[index].question}|{view}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _hash(self, index: int) -> str:
        path = str(self.samples[index].image)
        if path not in self._hashes:
            self._hashes[path] = content_hash(self.samples[index].image)
        return self._hashes[path]

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any] | str:
        index, epoch = item if isinstance(item, tuple) else (item, 0)
        view = self.view(epoch)
        try:
            image = self.augmented(index, view)
            key = self.key(index, view)
        except ImageError:
            if self.config.broken == "raise":
                raise
            return self.samples[index].id
        return {
            "id": self.samples[index].id,
            "key": key,
            "image": image,
            "tokens": self.tokens[index],
            "label": self.labels[index],
            "answered": bool(self.samples[index].answers),
        }

    def collate(self, items: Sequence[dict[str, Any] | str]) -> Batch:
        """Return the batch of the readable samples, padded to the longest question.

        `labels` is -100 if no answer of a sample is a class. `answered` (B,) bool is False if it has no answer.
        """
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
            "answered": torch.tensor([row["answered"] for row in rows], dtype=torch.bool),
        }
        return Batch(tensors, [row["id"] for row in rows], [row["key"] for row in rows], skipped)

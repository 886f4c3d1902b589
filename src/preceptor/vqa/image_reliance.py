"""The questions of the test split about other images, as the inputs of a VQA model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from preceptor.data.types import Sample
from preceptor.pipeline.image_reliance import exchange_images
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import DataConfig
from preceptor.vqa.dataset import VqaExamples


def examples_with(images: str, model: VqaBundle, samples: Sequence[Sample], config: DataConfig) -> VqaExamples:
    """Return the inputs of a model for `samples` with one kind of `pipeline.image_reliance.IMAGES`.

    A blank image has the mean colour of the preprocessing.

    Raises:
        UserError: the images cannot be exchanged between groups (`exchange_images`).
    """
    if images == "shuffled":
        samples = shuffled_samples(samples)
    kind = {"blank": _Blank, "mirrored": _Mirrored}.get(images, VqaExamples)
    return kind(samples, model.tokenizer, model.vocabulary, model.preprocessing, config)


def shuffled_samples(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Return the samples, in their order, with the image of another group. Raises as `exchange_images`."""
    others = exchange_images([(sample.group or str(sample.image), sample.image) for sample in samples], seed)
    return [replace(sample, image=others[sample.image]) for sample in samples]


class _Blank(VqaExamples):
    def image(self, index: int) -> np.ndarray:
        real = super().image(index)  # reads it all the same: a broken image is skipped here too
        return np.broadcast_to(np.rint(255 * np.array(self.preprocessing.mean)).astype(np.uint8), real.shape)


class _Mirrored(VqaExamples):
    def image(self, index: int) -> np.ndarray:
        return super().image(index)[:, ::-1]

"""Check the rows and images of a VQA data set for `preceptor doctor`. Problems are returned, not raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from preceptor.data.findings import Finding
from preceptor.data.images import MAX_BYTES, MAX_PIXELS, ImageError, load_image
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError


def check_images(
    samples: Iterable[Sample], *, workers: int = 0, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """Decode every distinct image once and return a finding for each unusable one, in the order of the samples.

    `workers` is the number of decoding threads; with 0 the calling thread decodes.
    """
    ids_by_image: dict[Path, list[str]] = {}
    for sample in samples:
        ids_by_image.setdefault(sample.image, []).append(sample.id)

    def decoding_error(path: Path) -> str | None:
        try:
            load_image(path, max_bytes=max_bytes, max_pixels=max_pixels)
        except ImageError as error:
            return str(error)
        return None

    if workers:
        with ThreadPoolExecutor(workers) as pool:
            reasons = list(pool.map(decoding_error, ids_by_image))
    else:
        reasons = [decoding_error(path) for path in ids_by_image]
    return [
        Finding(tuple(ids), path, reason)
        for (path, ids), reason in zip(ids_by_image.items(), reasons, strict=True)
        if reason is not None
    ]


def check_data(data: Dataset[Sample], normaliser: str = "mevf", minimum_count: int = 1) -> list[Finding]:
    """Check the rows of a data set; `check_images` checks the image files.

    Errors are duplicate ids and empty questions or answers. A warning counts the test questions without an accepted
    answer among the answer classes, which `normaliser` and `minimum_count` define as in training.
    """
    repeated = [id for id, count in Counter(sample.id for sample in data.samples).items() if count > 1]
    findings = [Finding((id,), None, f"several rows have the id {id!r}; make ids unique") for id in repeated]
    for sample in data.samples:
        if sample.split == "unlabelled":
            continue
        if not sample.question.strip():
            findings.append(Finding((sample.id,), None, "the question is empty"))
        if not any(answer.strip() for answer in sample.answers):
            findings.append(Finding((sample.id,), None, "the answer is empty"))

    train, test = [sample for sample in data.split("train") if sample.answers], data.split("test")
    try:
        vocabulary = AnswerVocabulary.build(train, normaliser, minimum_count) if train else None
    except UserError as error:
        return [*findings, Finding((), None, str(error))]
    if vocabulary and test and (ceiling := vocabulary.ceiling(test)) < 1:
        reason = (
            f"{round(len(test) * (1 - ceiling))} of {len(test)} test questions have answers that are not among the "
            f"{len(vocabulary)} answer classes of the training split; the accuracy of a classifier is at most "
            f"{ceiling:.1%}"
        )
        findings.append(Finding((), None, reason, "warning"))
    return findings

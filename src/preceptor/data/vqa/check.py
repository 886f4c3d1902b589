"""What `preceptor doctor` finds in a data set. Nothing is raised: every finding is listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preceptor.data.images import MAX_BYTES, MAX_PIXELS, ImageError, load_image
from preceptor.data.types import Dataset, Sample


@dataclass(frozen=True)
class Finding:
    """Something amiss. `file` is None where it is in the table itself; a warning does not stop a training."""

    sample_ids: tuple[str, ...]
    file: Path | None
    reason: str
    severity: Literal["error", "warning"] = "error"


def check_images(
    samples: Iterable[Sample], *, workers: int = 0, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """Decode every distinct image once and return those that cannot be used, in the order of the samples.

    `workers` is the number of threads (decoders release the interpreter lock); 0 decodes in this one.
    """
    users: dict[Path, list[str]] = {}
    for sample in samples:
        users.setdefault(sample.image, []).append(sample.id)

    def reason(path: Path) -> str | None:
        try:
            load_image(path, max_bytes=max_bytes, max_pixels=max_pixels)
        except ImageError as error:
            return str(error)
        return None

    if workers:
        with ThreadPoolExecutor(workers) as pool:
            reasons = list(pool.map(reason, users))
    else:
        reasons = [reason(path) for path in users]
    return [
        Finding(tuple(ids), path, why)
        for (path, ids), why in zip(users.items(), reasons, strict=True)
        if why is not None
    ]


def check_data(data: Dataset[Sample]) -> list[Finding]:
    """Return what is amiss in the rows; `check_images` looks at the files they name.

    Errors: duplicate ids, empty questions or answers. A warning: the number of test questions none of whose answers
    is learnt from any training row, which no classifier over training answers can get right.
    """
    repeated = [id for id, count in Counter(sample.id for sample in data.samples).items() if count > 1]
    findings = [Finding((id,), None, f"id {id!r} is given to several rows; make ids unique") for id in repeated]
    for sample in data.samples:
        if sample.split == "unlabelled":
            continue
        if not sample.question.strip():
            findings.append(Finding((sample.id,), None, "the question is empty"))
        if not any(answer.strip() for answer in sample.answers):
            findings.append(Finding((sample.id,), None, "the answer is empty"))

    learnt = {_plain(sample.answer) for sample in data.split("train") if sample.answers}
    test = data.split("test")
    unseen = sum(learnt.isdisjoint(map(_plain, sample.answers)) for sample in test)
    if learnt and unseen:
        reason = (
            f"{unseen} of {len(test)} test questions have answers that no training row has: trained on these rows, at "
            f"most {1 - unseen / len(test):.1%} can be right"
        )
        findings.append(Finding((), None, reason, "warning"))
    return findings


def _plain(text: str) -> str:
    return " ".join(text.lower().split())

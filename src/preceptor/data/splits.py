"""Cut splits by group: validation and test out of training, and nested shares of the training split.

Groups are ordered by a hash of seed and name. A cut therefore depends neither on the order of the samples nor on the
version of a random number generator.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from preceptor.data.types import Case, Dataset, Dialogue, Sample, Split
from preceptor.errors import UserError

Row = TypeVar("Row", Sample, Case, Dialogue)

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "development": "validation",
    "test": "test",
    "testing": "test",
}
"""Split by the names that tables and split files may use."""
FIX_SPLITS = "add groups, or correct the splits that the data name"
"""Fix of an empty split."""


def empty_split(data: Dataset[Row], split: Split, what: str = "rows") -> str:
    """Return the sentence that a split of a data set is empty, with the number of groups, which splits do not divide.

    `what` names the missing rows.
    """
    rows = [row for row in data.samples if row.split in ("train", "validation", "test")]
    groups = len({row.group for row in rows})
    return (
        f"{data.name} has no {split} {what}: there are {len(rows):,} rows in {groups:,} group{'s' * (groups != 1)} "
        "(patients or images), and a group is in one split"
    )


def cut_validation(samples: Iterable[Row], fraction: float, seed: int) -> list[Row]:
    """Move whole groups from training to validation, about `fraction` of the training samples (see `cut`).

    Raises:
        UserError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation fraction {fraction} is not between 0 and 1; 0.1 is usual")
    return cut(samples, "validation", fraction, seed)


def cut(rows: Iterable[Row], split: Split, fraction: float, seed: int, *, leave: int = 1) -> list[Row]:
    """Move whole groups from training to `split`, about `fraction` of the training samples.

    The fraction is met to within half of the largest group. At least one group is moved and at least `leave` groups
    stay; if both are impossible, one group is moved. With fewer than two training groups nothing is moved. The order of
    the samples and the other splits do not change.
    """
    rows = list(rows)
    sizes = Counter(row.group for row in rows if row.split == "train")
    target = fraction * sizes.total()
    moved: set[str] = set()
    count = 0
    order = ordered(sizes, f"{split}:{seed}")
    for group in order:
        if count + sizes[group] / 2 <= target and len(moved) < len(sizes) - leave:
            moved.add(group)
            count += sizes[group]
    if not moved and len(sizes) > 1:
        moved = {min(order, key=lambda group: sizes[group])}
    return [replace(row, split=split) if row.split == "train" and row.group in moved else row for row in rows]


def subsample(samples: Iterable[Sample], share: float, seed: int, *, keep_rest: bool = False) -> list[Sample]:
    """Keep `share` of the training split by whole groups, for learning curves.

    A smaller share is a subset of every larger share with the same seed. At least one group stays. Other splits do not
    change. With `keep_rest` the remaining training samples become unlabelled.

    Raises:
        UserError: `share` is not in (0, 1].
    """
    samples = list(samples)
    chosen_groups = groups_of_share(samples, share, seed)
    rest = [s for s in samples if s.split == "train" and s.group not in chosen_groups]
    samples = [s for s in samples if s.split != "train" or s.group in chosen_groups]
    return samples + ([replace(s, split="unlabelled", answers=()) for s in rest] if keep_rest else [])


def groups_of_share(rows: Iterable[Row], share: float, seed: int) -> set[str]:
    """Return training groups with about `share` of the training samples (see `subsample`).

    Raises:
        UserError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"training share {share} is not in (0, 1]; 1 keeps everything")
    sizes = Counter(row.group for row in rows if row.split == "train")
    target = share * sizes.total()
    chosen_groups: set[str] = set()
    count = 0
    # Take groups until the target is reached. A larger target takes more groups of the same order: shares are nested.
    for group in ordered(sizes, f"share:{seed}"):
        if count >= target:
            break
        chosen_groups.add(group)
        count += sizes[group]
    return chosen_groups


def cross_questions(samples: Iterable[Sample], number: int, seed: int) -> list[Sample]:
    """Return up to `number` new samples per training or unlabelled sample: its image with a question about another one.

    The new samples have no answers; a teacher provides them. The questions are those of training samples about images
    of the same organ, if the samples have the tag `image_organ`. A question is never repeated for an image. An
    unlabelled sample without a question gets at least one. The result depends only on the ids of the samples and on
    `seed`. There are fewer new samples if no more questions are available for an image.
    """
    rows = [sample for sample in samples if sample.split in ("train", "unlabelled")]
    known_questions = {(sample.group, sample.question.lower()) for sample in rows}
    train = [sample for sample in rows if sample.split == "train"]
    pools: dict[str, list[Sample]] = {}
    for sample in train:
        pools.setdefault(_organ(sample), []).append(sample)
    samples_by_organ: dict[str, list[Sample]] = {}
    for sample in rows:
        samples_by_organ.setdefault(_organ(sample), []).append(sample)
    created = []
    for organ, images in samples_by_organ.items():
        by_id = {sample.id: sample for sample in pools.get(organ, train)}
        images_by_id = {sample.id: sample for sample in images}
        for turn in range(max([number, *(1 for sample in images if not sample.question)])):
            order = [by_id[name] for name in ordered(by_id, f"cross:{seed}:{turn}")]
            places = {sample.id: place for place, sample in enumerate(order)}
            for place, name in enumerate(ordered(images_by_id, f"cross:{seed}:{turn}")):
                sample = images_by_id[name]
                if turn >= number and sample.question:
                    continue
                # Start at a different question for each image, so that all questions are drawn equally often.
                start = places.get(name, place)
                for step in range(1, len(order) + 1):
                    other = order[(start + step) % len(order)]
                    key = (sample.group, other.question.lower())
                    if other.group != sample.group and key not in known_questions:
                        known_questions.add(key)
                        question = replace(other, id=f"{name}+{other.id}", image=sample.image, group=sample.group)
                        created.append(replace(question, answers=(), split=sample.split))
                        break
    return created


def _organ(sample: Sample) -> str:
    return sample.tags.get("image_organ", "")


def ordered(groups: Iterable[str], salt: str) -> list[str]:
    """Sort names by a hash of salt and name."""
    return sorted(groups, key=lambda group: hashlib.sha256(f"{salt}:{group}".encode()).digest())

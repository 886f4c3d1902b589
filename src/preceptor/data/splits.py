"""Cuts by group: validation out of training, and nested shares of the training split.

Groups are ordered by a hash of seed and name, so that a cut depends neither on the order of the rows nor on a random
generator's version.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from preceptor.data.images import content_hash
from preceptor.data.types import Case, Dataset, Dialogue, Sample, Split
from preceptor.errors import UserError

Row = TypeVar("Row", Sample, Case, Dialogue)


def cut_validation(samples: Iterable[Row], fraction: float, seed: int) -> list[Row]:
    """Return the rows with whole groups moved from training to validation, about `fraction` of the training rows.

    As `cut`. Raises UserError where `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation fraction {fraction} is not between 0 and 1; 0.1 is usual")
    return cut(samples, "validation", fraction, seed)


def cut(rows: Iterable[Row], split: Split, fraction: float, seed: int, *, leave: int = 1) -> list[Row]:
    """Return the rows with whole groups moved from training to `split`, about `fraction` of the training rows.

    The share is met to within half of the largest group, except that at least one group is moved and at least `leave`
    stay, if need be one (with fewer than two training groups nothing moves). Other splits are untouched, the order is
    kept.
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
    """Return the rows with only `share` of the training split kept, by whole groups; for learning curves.

    A smaller share's rows are among those of every larger share with the same seed. At least one group stays; other
    splits are untouched. With `keep_rest` the other training rows stay too, unlabelled.

    Raises:
        UserError: `share` is not in (0, 1].
    """
    samples = list(samples)
    kept = groups_of_share(samples, share, seed)
    rest = [s for s in samples if s.split == "train" and s.group not in kept]
    found = [s for s in samples if s.split != "train" or s.group in kept]
    return found + ([replace(s, split="unlabelled", answers=()) for s in rest] if keep_rest else [])


def groups_of_share(rows: Iterable[Row], share: float, seed: int) -> set[str]:
    """Return the training groups that hold about `share` of the training rows, as `subsample` keeps them.

    Raises:
        UserError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"training share {share} is not in (0, 1]; 1 keeps everything")
    sizes = Counter(row.group for row in rows if row.split == "train")
    target = share * sizes.total()
    kept: set[str] = set()
    count = 0
    # The shortest run of groups that reaches the target: it grows with the target, hence the nesting.
    for group in ordered(sizes, f"share:{seed}"):
        if count >= target:
            break
        kept.add(group)
        count += sizes[group]
    return kept


def cross_questions(samples: Iterable[Sample], number: int, seed: int) -> list[Sample]:
    """Return `number` new rows for each training or unlabelled row: its image, with the question of another image's
    training row.

    They have no answer; a teacher gives one. Questions come from images of the same organ where the rows say which
    (`tags["image_organ"]`), are never asked twice of an image, and never one that its own rows ask of it already.
    An unlabelled row without a question is given one at least. The rows depend on the ids of those rows and on `seed`
    alone. Where an image runs out of questions there are fewer.
    """
    rows = [sample for sample in samples if sample.split in ("train", "unlabelled")]
    asked = {(sample.group, sample.question.lower()) for sample in rows}
    train = [sample for sample in rows if sample.split == "train"]
    pools: dict[str, list[Sample]] = {}
    for sample in train:
        pools.setdefault(_organ(sample), []).append(sample)
    askers: dict[str, list[Sample]] = {}
    for sample in rows:
        askers.setdefault(_organ(sample), []).append(sample)
    found = []
    for organ, images in askers.items():
        by_id = {sample.id: sample for sample in pools.get(organ, train)}
        images_by_id = {sample.id: sample for sample in images}
        for turn in range(max([number, *(1 for sample in images if not sample.question)])):
            order = [by_id[name] for name in ordered(by_id, f"cross:{seed}:{turn}")]
            places = {sample.id: place for place, sample in enumerate(order)}
            for place, name in enumerate(ordered(images_by_id, f"cross:{seed}:{turn}")):
                sample = images_by_id[name]
                if turn >= number and sample.question:
                    continue
                # The first that is new to this image, from a place of its own on: all questions are drawn alike.
                start = places.get(name, place)
                for step in range(1, len(order) + 1):
                    other = order[(start + step) % len(order)]
                    key = (sample.group, other.question.lower())
                    if other.group != sample.group and key not in asked:
                        asked.add(key)
                        question = replace(other, id=f"{name}+{other.id}", image=sample.image, group=sample.group)
                        found.append(replace(question, answers=(), split=sample.split))
                        break
    return found


def _organ(sample: Sample) -> str:
    return sample.tags.get("image_organ", "")


def group_by_content(samples: Iterable[Sample]) -> list[Sample]:
    """Return the rows with one group for all images whose files hold the same bytes, whatever their names.

    Only files that are as long as another one are read.

    Raises:
        ImageError: a file cannot be read.
    """
    samples = list(samples)
    by_size: defaultdict[int, list[Sample]] = defaultdict(list)
    for sample in {sample.image: sample for sample in samples}.values():
        by_size[sample.image.stat().st_size].append(sample)
    same: dict[str, str] = {}  # a group, and the one that it belongs to
    for alike in by_size.values():
        first: dict[str, str] = {}
        for sample in alike if len(alike) > 1 else []:
            known = first.setdefault(content_hash(sample.image), sample.group)
            group, other = _last(same, sample.group), _last(same, known)
            if group != other:
                same[group] = other
    return [replace(s, group=_last(same, s.group)) for s in samples] if same else samples


def _last(chain: dict[str, str], name: str) -> str:
    while name in chain:
        name = chain[name]
    return name


def note_leaks(data: Dataset[Sample]) -> None:
    """Mark the data as leaking where a group or an image is in several splits. Names may identify: only counts."""
    parts_of_group: defaultdict[str, set[Split]] = defaultdict(set)
    parts_of_image: defaultdict[Path, set[Split]] = defaultdict(set)
    for sample in data.samples:
        parts_of_group[sample.group].add(sample.split)
        parts_of_image[sample.image].add(sample.split)
    for what, splits in (("groups", parts_of_group), ("images", parts_of_image)):
        divided = sum(len(held) > 1 for held in splits.values())
        if divided:
            data.leaking = True
            data.notes.append(
                f"Leaking split: {divided} of {len(splits)} {what} have rows in more than one split, so that held-out "
                "scores are too good."
            )


def ordered(groups: Iterable[str], salt: str) -> list[str]:
    """Return names in the order of a hash of salt and name."""
    return sorted(groups, key=lambda group: hashlib.sha256(f"{salt}:{group}".encode()).digest())

"""Cuts by group: validation out of training, and nested shares of the training part.

Groups are ordered by a hash of seed and name, so that a cut depends neither on the order of the rows nor on a random
generator's version.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from preceptor.errors import UserError
from preceptor.types import Sample


def cut_validation(samples: Iterable[Sample], fraction: float, seed: int) -> list[Sample]:
    """Return the rows with whole groups moved from training to validation, about `fraction` of the training rows.

    The share is met to within half of the largest group, except that at least one group is moved and at least one
    stays (with fewer than two training groups nothing moves). Other parts are untouched, the order is kept.

    Raises:
        UserError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation fraction {fraction} is not between 0 and 1; 0.1 is usual")
    samples = list(samples)
    sizes = Counter(sample.group for sample in samples if sample.part == "train")
    target = fraction * sizes.total()
    moved: set[str] = set()
    count = 0
    order = _ordered(sizes, f"validation:{seed}")
    for group in order:
        if count + sizes[group] / 2 <= target and len(moved) < len(sizes) - 1:
            moved.add(group)
            count += sizes[group]
    if not moved and len(sizes) > 1:
        moved = {min(order, key=lambda group: sizes[group])}
    return [replace(s, part="validation") if s.part == "train" and s.group in moved else s for s in samples]


def subsample(samples: Iterable[Sample], share: float, seed: int) -> list[Sample]:
    """Return the rows with only `share` of the training part kept, by whole groups; for learning curves.

    A smaller share's rows are among those of every larger share with the same seed. At least one group stays; other
    parts are untouched.

    Raises:
        UserError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"training share {share} is not in (0, 1]; 1 keeps everything")
    samples = list(samples)
    sizes = Counter(sample.group for sample in samples if sample.part == "train")
    target = share * sizes.total()
    kept: set[str] = set()
    count = 0
    # The shortest run of groups that reaches the target: it grows with the target, hence the nesting.
    for group in _ordered(sizes, f"share:{seed}"):
        if count >= target:
            break
        kept.add(group)
        count += sizes[group]
    return [s for s in samples if s.part != "train" or s.group in kept]


def _ordered(groups: Iterable[str], salt: str) -> list[str]:
    return sorted(groups, key=lambda group: hashlib.sha256(f"{salt}:{group}".encode()).digest())

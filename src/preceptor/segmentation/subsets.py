"""Subsets of modalities for the evaluation with missing modalities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

Subset = tuple[bool, ...]


def subsets(count: int) -> list[Subset]:
    """Return the 2^count - 1 non-empty subsets of `count` modalities, as flags in the order of the modalities.

    Subsets are sorted by size, and within a size by their first modalities. With flair, t1, t1ce, t2 they are the rows
    of the published tables: F, T1, T1c, T2, F+T1, F+T1c, F+T2, T1+T1c, T1+T2, T1c+T2, F+T1+T1c, F+T1+T2, F+T1c+T2,
    T1+T1c+T2, all.
    """
    groups = (set(members) for size in range(1, count + 1) for members in combinations(range(count), size))
    return [tuple(m in members for m in range(count)) for members in groups]


def name(subset: Sequence[bool], modalities: Sequence[str]) -> str:
    """Return the name of a subset, such as ``flair+t1ce``."""
    return "+".join(m for m, present in zip(modalities, subset, strict=True) if present)


def within(all_subsets: Iterable[Subset], available: Sequence[bool]) -> list[Subset]:
    """Return the subsets whose modalities are all available."""
    return [s for s in all_subsets if all(present for present, needed in zip(available, s, strict=True) if needed)]

"""The subsets of N modalities in which a network for missing modalities is scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

Subset = tuple[bool, ...]


def subsets(count: int) -> list[Subset]:
    """Return the 2^count - 1 subsets of `count` modalities that are not empty, as flags in the modalities' order.

    Singles first, then pairs and so on up to all; among subsets of one size, those of earlier modalities first. With
    flair, t1, t1ce, t2 these are the rows of the published tables: F, T1, T1c, T2, F+T1, F+T1c, F+T2, T1+T1c, T1+T2,
    T1c+T2, F+T1+T1c, F+T1+T2, F+T1c+T2, T1+T1c+T2, all.
    """
    chosen = (set(some) for size in range(1, count + 1) for some in combinations(range(count), size))
    return [tuple(m in some for m in range(count)) for some in chosen]


def name(subset: Sequence[bool], modalities: Sequence[str]) -> str:
    """Return the names of a subset's modalities: ``flair+t1ce``."""
    return "+".join(m for m, there in zip(modalities, subset, strict=True) if there)


def within(every: Iterable[Subset], available: Sequence[bool]) -> list[Subset]:
    """Return the subsets of `every` of which all modalities are `available`."""
    return [s for s in every if all(there for there, wanted in zip(available, s, strict=True) if wanted)]

"""Subsets of the modalities: their order and their names. Networks use flags, reports the names of modalities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

SubsetFlags = tuple[bool, ...]
"""Whether each modality is in the subset, in the order of the modalities."""
Subset = tuple[str, ...]
"""The names of the modalities in the subset, in the order of the modalities."""

MEAN = "mean"
_NAMES = {
    "flair": "FLAIR",
    "t1": "T1",
    "t1ce": "T1ce",
    "t1c": "T1c",
    "t2": "T2",
    "ct": "CT",
    "pet": "PET",
    "adc": "ADC",
    "dwi": "DWI",
    "swi": "SWI",
    "pd": "PD",
    "et": "ET",
    "tc": "TC",
    "wt": "WT",
    MEAN: "Mean",
}
LONG = {"et": "enhancing tumour", "tc": "tumour core", "wt": "whole tumour"}


def name_of(key: str) -> str:
    """Return the usual spelling of a modality or region."""
    return _NAMES.get(key, key)


def all_subsets(count: int) -> list[SubsetFlags]:
    """Return the 2^count - 1 non-empty subsets of `count` modalities, as flags in the order of the modalities.

    Subsets are sorted by size, and within a size by their first modalities. With flair, t1, t1ce, t2 they are the rows
    of the published tables: F, T1, T1c, T2, F+T1, F+T1c, F+T2, T1+T1c, T1+T2, T1c+T2, F+T1+T1c, F+T1+T2, F+T1c+T2,
    T1+T1c+T2, all.
    """
    groups = (set(members) for size in range(1, count + 1) for members in combinations(range(count), size))
    return [tuple(m in members for m in range(count)) for members in groups]


def within(subsets: Iterable[SubsetFlags], available: Sequence[bool]) -> list[SubsetFlags]:
    """Return the subsets whose modalities are all available."""
    return [s for s in subsets if all(present for present, needed in zip(available, s, strict=True) if needed)]


def sort_subsets(subsets: Iterable[Subset], modalities: Sequence[str]) -> list[Subset]:
    """Return subsets in the order of the published tables: by size, then in the order of `modalities`."""
    places = {modality: place for place, modality in enumerate(modalities)}
    return sorted(set(subsets), key=lambda subset: (len(subset), [places[modality] for modality in subset]))


def subset_name(subset: Sequence[bool], modalities: Sequence[str]) -> str:
    """Return the name of a subset in files, such as ``flair+t1ce``."""
    return "+".join(m for m, present in zip(modalities, subset, strict=True) if present)


def parse_subset(name: str, modalities: Sequence[str]) -> Subset | None:
    """Return the subset named ``flair+t1``, or None if a name is not among `modalities`."""
    parts = set(name.split("+"))
    return tuple(m for m in modalities if m in parts) if parts <= set(modalities) else None


def subset_title(subset: Iterable[str], joint: str = " + ") -> str:
    """Return a subset as reports show it, such as ``FLAIR + T1``."""
    return joint.join(name_of(modality) for modality in subset)

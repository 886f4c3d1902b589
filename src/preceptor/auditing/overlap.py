"""Find the splits and data sets that use each image, and the overlaps between them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from preceptor.auditing.duplicates import SAME, Pair
from preceptor.data.types import Dataset, Sample, Split

Place = tuple[int, Split]
"""Index of a data set (0 or 1) and a split."""
KINDS = ("file", *SAME, "alike")
"""Kinds of overlap, the most certain first. `file` is the identical file."""


@dataclass(frozen=True)
class Overlap:
    """Images of one set of samples that also occur in another set. Each image counts once, by its most certain kind.

    Attributes:
        of: Name of the first set.
        other: Name of the second set.
        images: Number of images in the first set.
        kinds: Kind of overlap by the number of the image.
    """

    of: str
    other: str
    images: int
    kinds: dict[int, str]

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.kinds.values())

    @property
    def same(self) -> int:
        """Number of images that are in both sets, of any kind except `alike`."""
        return sum(kind != "alike" for kind in self.kinds.values())


@dataclass
class ImageIndex:
    """The distinct image files of one or two data sets by number, and the samples that use them."""

    numbers: dict[Path, int]
    rows: dict[int, dict[Place, list[Sample]]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)

    @classmethod
    def of(cls, data: Sequence[Dataset[Sample]]) -> ImageIndex:
        numbers: dict[Path, int] = {}
        rows: defaultdict[int, dict[Place, list[Sample]]] = defaultdict(dict)
        for side, dataset in enumerate(data):
            for sample in dataset.samples:
                number = numbers.setdefault(sample.image, len(numbers))
                rows[number].setdefault((side, sample.split), []).append(sample)
        return cls(numbers, dict(rows))

    def within(self, places: Iterable[Place]) -> set[int]:
        """Return the images that are used in at least one of the places."""
        wanted = set(places)
        return {number for number, used in self.rows.items() if not wanted.isdisjoint(used)}

    def row(self, number: int, places: Iterable[Place] | None = None) -> tuple[Place, Sample]:
        """Return the first sample that uses an image, if possible in the given places."""
        used = self.rows[number]
        place = next((place for place in places or () if place in used), next(iter(used)))
        return place, used[place][0]

    def overlap(self, of: str, places: Iterable[Place], other: str, other_places: Iterable[Place]) -> Overlap:
        """Return the images of `places` that also occur in `other_places`, or resemble an image there."""
        images, others = self.within(places), self.within(other_places)
        kinds: dict[int, str] = dict.fromkeys(images & others, "file")
        for pair in self.pairs:  # sorted by certainty
            for one, two in ((pair.left, pair.right), (pair.right, pair.left)):
                if one in images and two in others:
                    kinds.setdefault(one, pair.kind)
        return Overlap(of, other, len(images), dict(sorted(kinds.items())))

    def classes(self) -> dict[Path, int]:
        """Return the number of the first file with the same image, for every file."""
        parent = list(range(len(self.numbers)))

        def root(number: int) -> int:
            while parent[number] != number:
                number = parent[number] = parent[parent[number]]
            return number

        for pair in self.pairs:
            if pair.kind in SAME:
                low, high = sorted((root(pair.left), root(pair.right)))
                parent[high] = low
        return {path: root(number) for path, number in self.numbers.items()}

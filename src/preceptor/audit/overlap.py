"""Where images are: in which parts of which data set, and which parts share them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from preceptor.audit.duplicates import SAME, Pair
from preceptor.data.types import Dataset, Sample, Split

Place = tuple[int, Split]
"""Number of the data set, and split."""
KINDS = ("file", *SAME, "alike")
"""How an image is in another split, the surest first; `file` is the very same file."""


@dataclass(frozen=True)
class Overlap:
    """How many of the `images` of some rows are in other rows too: each image once, by its surest kind.

    `found` maps the number of an image to its kind.
    """

    of: str
    among: str
    images: int
    found: dict[int, str]

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.found.values())

    @property
    def same(self) -> int:
        """The number of images that are in both, by whatever proof."""
        return sum(kind != "alike" for kind in self.found.values())


@dataclass
class Atlas:
    """The distinct image files of one or two data sets, by number, and where each is used."""

    numbers: dict[Path, int]
    rows: dict[int, dict[Place, list[Sample]]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)

    @classmethod
    def of(cls, data: Sequence[Dataset[Sample]]) -> Atlas:
        numbers: dict[Path, int] = {}
        rows: defaultdict[int, dict[Place, list[Sample]]] = defaultdict(dict)
        for side, one in enumerate(data):
            for sample in one.samples:
                number = numbers.setdefault(sample.image, len(numbers))
                rows[number].setdefault((side, sample.split), []).append(sample)
        return cls(numbers, dict(rows))

    def within(self, places: Iterable[Place]) -> set[int]:
        """Return the images that are used in one of the places."""
        wanted = set(places)
        return {number for number, used in self.rows.items() if not wanted.isdisjoint(used)}

    def row(self, number: int, places: Iterable[Place] | None = None) -> tuple[Place, Sample]:
        """Return the first row that uses an image, in the given places if any does."""
        used = self.rows[number]
        place = next((place for place in places or () if place in used), next(iter(used)))
        return place, used[place][0]

    def overlap(self, of: str, theirs: Iterable[Place], among: str, others: Iterable[Place]) -> Overlap:
        """Return which images of the places `theirs` are in the places `others` too, or alike one there."""
        mine, other = self.within(theirs), self.within(others)
        kinds: dict[int, str] = dict.fromkeys(mine & other, "file")
        for pair in self.pairs:  # the surest come first
            for one, two in ((pair.left, pair.right), (pair.right, pair.left)):
                if one in mine and two in other:
                    kinds.setdefault(one, pair.kind)
        return Overlap(of, among, len(mine), dict(sorted(kinds.items())))

    def classes(self) -> dict[Path, int]:
        """Return for every file the number of the first file that holds the same image."""
        first = list(range(len(self.numbers)))

        def root(number: int) -> int:
            while first[number] != number:
                number = first[number] = first[first[number]]
            return number

        for pair in self.pairs:
            if pair.kind in SAME:
                low, high = sorted((root(pair.left), root(pair.right)))
                first[high] = low
        return {path: root(number) for path, number in self.numbers.items()}

"""Findings of an audit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from preceptor.auditing.duplicates import Pair
from preceptor.auditing.overlap import ImageIndex, Overlap
from preceptor.auditing.rows import Match
from preceptor.auditing.shortcuts import Shortcut
from preceptor.data.types import Dataset, Sample, Split

Severity = Literal["leak", "broken", "suspicion", "note"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TRAINING_SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Finding:
    """A problem that concerns `count` of `of` samples or images.

    Attributes:
        check: Name of the check.
        severity: A `leak` fails the audit, a `suspicion` should be inspected, a `note` is information.
        title: Short description.
        count: Number of affected samples or images.
        of: Number of samples or images that were checked.
        says: Explanation in one or two sentences.
        ids: Ids of the affected samples; for an image, the id of its first sample.
        matches: Pairs of a held-out sample and the training sample that reveals its answer.
    """

    check: str
    severity: Severity
    title: str
    count: int
    of: int
    says: str
    ids: tuple[str, ...] = ()
    matches: tuple[Match, ...] = ()


@dataclass
class Audit:
    """The findings in one data set, or between two."""

    data: list[Dataset[Sample]]
    index: ImageIndex
    findings: list[Finding] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    shortcuts: list[Shortcut] = field(default_factory=list)
    ceiling: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> bool:
        """Whether there is a finding of severity `leak`."""
        return any(finding.severity == "leak" for finding in self.findings)

    @property
    def names(self) -> list[str]:
        """Names and variants of the data sets, numbered if they are equal."""
        names = [" ".join(part for part in (data.name, data.variant) if part) for data in self.data]
        return names if len(set(names)) == len(names) else [f"{name} ({n})" for n, name in enumerate(names, 1)]

    def crossing(self) -> list[Pair]:
        """Return the pairs of similar images in different splits, or in different data sets if there are two."""

        def sides(number: int) -> set[Any]:
            places = self.index.rows[number]
            return {side for side, _ in places} if len(self.data) > 1 else set(places)

        return [pair for pair in self.index.pairs if sides(pair.left) != sides(pair.right)]

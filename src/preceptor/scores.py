"""The scores that every task hands to comparisons and to the command line. Imports no slow package."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from preceptor.errors import UserError


@dataclass(frozen=True)
class UnitScore:
    """One value of one test unit (a question, a case, an answer in a dialogue), higher is better.

    A unit may have several values, for example one per region and combination of modalities. The score of a unit on a
    selection of them is their mean.

    Args:
        id: name of the unit within its data set, without patient identifiers.
        group: units of the same group, such as questions about one image or cases of one patient, are not independent
            and are resampled together. A unit of its own has its id.
        metric: what `value` measures. If a task consists of several tasks, ``TASK/METRIC``, such as ``vg/recall``.
        value: between 0 and 1.
        categories: name by kind, such as ``{"question_types": "organ"}``. Comparisons break their results down by them.
    """

    id: str
    group: str
    metric: str
    value: float
    categories: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """What identifies this value within a test set; two models are compared on equal keys."""
        return self.id, self.metric, tuple(self.categories.items())


@dataclass(frozen=True)
class Scored:
    """The scores of somebody's predictions.

    Args:
        results: `stage` (name of the predictions), `protocols`, `describes` and `notes`, as in a run's results.json.
        rows: the scored units, one line each of the predictions file.
        heads: of the table that the command line prints.
        lines: of that table.
    """

    results: dict[str, Any]
    rows: list[dict[str, Any]]
    heads: list[str]
    lines: list[list[str]]

    @property
    def scores(self) -> dict[str, Any]:
        """The scores under the protocol."""
        return next(iter(self.results["protocols"].values()))

    @property
    def notes(self) -> list[str]:
        """Sentences that must be shown next to the scores."""
        return self.results["notes"]


def percent(share: float | None) -> str:
    """Return a share in percent, empty if it is None."""
    return "" if share is None else f"{100 * share:.1f} %"


def align(scores: Sequence[UnitScore], reference: Sequence[UnitScore], what: str) -> list[UnitScore]:
    """Return `scores` in the order of `reference`.

    Raises:
        UserError: the two do not hold the same units, metrics and categories. `what` names both in the message.
    """
    places: dict[Hashable, list[UnitScore]] = {}
    for score in scores:
        places.setdefault(score.key, []).append(score)
    aligned, missing = [], []
    for score in reference:
        if places.get(score.key):
            aligned.append(places[score.key].pop(0))
        else:
            missing.append(score.id)
    extra = [score.id for values in places.values() for score in values]
    if missing or extra:
        raise UserError(
            f"{what} were not scored on the same units: {len(set(missing))} of the first are missing in the second and "
            f"{len(set(extra))} are only in the second, for example {(missing or extra)[0]!r}; evaluate both on the "
            "same data"
        )
    return aligned


class Grouped(Protocol):
    """A sample of any task."""

    @property
    def id(self) -> str: ...

    @property
    def group(self) -> str: ...


def number_groups(samples: Iterable[Grouped]) -> dict[str, str]:
    """Return the number of each sample's group, by the id of the sample. A sample without a group is on its own.

    Rows of predictions hold this number and not the name of the group, because names of images can name patients.
    """
    numbers: dict[Hashable, int] = {}
    return {one.id: str(numbers.setdefault(one.group or (one.id,), len(numbers) + 1)) for one in samples}


def group_of(row: Mapping[str, Any]) -> str:
    """Return the group of a row of predictions; rows of earlier versions have none, and are on their own."""
    return str(row.get("group") or row["id"])


def unit_means(scores: Iterable[UnitScore]) -> tuple[dict[str, float], list[str]]:
    """Return (the mean value by unit, the group of each unit), units in the order of their first value."""
    sums: dict[str, list[float]] = {}
    groups: dict[str, str] = {}
    for score in scores:
        sums.setdefault(score.id, []).append(score.value)
        groups[score.id] = score.group
    return {unit: sum(values) / len(values) for unit, values in sums.items()}, list(groups.values())


class Metrics(Protocol):
    """What the module ``preceptor.<task>.metrics`` of each task offers to comparisons."""

    @property
    def UNIT(self) -> str:
        """What is scored, in the singular: question, case, answer."""

    @property
    def ROW_FIELDS(self) -> Mapping[str, type]:
        """The fields of a row of the predictions file that scores are made from."""

    @property
    def ROW_KEY(self) -> tuple[str, ...]:
        """The fields that identify a row."""

    @property
    def RATIO_TO_TEACHER(self) -> bool:
        """Whether the teacher solves the same task, so that the student's share of its score means something."""

    def unit_scores(self, rows: Sequence[Any], protocol: str) -> list[UnitScore]:
        """Return the values of all units of a predictions file, the headline metrics only."""

    def headline_scores(self, rows: Sequence[Any], protocol: str) -> dict[str, float | None]:
        """Return `n` and the headline scores by dotted key of the protocol's entry in results.json."""

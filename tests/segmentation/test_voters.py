"""The validation cases that vote in an election if `method.election.cases` limits their number."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preceptor.data.types import Case, VolumeFile
from preceptor.segmentation import experiment
from preceptor.segmentation.evaluate import doubts_of_votes, voters
from preceptor.segmentation.experiment import SegmentationExperiment
from tests.segmentation.conftest import recipe

ALL = "flair+t1+t1ce+t2"


@dataclass
class Cases:
    """Validation cases with the given modalities and regions, of which some cannot be read."""

    modalities: list[str]
    broken: tuple[int, ...] = ()
    regions: tuple[str, ...] = ()
    cases: list[Case] = field(init=False)

    def __post_init__(self) -> None:
        self.cases = [
            Case(str(number), {name: VolumeFile(Path(name)) for name in names.split("+")}, None, "g", "validation")
            for number, names in enumerate(self.modalities)
        ]

    def __len__(self) -> int:
        return len(self.cases)

    def readable(self, index: int) -> Case | None:
        return None if index in self.broken else self.cases[index]

    def regions_of(self, index: int) -> frozenset[str]:
        return frozenset(self.regions[index].split("+") if self.regions else ())


def first(number: int, *modalities: str, broken: tuple[int, ...] = (), regions: tuple[str, ...] = ()) -> list[int]:
    cases: Any = Cases(list(modalities), broken, regions)
    return [index for index, _ in islice(voters(cases), number)]


def test_cases_with_the_same_modalities_vote_in_their_order() -> None:
    assert first(3, ALL, ALL, ALL, ALL) == [0, 1, 2]
    assert first(9, "t1", "t1", "t1") == [0, 1, 2]
    assert first(2, ALL, ALL, ALL, ALL, broken=(0,)) == [1, 2]


def test_a_modality_of_later_cases_has_a_vote() -> None:
    assert first(2, "flair+t1", "flair+t1", "flair+t1", "t1ce") == [0, 3]
    assert first(1, "flair", "t1", ALL) == [2]
    assert first(3, "flair", "flair", "t1", "flair", "t2") == [0, 2, 4]
    assert first(2, "flair", "flair", "t1", "t1", broken=(2,)) == [0, 3]
    assert sorted(first(9, "flair", "t1", ALL, "t2")) == [0, 1, 2, 3]


def test_every_modality_has_a_vote_in_a_region_of_later_cases() -> None:
    assert first(1, ALL, ALL, ALL, regions=("wt", "wt", "et+wt")) == [2]
    assert first(2, "flair+t1", "flair+t1", "t1", "t1", regions=("wt", "et+wt", "wt", "et")) == [1, 0]
    assert first(2, "flair", "flair", "t1", "t1", regions=("et", "et", "wt", "et+wt")) == [3, 0]


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        ([[0.5, 0.4], [0.2, 0.7]], [], ["In an election every modality became a teacher"]),
        ([[0.5, 0.4], [0.2, 0.7]], ["method.cross_modal.students=all"], []),
        ([[0.5, 0.4], [0.2, 0.7]], ["method.teachers=per_task"], []),
        ([[0.5, 0.4], [0.2, 0.7]], ["method.teachers=single"], []),
        ([[0.5, 0.8], [0.2, 0.7]], [], []),
        ([[torch.nan, 0.8], [torch.nan, 0.7]], [], ["No validation case that votes contains et, so no election finds"]),
        (
            [[0.5, 0.8], [torch.nan, 0.7]],
            [],
            ["No validation case that votes has t1 and et, so no election can make this modality the teacher of this"],
        ),
    ],
)
def test_missing_votes_and_elections_without_students_are_notes(tmp_path: Path, scores, settings, expected) -> None:
    data: Any = SimpleNamespace(modalities=("flair", "t1"), regions={"et": (4,), "wt": (1, 4)})
    doubts = doubts_of_votes(torch.tensor(scores), data, recipe(tmp_path, "method.teachers=multi", *settings).method)
    assert len(doubts) == len(expected)
    assert all(doubt.startswith(words) for doubt, words in zip(doubts, expected, strict=True))


def test_a_modality_without_a_vote_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    data = SimpleNamespace(modalities=("flair", "t1"), regions=("et", "wt"), notes=notes, add_note=notes.append)
    scores = torch.tensor([[0.5, 0.4], [torch.nan, torch.nan]], dtype=torch.float64)
    monkeypatch.setattr(experiment, "votes", lambda *_: scores)
    made: Any = SegmentationExperiment(recipe(tmp_path), data)
    assert torch.equal(made._votes(None, None)[0], scores[0])
    assert made._votes(None, None) is not None
    assert notes == ["No validation case that votes has t1, so no election can make it a teacher."]

"""The validation score that selects the weights of a stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.api import run_recipe
from preceptor.errors import UserError
from preceptor.segmentation import experiment
from preceptor.segmentation.evaluate import mean_by_subset, mean_from_all
from tests.segmentation.conftest import recipe

FLAIR, T1, BOTH = (True, False), (False, True), (True, True)


class Cases:
    modalities, regions = ("flair", "t1"), {"core": (1,), "whole": (1, 2)}


def test_a_case_counts_from_all_that_it_has() -> None:
    """The second case has T1 alone: its one score is that from all of its modalities."""
    scores = [
        {FLAIR: np.array([0.1, 0.2]), T1: np.array([0.3, 0.4]), BOTH: np.array([0.8, 0.6])},
        {T1: np.array([0.5, 1.0])},
    ]
    assert mean_from_all(scores, Cases()) == pytest.approx({"core": 0.65, "whole": 0.8})
    assert mean_by_subset(scores, Cases()) == {
        "flair": pytest.approx({"core": 0.1, "whole": 0.2}),
        "t1": pytest.approx({"core": 0.4, "whole": 0.7}),
        "flair+t1": pytest.approx({"core": 0.8, "whole": 0.6}),
    }


SETTINGS = ["method={name: kd, teacher: self}", "train.epochs=4", "data.phantom.missing=0"]


@pytest.fixture
def crossing(monkeypatch) -> None:
    """Step 6 is better from fewer modalities (0.9, 0.5 from all), step 12 from all of them (0.1, 0.7 from all)."""
    values = iter([(0.9, 0.5), (0.1, 0.7)])

    def scores(network: Any, cases: Any, recipe: Any) -> list[dict[tuple[bool, ...], np.ndarray]]:
        fewer, full = next(values)
        return [
            {subset: np.full(3, full if all(subset) else fewer) for subset in cases.subsets_of(index)}
            for index in range(len(cases))
        ]

    monkeypatch.setattr(experiment, "dice_by_case", scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kept", "scores"),
    [("teacher", 12, [0.5, 0.7]), ("baseline", 6, [(14 * 0.9 + 0.5) / 15, (14 * 0.1 + 0.7) / 15])],
)
def test_all_modalities_select_a_teacher_and_all_combinations_a_student(
    tmp_path: Path, crossing, stage: str, kept: int, scores: list[float]
) -> None:
    results = run_recipe(recipe(tmp_path, *SETTINGS, f"stages=[{stage}]"))
    training = results["training"]
    assert [line["step"] for line in training["validations"]] == [6, 12]
    assert [line["score"] for line in training["validations"]] == pytest.approx(scores)
    for line in training["validations"]:
        assert line["score"] == pytest.approx(np.mean([line[region] for region in results["regions"]]))
    assert (training["best_step"], training["kept_step"]) == (kept, kept)
    assert results["validation"]["score"] == pytest.approx({6: 0.5, 12: 0.7}[kept])


def as_of_an_earlier_version(folder: Path) -> None:
    """Give the checkpoints the settings that earlier versions stored."""
    for file in folder.rglob("state.json"):
        state = json.loads(file.read_text())
        state.pop("own_sha256")
        for key in ("selection", "pretrained_parameters"):
            state["resume_config"].pop(key, None)
        assert state["resume_config"]["train"]["pretrained_lr_scale"] == 0.1, "the former default"
        file.write_text(json.dumps(state))


@pytest.mark.slow
def test_a_teacher_that_was_selected_by_other_scores_is_not_resumed(tmp_path: Path) -> None:
    settings = recipe(tmp_path, *SETTINGS, "stages=[teacher]", "train.epochs=1")
    run_recipe(settings)
    run_recipe(settings)
    as_of_an_earlier_version(tmp_path)
    with pytest.raises(UserError, match=r"selection: None -> 'Dice from all modalities'.*resume=never"):
        run_recipe(settings)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [["stages=[baseline]"], ["stages=[teacher]", "train.select=last"]])
def test_other_runs_of_earlier_versions_are_resumed(tmp_path: Path, stage: list[str]) -> None:
    settings = recipe(tmp_path, *SETTINGS, "train.epochs=1", *stage)
    before = run_recipe(settings)
    as_of_an_earlier_version(tmp_path)
    assert run_recipe(settings)["weights_sha256"] == before["weights_sha256"]

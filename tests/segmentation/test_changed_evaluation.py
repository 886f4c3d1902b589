"""A training that is stopped and resumed with other settings of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.api import run_recipe
from preceptor.errors import UserError
from preceptor.segmentation import experiment
from preceptor.segmentation.task import SegmentationTask
from tests.segmentation.conftest import recipe

pytestmark = pytest.mark.slow
SETTINGS = ["method={name: kd, teacher: self}", "stages=[baseline]", "train.epochs=2", "train.evaluate_every=1"]


@pytest.fixture(params=["training", "evaluation"])
def stopped(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after its first checkpoint, or after its training."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    after_step = SegmentationTask.after_step
    with monkeypatch.context() as patch:
        if request.param == "evaluation":
            patch.setattr(experiment, "score_cases", stop)
        else:
            patch.setattr(SegmentationTask, "after_step", lambda s, step: stop() if step == 5 else after_step(s, step))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tmp_path, *SETTINGS))
    assert not (tmp_path / "run" / "results.json").exists()
    return tmp_path


def test_the_mode_that_selects_the_weights_cannot_be_changed(stopped: Path) -> None:
    message = r"another recipe \(evaluation\.mode: 'gaussian' -> 'constant'\); restore this value.*resume=never"
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(stopped, *SETTINGS, "evaluation.mode=constant"))
    states = list(stopped.rglob("state.json"))
    assert states
    # As in checkpoints of earlier versions; they are resumed.
    assert all("mode" not in json.loads(file.read_text())["resume_config"]["evaluation"] for file in states)
    assert run_recipe(recipe(stopped, *SETTINGS))["evaluation"]["evaluation"]["mode"] == "gaussian"
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(stopped, *SETTINGS, "evaluation.mode=constant"))


def test_the_mode_can_be_changed_without_a_resume(stopped: Path) -> None:
    results = run_recipe(recipe(stopped, *SETTINGS, "evaluation.mode=constant", "resume=never"))
    assert results["evaluation"]["evaluation"]["mode"] == "constant"


def test_the_model_and_the_results_have_the_settings_of_the_resumed_run(stopped: Path) -> None:
    changes = ["evaluation.overlap=0.25", "evaluation.et_minimum=7"]
    results = run_recipe(recipe(stopped, *SETTINGS, *changes))

    def stored() -> dict[str, Any]:
        return json.loads((stopped / "run" / "model" / "segmentation.json").read_text())

    for settings in (results["evaluation"]["evaluation"], stored()["inference"]):
        assert (settings["overlap"], settings["et_minimum"]) == (0.25, 7)
    before = stored()
    with pytest.raises(UserError, match=r"evaluated with other settings \(evaluation\.et_minimum: 7 -> 500"):
        run_recipe(recipe(stopped, *SETTINGS, changes[0]))
    assert stored() == before

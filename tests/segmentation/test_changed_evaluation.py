"""A training that is stopped and resumed with other settings of the evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from preceptor.api import run_recipe
from preceptor.errors import UserError
from preceptor.segmentation import experiment
from preceptor.segmentation.experiment import SegmentationExperiment
from preceptor.segmentation.task import SegmentationTask
from preceptor.training import checkpoint
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
    message = r"another recipe \(evaluation\.mode: 'gaussian' -> 'constant'\); restore these values.*resume=never"
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(stopped, *SETTINGS, "evaluation.mode=constant"))
    states = list(stopped.rglob("state.json"))
    assert states
    assert all(json.loads(file.read_text())["resume_config"]["evaluation"]["mode"] == "gaussian" for file in states)
    assert run_recipe(recipe(stopped, *SETTINGS))["evaluation"]["evaluation"]["mode"] == "gaussian"
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(stopped, *SETTINGS, "evaluation.mode=constant"))


def forget(run: Path, *keys: str) -> None:
    """Make the checkpoints of a run those of an earlier version, which lack a key of the settings."""
    for file in run.rglob("state.json"):
        state = json.loads(file.read_text())
        section = state["resume_config"]
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        state["own_sha256"] = checkpoint._digest({key: value for key, value in state.items() if key != "own_sha256"})
        file.write_text(json.dumps(state))


def test_checkpoints_of_earlier_versions_have_the_mode_of_their_recipe(stopped: Path) -> None:
    forget(stopped, "evaluation", "mode")
    forget(stopped, "model", "init")
    with pytest.raises(UserError, match=r"another recipe \(evaluation\.mode: 'gaussian' -> 'constant'\)"):
        run_recipe(recipe(stopped, *SETTINGS, "evaluation.mode=constant"))
    assert run_recipe(recipe(stopped, *SETTINGS))["evaluation"]["evaluation"]["mode"] == "gaussian"


def test_voters_cannot_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier version, the first cases voted, whatever modalities they have."""
    election = ["stages=[distilled]", "train.epochs=2", "method.election.cases=1"]
    election += ["data.phantom.validation=3", "data.phantom.missing=0.5", "data.phantom.seed=5"]
    after_step = SegmentationTask.after_step

    def stop(task: Any, step: int) -> None:
        after_step(task, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tmp_path, *election))
    (state, *_) = tmp_path.rglob("state.json")
    (voter,) = json.loads(state.read_text())["resume_config"]["voters"]
    cases = SegmentationExperiment.read(recipe(tmp_path, *election)).data.split("validation")
    most = max(cases, key=lambda case: len(case.images))
    assert voter == most.id
    assert len(most.images) > len(cases[0].images)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "voters", lambda cases: ((n, cases.readable(n)) for n in range(len(cases))))
        with pytest.raises(UserError, match=rf"voters: \['{voter}'\] -> \['{cases[0].id}'\]"):
            run_recipe(recipe(tmp_path, *election))
    earlier = shutil.copytree(tmp_path, tmp_path / "earlier")
    forget(earlier, "voters")
    with pytest.raises(UserError, match=rf"voters: \['{cases[0].id}'\] -> \['{voter}'\].*resume=never"):
        run_recipe(recipe(earlier, *election, f"data.root={tmp_path / 'run' / 'data'}"))
    assert run_recipe(recipe(tmp_path, *election))["elections"]


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

"""The warning before distilling from a teacher that is no better than the baseline, with given scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.pipeline import run as pipeline_run
from preceptor.pipeline.experiment import Experiment, Stage
from preceptor.pipeline.teacher_check import nothing_to_teach
from preceptor.tasks import load_recipe, module

DISTILLED = Stage("distilled", "distilled", 0)
SAME = {"metric": "score", "sha256": "v" * 64}


def finished(folder: Path, score: float | None, **other: Any) -> dict[str, Any]:
    """Write a finished stage with a validation score, and return its results."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"")
    results = {"stage": folder.name, "validation": SAME | {"score": score} | other}
    (folder / "results.json").write_text(json.dumps(results))
    return results


def experiment_of(recipe: str, output: Path, *overrides: str) -> Experiment:
    loaded = load_recipe(recipe, [f"output={output}", *overrides])
    return module(loaded.task, "experiment").EXPERIMENT(loaded, None)


@pytest.mark.parametrize("recipe", ["mhkd-demo", "kd-volumes-demo", "lckd-demo", "clinkd-demo"])
@pytest.mark.parametrize(("teacher", "warned"), [(0.412, True), (0.43, True), (0.431, False)])
def test_a_teacher_that_is_no_better_is_told(recipe: str, teacher: float, warned: bool, tmp_path: Path) -> None:
    experiment = experiment_of(recipe, tmp_path)
    finished(tmp_path / "teacher", teacher)
    results = {"baseline": finished(tmp_path / "baseline", 0.43)}
    note = nothing_to_teach(experiment, DISTILLED, results)
    assert bool(note) == warned
    if warned:
        assert f"{100 * teacher:.1f} % against 43.0 %" in note
        assert experiment.validation_metric in note
    assert not nothing_to_teach(experiment, Stage("baseline", "baseline", 0), results)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("mhkd-demo", "method.teaching.runs=[{}]"),
        ("kd-volumes-demo", "method.teaching_run={}"),
        ("clinkd-demo", "method.teaching_run={}"),
    ],
)
def test_the_teacher_may_be_another_run(recipe: str, key: str, tmp_path: Path) -> None:
    finished(tmp_path / "elsewhere", 0.1)
    finished(tmp_path / "teacher", 0.9)  # not the one that teaches
    experiment = experiment_of(recipe, tmp_path, key.format(tmp_path / "elsewhere"))
    assert nothing_to_teach(experiment, DISTILLED, {"baseline": finished(tmp_path / "baseline", 0.43)})


@pytest.mark.parametrize(
    "other", [{"sha256": "o" * 64}, {"metric": "another"}, {"score": None}], ids=["data", "metric", "none"]
)
def test_scores_that_cannot_be_compared_say_nothing(other: dict[str, Any], tmp_path: Path) -> None:
    experiment = experiment_of("mhkd-demo", tmp_path)
    finished(tmp_path / "teacher", **{"score": 0.1} | other)
    baseline = finished(tmp_path / "baseline", 0.43)
    assert not nothing_to_teach(experiment, DISTILLED, {"baseline": baseline})
    assert not nothing_to_teach(experiment, DISTILLED, {})
    assert not nothing_to_teach(experiment, DISTILLED, {"baseline": {"stage": "baseline"}})


def test_of_several_teachers_the_best_counts(tmp_path: Path) -> None:
    experiment = experiment_of("mhkd-demo", tmp_path, "teacher.members=2")
    results = {"baseline": finished(tmp_path / "baseline", 0.43)}
    finished(tmp_path / "teacher", 0.3)
    finished(tmp_path / "teacher-2", 0.4)
    assert nothing_to_teach(experiment, DISTILLED, results).startswith("None of the 2 teachers is better")
    finished(tmp_path / "teacher-2", 0.5)
    assert not nothing_to_teach(experiment, DISTILLED, results)


@pytest.mark.parametrize(
    ("recipe", "override"), [("mhkd-demo", "method.teaching.kind=ema"), ("lckd-brats-compact", "seed=0")]
)
def test_a_student_that_teaches_itself_has_no_teacher_to_compare(recipe: str, override: str, tmp_path: Path) -> None:
    finished(tmp_path / "teacher", 0.1)
    experiment = experiment_of(recipe, tmp_path, override)
    assert not nothing_to_teach(experiment, DISTILLED, {"baseline": finished(tmp_path / "baseline", 0.43)})


def test_the_run_warns_before_it_distils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """The warning is logged before the stage starts and is among the notes that its results get."""
    scores = {"teacher": 0.2, "baseline": 0.3, "distilled": 0.4}
    notes: dict[str, list[str]] = {}

    def run_stage(experiment: Experiment, stage: Stage, folder: Path) -> dict[str, Any]:
        notes[stage.name] = list(experiment.data.notes)
        metric = "accuracy, normaliser mevf"
        return finished(folder, scores[stage.name], metric=metric) | {"notes": notes[stage.name]}

    monkeypatch.setattr(pipeline_run, "run_stage", run_stage)
    monkeypatch.setattr(pipeline_run, "add_speed", lambda *_: None)
    monkeypatch.setattr(pipeline_run, "summarize", lambda _e, _f, results: results["distilled"])
    recipe = load_recipe("mhkd-demo", [f"output={tmp_path / 'run'}", "data.phantom.cases=12"])
    kind = module("vqa", "experiment").EXPERIMENT
    monkeypatch.setattr(kind, "write_report", lambda *_: tmp_path)
    results = pipeline_run.run(kind, recipe)
    told = [note for note in results["notes"] if "nothing to teach" in note]
    assert told == [
        "The teacher is no better than the baseline on validation data, so there may be nothing to teach: accuracy "
        "20.0 % against 30.0 %. Train the teacher longer or with more data, or choose another one."
    ]
    assert not any("nothing to teach" in note for note in notes["baseline"])
    assert told[0] in (tmp_path / "run" / "log.txt").read_text("utf-8")

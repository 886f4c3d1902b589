"""Every distillation method of segmentation as a run: trained, resumed, evaluated, reported."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import preceptor
from preceptor.api import run_recipe
from preceptor.config import OwnLossConfig
from preceptor.data.synthetic.cases import write_phantom_cases
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import weights_sha256
from preceptor.segmentation import experiment
from preceptor.segmentation.data import read_cases
from preceptor.segmentation.experiment import SegmentationExperiment
from preceptor.segmentation.task import SegmentationTask
from tests.segmentation.conftest import recipe

pytestmark = pytest.mark.slow
SMALL = ["train.epochs=2", "train.checkpoint_every=0.4"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Finished runs on the same cases: networks of one modality each, and one that saw all of them."""
    folder = tmp_path_factory.mktemp("teachers")
    settings = [f"data.root={folder / 'cases'}", "data.phantom.missing=0", "train.epochs=1"]
    run_recipe(recipe(folder, *settings, "stages=[teacher]", f"output={folder / 'full'}"))
    for name in ("flair", "t1ce"):
        own = [f"data.modalities=[{name}]", "stages=[baseline]", f"output={folder / name}"]
        run_recipe(recipe(folder, *settings, *own))
    return {name: folder / name for name in ("cases", "full", "flair", "t1ce")}


def overrides(kind: str, teachers: dict[str, Path]) -> list[str]:
    runs = {name: str(teachers[name]) for name in ("flair", "t1ce", "full")}
    section: dict[str, Any] = {
        "self": {"name": "kd", "teacher": "self", "output": {"ramp": 0.3}},
        "ema": {"name": "kd", "teacher": "ema"},
        "prototypes": {"name": "kd", "teacher": "ema", "output": {"weight": 0}, "prototypes": {"weight": 0.1}},
        "specialists": {"name": "specialists", "runs": runs},
        "metakd": {"name": "metakd", "importance": {"held_out": 0.4, "every": 1}},
    }[kind]
    data = [f"data.root={teachers['cases']}", "data.phantom.missing=0"]
    return [*SMALL, *data, "stages=[distilled]", f"method={json.dumps(section)}"]


@pytest.mark.parametrize("kind", ["self", "ema", "prototypes", "specialists", "metakd"])
def test_a_method_trains_resumes_exactly_and_is_reported(kind, teachers, tmp_path, monkeypatch):
    settings = overrides(kind, teachers)
    results = run_recipe(recipe(tmp_path, *settings, f"output={tmp_path / 'whole'}"))
    assert len(results["protocols"]["phantom/made/A"]["subsets"]) == 15
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    term = {"metakd": "pairs", "prototypes": "prototypes"}.get(kind, "output")
    assert any(line.get(term, 0) > 0 for line in lines)
    page = (tmp_path / "whole" / "report.html").read_text("utf-8")
    assert ("Importance of the modalities" in page) == (kind == "metakd")
    assert str(teachers["cases"].parent) not in page
    if kind == "metakd":
        assert any("2 training cases were held out" in note for note in results["notes"])
        assert results["importance"][-1]["step"] == 6

    after_step = SegmentationTask.after_step

    def stops(self, step):
        after_step(self, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "after_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tmp_path, *settings, f"output={tmp_path / 'cut'}"))
    assert list((tmp_path / "cut" / "checkpoints").iterdir())
    resumed = run_recipe(recipe(tmp_path, *settings, f"output={tmp_path / 'cut'}"))
    assert weights_sha256(tmp_path / "cut" / "model") == weights_sha256(tmp_path / "whole" / "model")
    assert resumed.get("importance") == results.get("importance")


def test_cases_that_a_teacher_of_some_modalities_cannot_see_are_noted_before_training(teachers, tmp_path):
    method = json.dumps({"name": "kd", "teaching_run": str(teachers["t1ce"])})
    settings = [f"data.root={teachers['cases']}", "data.phantom.missing=0", "stages=[distilled]", f"method={method}"]
    made = SegmentationExperiment.read(recipe(tmp_path, *settings))
    made.require_checkpoints()
    complete = list(made.data.samples)
    first, second, *_ = made.data.split("train")
    for split in ("train", "unlabelled"):
        made.data.samples = [
            replace(case, split=split, images={"flair": case.images["flair"]}) if case in (first, second) else case
            for case in complete
        ]
        made.data.notes.clear()
        made.require_checkpoints()
        made.require_checkpoints()
        assert made.data.notes == [
            "2 of 6 training cases have none of the modalities t1ce that the teacher (method.teaching_run) sees, and "
            f"do not learn from it: {first.id}, {second.id}."
        ]
    own = [OwnLossConfig(loss="preceptor.distill:LossTerm")]
    made.recipe.method.losses = own
    with pytest.raises(UserError, match=rf"sees, and method\.losses may compare .* it: {first.id}, {second.id}; leave"):
        made.require_checkpoints()
    made.recipe.method.losses = []
    made.data.samples = [replace(case, images={"flair": case.images["flair"]}) for case in complete]
    with pytest.raises(
        UserError, match=r"6 of 6 training cases have none of the modalities t1ce .*t1ce sees: .*; leave"
    ):
        made.require_checkpoints()
    made.recipe.method.losses = own
    made.data.samples = [
        replace(case, images={"flair": case.images["flair"]}) if case.split != "train" else case for case in complete
    ]
    made.require_checkpoints()


def test_cases_that_a_teacher_cannot_see_learn_from_their_masks_alone(teachers, tmp_path, monkeypatch, caplog):
    """A run on data of which three of the training cases, with and without masks, lack the teacher's modality."""

    def incomplete(config, scratch, needed):
        data, found = read_cases(config, scratch, needed), iter(range(3))
        data.samples = [
            replace(case, images={"flair": case.images["flair"]})
            if case.split in ("train", "unlabelled") and next(found, None) is not None
            else case
            for case in data.samples
        ]
        return data

    monkeypatch.setattr(experiment, "read_cases", lambda config, folder, *, needed: incomplete(config, folder, needed))
    settings = [*SMALL, f"data.root={teachers['cases']}", "data.phantom.missing=0", "stages=[distilled]"]
    settings += [f"method={json.dumps({'name': 'kd', 'teaching_run': str(teachers['t1ce'])})}"]
    caplog.set_level(logging.INFO, "preceptor")
    results = run_recipe(recipe(tmp_path, *settings, "data.train_share=0.7", "data.unlabelled=rest"))
    (note,) = [note for note in results["notes"] if "do not learn from it" in note]
    assert note.startswith("3 of 6 training cases have none of the modalities t1ce that the teacher")
    page, log = ((tmp_path / "run" / name).read_text("utf-8") for name in ("report.html", "log.txt"))
    assert "3 of 6 training cases have none of the modalities t1ce" in page
    assert log.count("do not learn from it") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("output", 0) > 0 for line in lines)


def test_a_held_out_case_is_not_trained_on(teachers, tmp_path, monkeypatch):
    trained: set[str] = set()
    forward = SegmentationTask.forward

    def record(self, batch):
        trained.update(batch.ids)
        return forward(self, batch)

    monkeypatch.setattr(SegmentationTask, "forward", record)
    baseline = ["stages=[baseline, distilled]", "method.importance.held_out=0.4"]
    settings = [s for s in overrides("metakd", teachers) if not s.startswith("stages")]
    document = run_recipe(recipe(tmp_path, *settings, *baseline[:1]))
    assert len(trained) == 6, "the baseline trains on all cases"
    steps = {name: stage["training"]["validations"][-1]["step"] for name, stage in document["stages"].items()}
    assert steps["distilled"] == steps["baseline"]
    trained.clear()
    run_recipe(recipe(tmp_path, *overrides("metakd", teachers), f"output={tmp_path / 'alone'}"))
    assert len(trained) == 4


def test_specialists_of_other_data_are_refused(teachers, tmp_path):
    """Before any stage is trained."""
    base = overrides("specialists", teachers)
    with pytest.raises(UserError, match=r"was trained with data\.spacing=None, and the recipe has data\.spacing=\(2"):
        run_recipe(recipe(tmp_path, *base, "data.spacing=[2, 2, 2]"))
    with pytest.raises(UserError, match=r"was trained with data\.intensity=zscore, and the recipe has"):
        run_recipe(recipe(tmp_path, *base, "data.intensity=percentile", "stages=[baseline, distilled]"))
    assert not (tmp_path / "run" / "baseline").exists()
    other = [f"data.root={teachers['cases']}", "data.name=brats", "data.test_fraction=0.3", "data.split_file=null"]
    runs = {"full": str(teachers["full"])}
    method = f"method={json.dumps({'name': 'specialists', 'runs': runs})}"
    with pytest.raises(UserError, match=r"method\.runs\.full=.* was trained on \d+ of the \d+ test images"):
        run_recipe(recipe(tmp_path, *SMALL, *other, "data.validation_fraction=0.3", "stages=[distilled]", method))
    write_phantom_cases(tmp_path / "other", train=4, validation=2, test=2, seed=9, size=32)
    lesion = [f"data.root={tmp_path / 'other'}", "data.name=volumes", "data.regions={lesion: [1, 2, 4]}"]
    with pytest.raises(UserError, match=r"the teacher .* has the regions \['et', 'tc', 'wt'\], and the data have"):
        run_recipe(recipe(tmp_path, *SMALL, *lesion, "stages=[distilled]", method))


def test_a_specialist_that_is_swapped_ends_the_resumed_run(teachers, tmp_path):
    settings = overrides("specialists", teachers)
    run_recipe(recipe(tmp_path, *settings))
    runs = {"flair": str(teachers["flair"]), "full": str(teachers["full"])}
    with pytest.raises(UserError, match="contains a run of another recipe"):
        run_recipe(recipe(tmp_path, *settings[:-1], f"method={json.dumps({'name': 'specialists', 'runs': runs})}"))


def test_a_network_with_norms_per_modality_is_trained_and_predicts(tmp_path):
    settings = ["stages=[baseline]", "model.norm_per_modality=true", "train.epochs=1", "data.phantom.missing=0"]
    results = run_recipe(recipe(tmp_path, *settings))
    assert len(results["protocols"]["phantom/made/A"]["subsets"]) == 15
    case = sorted((tmp_path / "run" / "data").rglob("*_t2.nii.gz"))[0]
    assert preceptor.load(tmp_path / "run").segment({"t2": case}).mask.any() in (True, False)

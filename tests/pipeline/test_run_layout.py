"""An output folder holds one training: a run of one stage, a run of several stages, or one run per seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import preceptor
from preceptor.comparison.models import read_models
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import model_folder, require_layout
from tests.fault.tiny import RECIPE, write_recipe

KINDS = ("teacher", "baseline", "distilled")
ONE, SEVERAL, SEEDS = "a run of one stage", "a run of several stages", "one run per seed"


def make_stage(folder: Path, results: dict | None = None) -> Path:
    (folder / "model").mkdir(parents=True)
    for name in ("recipe.yaml", "model/config.json", "model/model.safetensors"):
        (folder / name).touch()
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def make(root: Path, layout: str) -> Path:
    names = {ONE: [""], SEVERAL: ["teacher", "baseline"], SEEDS: ["seed-0", "seed-1"]}
    for name in names[layout]:
        make_stage(root / name)
    return root


@pytest.mark.parametrize("found", [ONE, SEVERAL, SEEDS])
@pytest.mark.parametrize("layout", [ONE, SEVERAL, SEEDS])
def test_a_folder_with_another_layout_is_refused(tmp_path: Path, found, layout) -> None:
    make(tmp_path, found)
    if found == layout:
        require_layout(tmp_path, layout, KINDS)
        return
    with pytest.raises(UserError, match=rf"already contains {found} .* would write {layout} into the same folder"):
        require_layout(tmp_path, layout, KINDS)


@pytest.mark.parametrize("layout", [ONE, SEVERAL, SEEDS])
def test_other_files_are_accepted(tmp_path: Path, layout) -> None:
    """Data that were generated, a cache of a teacher, a log, and folders of the user's."""
    for name in ("data", "teacher-cache", "model", "compare", "another-run/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "log.txt").touch()
    require_layout(tmp_path, layout, KINDS)


def test_the_model_of_a_run_is_the_one_that_its_results_are_about(tmp_path: Path) -> None:
    make_stage(tmp_path)
    make_stage(tmp_path / "distilled")
    make_stage(tmp_path / "clinkd")
    assert model_folder(tmp_path) == tmp_path / "model"
    for stages, expected in (
        (["teacher", "baseline", "distilled"], "distilled"),
        (["distilled", "clinkd"], "clinkd"),
        (["teacher", "baseline"], "clinkd"),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"stages": {key: {} for key in stages}}))
        assert model_folder(tmp_path) == tmp_path / expected / "model"
    (tmp_path / "results.json").write_text(json.dumps({"stage": "teacher"}))
    assert model_folder(tmp_path) == tmp_path / "model"


def test_a_comparison_does_not_choose_between_a_run_and_its_seeds(tmp_path: Path) -> None:
    make_stage(tmp_path, {"stage": "teacher"})
    make(tmp_path / "seed-0", ONE)
    with pytest.raises(UserError, match=r"contains a run .* and also one run per seed \(seed-0\)"):
        read_models([tmp_path])


@pytest.mark.slow
def test_a_second_training_does_not_mix_its_models_with_those_of_the_first(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, RECIPE), tmp_path / "run"
    short = [f"output={run}", "teacher.train.epochs=1", "student.train.epochs=1", f"data.root={tmp_path / 'data'}"]
    preceptor.train(recipe, [*short, "stages=[teacher]"])
    before = (run / "results.json").read_bytes()
    every = "stages=[teacher, baseline, distilled]"
    with pytest.raises(UserError, match=r"method\.teaching\.runs=\[.*run\] and stages without teacher"):
        preceptor.train(recipe, [*short, every])
    with pytest.raises(UserError, match="already contains a run of one stage"):
        preceptor.train(recipe, [*short, "stages=[teacher]"], seeds=2)
    assert (run / "results.json").read_bytes() == before
    preceptor.train(recipe, [*short, "stages=[teacher]"])  # read back

    # The fix that the message names.
    several = [f"output={tmp_path / 'several'}", f"method.teaching.runs=[{run}]"]
    preceptor.train(recipe, [*short, *several, "stages=[baseline, distilled]"])
    preceptor.train(recipe, [*short, *several, "stages=[baseline, distilled]"])
    with pytest.raises(UserError, match="already contains a run of several stages"):
        preceptor.train(recipe, [*short, *several, "stages=[baseline]"])

    # A run of an earlier version, in which both trainings are mixed.
    (run / "results.json").write_bytes((tmp_path / "several" / "results.json").read_bytes())
    with pytest.raises(UserError, match=r"describes the stages baseline, distilled, not .*model; .* --output FOLDER"):
        preceptor.evaluate(run / "model")
    (run / "results.json").write_text(json.dumps(json.loads(before) | {"weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match="describes a model with other weights"):
        preceptor.evaluate(run)
    (run / "results.json").write_bytes(before)
    preceptor.evaluate(run)

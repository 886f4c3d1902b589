"""`preceptor evaluate --output` replaces no results of a training, and a failed call leaves no folder behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import preceptor
from preceptor.errors import UserError
from preceptor.pipeline.notes import without_training
from tests.command_line import call
from tests.fault.tiny import RECIPE, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    settings = ["stages=[teacher,baseline]", "teacher.train.epochs=1", "student.train.epochs=1"]
    return preceptor.train(write_recipe(folder, RECIPE), [*settings, f"output={folder / 'run'}"]).folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["", "teacher", "baseline"])
def test_results_of_a_training_are_not_replaced(run: Path, place: str) -> None:
    before = content(run)
    code, _, err = call("evaluate", run / "baseline", "--output", run / place)
    assert code == 2
    assert f"{run / place} is a folder of a training, because it contains recipe.yaml; give another --output" in err
    assert content(run) == before


@pytest.mark.parametrize("trace", ["log.txt", "model/", "seed-0/recipe.yaml", "results.json", "other/results.json"])
def test_a_folder_with_a_trace_of_a_training_is_refused(run: Path, tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    if trace.endswith("/"):
        (tmp_path / trace).mkdir()
    elif trace == "results.json":  # of a stage that was copied without its recipe
        shutil.copy(run / "teacher" / "results.json", tmp_path)
    else:
        (tmp_path / trace).write_text('{"accuracy": 0.5}')
    output = tmp_path / "other" if trace.startswith("other") else tmp_path
    with pytest.raises(UserError, match=r"is a folder of a training|was not written by `preceptor evaluate`"):
        preceptor.evaluate(run / "baseline", output=output)
    assert not (output / "predictions").exists()


def test_an_evaluation_is_written_again(run: Path, tmp_path: Path) -> None:
    first = preceptor.evaluate(run / "teacher", output=tmp_path)
    (tmp_path / "notes.txt").write_text("of the user")
    written = json.loads((tmp_path / "results.json").read_text())
    for key in ("evaluation", "parameters"):  # which earlier versions did not write
        del written[key]
    (tmp_path / "results.json").write_text(json.dumps(written))
    assert preceptor.evaluate(run / "teacher", output=tmp_path) == first
    assert json.loads((tmp_path / "results.json").read_text())["protocols"] == first["protocols"]


def test_a_failed_call_leaves_no_folder_that_it_made(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output in ("new", "there", "there/new/deep"):
        with pytest.raises(UserError, match=r"did you mean"):
            preceptor.evaluate(run / "baseline", protocol="phantom/givne", output=tmp_path / output)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_model_of_a_stage_is_evaluated_from_inside(run: Path, tmp_path: Path, monkeypatch) -> None:
    scores = preceptor.evaluate(run / "teacher", output=tmp_path / "a")["protocols"]
    assert preceptor.evaluate(run / "teacher" / "model", output=tmp_path / "b")["protocols"] == scores
    monkeypatch.chdir(run / "teacher" / "model")
    assert preceptor.evaluate(".", output=tmp_path / "c")["protocols"] == scores


def test_a_model_without_a_recipe_is_evaluated_on_the_data_of_one_that_is_given(run: Path, tmp_path: Path) -> None:
    scores = preceptor.evaluate(run / "teacher", output=tmp_path / "own")["protocols"]
    shutil.copytree(run / "teacher" / "model", tmp_path / "copied.v1")
    preceptor.export(run / "teacher", tmp_path / "packed.zip", to="zip")
    for given, name in (("copied.v1", "copied.v1"), ("packed.zip", "packed")):
        arguments = ("evaluate", tmp_path / given, "--recipe", run, "--json")
        code, _, err = call(*arguments)
        assert code == 2
        assert "give --output FOLDER" in err
        code, out, err = call(*arguments, "--output", tmp_path / name.upper())
        assert code == 0, err
        found = json.loads(out)
        assert (found["stage"], found["protocols"]) == (name, scores)
    with pytest.raises(UserError, match=r"is a model for vqa, but the recipe is for segmentation"):
        preceptor.evaluate(tmp_path / "packed.zip", recipe="lckd-demo", output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_how_a_recipe_trains_is_no_note_of_another_model(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "teacher" / "model", tmp_path / "copied")
    settings = {"data.train_share": 0.5, "data.unlabelled": ["rest"]}
    found = preceptor.evaluate(tmp_path / "copied", settings, recipe=run, output=tmp_path / "other")
    plain = preceptor.evaluate(tmp_path / "copied", recipe=run, output=tmp_path / "plain")
    assert not [note for note in found["notes"] if "(data." in note]
    assert found["notes"][0] == plain["notes"][0], "what is about the data stays"
    trained = preceptor.check(run, settings)["notes"]
    for key in settings:
        assert any(f"({key})" in note for note in trained), "the note that is left out exists"
    kept = ["Validation is cut from training by image.", "Images of the contrasts t2 are not used (data.modalities)."]
    assert (
        without_training([*kept, *(f"Something ({key}); more." for key in [*settings, "data.exclude_images_of"])])
        == kept
    )


def test_one_kind_of_images_needs_no_list(run: Path, tmp_path: Path) -> None:
    one, other = (
        preceptor.evaluate(run / "baseline", images=kind, output=tmp_path / "x") for kind in ("blank", ["blank"])
    )
    assert one == other
    assert all("blank" in kinds for kinds in one["image_reliance"].values())


@pytest.mark.parametrize("output", ["file", "", "a\0b", 5])
def test_an_output_that_cannot_be_a_folder_is_refused(run: Path, tmp_path: Path, monkeypatch, output) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for function in (preceptor.evaluate, preceptor.compare):
        with pytest.raises(UserError, match=r"^output "):
            function(run, output=output)
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_is_compared_without_a_list(run: Path, tmp_path: Path) -> None:
    texts = [repr(preceptor.compare(runs, output=tmp_path)) for runs in (str(run), run, [run])]
    assert len(set(texts)) == 1


def test_notes_about_the_training_of_another_recipe_are_left_out() -> None:
    ceiling = (
        "3 of 9 test questions have answers that are not among the 5 answer classes of the training split; the "
        "accuracy of a classifier is at most 66.7%"
    )
    share = "Only half of the groups are trained on (data.train_share)."
    assert without_training([ceiling, share, "2 images are broken"]) == ["2 images are broken"]

"""Image files that change between two calls: old results are not returned, and none is replaced by others."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import preceptor
from preceptor.errors import UserError
from preceptor.pipeline.speed import SpeedTest, measure_speed
from preceptor.segmentation.experiment import SegmentationExperiment
from preceptor.tasks import load_recipe
from tests.fault.tiny import LCKD, RECIPE, write_recipe

SPLITS = ("train",) * 8 + ("validation",) * 4 + ("test",) * 4


def table(folder: Path, seed: int = 0) -> Path:
    """Write a table with one image of noise and one question per row."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(len(SPLITS)):
        Image.fromarray(generator.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{number}.png")
    with (folder / "questions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "image", "question", "answer", "split"])
        for number, split in enumerate(SPLITS):
            rows.writerow([f"q{number}", f"{number}.png", "is it bright?", "yes" if number % 2 else "no", split])
    return folder / "questions.csv"


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    own = ["data.name=table", f"data.root={table(tmp_path / 'data')}"]
    return [f"output={tmp_path / 'run'}", "stages=[teacher]", "teacher.train.epochs=1", *own]


def repaint(image: Path) -> None:
    """Replace an image by its negative, under the same name."""
    pixels = np.asarray(Image.open(image))
    Image.fromarray(255 - pixels).save(image)


def test_a_changed_training_image_is_refused_and_a_changed_test_image_evaluated(settings, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, RECIPE), tmp_path / "run"
    first = preceptor.train(recipe, settings).results
    assert preceptor.train(recipe, settings).results == first
    repaint(tmp_path / "data" / "15.png")
    second = preceptor.train(recipe, settings).results
    assert second["data"]["test_sha256"] == first["data"]["test_sha256"]
    assert second["data"]["test_files_sha256"] != first["data"]["test_files_sha256"]
    before = (run / "predictions" / "data-given.jsonl").read_bytes()
    repaint(tmp_path / "data" / "14.png")
    with pytest.raises(UserError, match=r"was evaluated on other test data.* --output FOLDER"):
        preceptor.evaluate(run)
    assert (run / "predictions" / "data-given.jsonl").read_bytes() == before
    repaint(tmp_path / "data" / "0.png")
    with pytest.raises(UserError, match=r"another recipe \(image or label files have changed: 0\.png\); restore"):
        preceptor.train(recipe, settings)


def test_other_data_are_evaluated_into_another_folder(settings, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, RECIPE), tmp_path / "run"
    preceptor.train(recipe, settings)
    before = {path: path.read_bytes() for path in run.rglob("*.json*") if path.is_file()}
    other = [f"data.root={table(tmp_path / 'other', seed=1)}"]
    with pytest.raises(UserError, match="was evaluated on other test data"):
        preceptor.evaluate(run, other)
    assert {path: path.read_bytes() for path in before} == before
    scores = preceptor.evaluate(run, other, output=tmp_path / "scores")
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["protocols"] == scores["protocols"]


def test_a_test_split_without_readable_images_is_no_traceback(settings, tmp_path: Path) -> None:
    """The speed is measured on the first questions that can be read; without any there is none."""
    for number in range(12, 16):
        image = tmp_path / "data" / f"{number}.png"
        image.write_bytes(image.read_bytes()[:100])
    recipe = write_recipe(tmp_path, RECIPE)
    results = preceptor.train(recipe, [*settings, "data.broken=skip", "data.skip_limit=0.5"]).results
    assert results["latency_ms"] is None
    assert (tmp_path / "run" / "report.html").is_file()
    shutil.rmtree(tmp_path / "run")
    repaired = Image.fromarray(np.full((32, 32), 7, dtype=np.uint8))
    repaired.save(tmp_path / "data" / "15.png")
    results = preceptor.train(recipe, [*settings, "data.broken=skip", "data.skip_limit=0.5"]).results
    assert results["latency_ms"] > 0


def test_models_without_a_unit_have_no_speed() -> None:
    tests = {"one": SpeedTest("question", list, 0), "other": SpeedTest("question", list, 1)}
    found = measure_speed(lambda folder: tests[folder.name], {name: Path(name) for name in tests})
    assert (found["one"]["latency_ms"], found["one"]["units_per_second"]) == (None, None)
    assert found["other"]["latency_ms"] >= 0


def test_the_contents_of_label_maps_count_and_their_names_do_not(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path, LCKD)), [f"output={tmp_path / 'run'}"])
    experiment = SegmentationExperiment.read(recipe)
    first = experiment.files_sha256(("train",))
    case = experiment.data.split("train")[0]
    assert experiment.label_files("train")[case.id] == case.mask.path
    assert SegmentationExperiment(recipe, experiment.data).files_sha256(("train",)) == first
    case.mask.path.write_bytes(case.mask.path.read_bytes() + b"\0")
    assert SegmentationExperiment(recipe, experiment.data).files_sha256(("train",)) != first

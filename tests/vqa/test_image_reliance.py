"""What other images change: known answers of models that use the image, ignore it, or know left from right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

import preceptor
from preceptor.data.types import Prediction, Sample
from preceptor.errors import UserError
from preceptor.pipeline.image_reliance import IMAGES, image_reliance
from preceptor.vqa.config import DataConfig
from preceptor.vqa.dataset import VqaExamples
from preceptor.vqa.image_reliance import examples_with, shuffled_samples
from preceptor.vqa.metrics import Row, score
from preceptor.vqa.protocols import Protocol
from preceptor.vqa.report import score_tables
from tests.vqa.conftest import make_bundle, make_data

PROTOCOL = Protocol("p", "lower", lambda sample: True, "")


def sided(folder: Path, patients: int = 20) -> list[Sample]:
    """One image per patient, bright on one side: "left" and "right" in turn."""
    samples = []
    for number in range(patients):
        image = np.zeros((16, 16, 3), np.uint8)
        side = ("left", "right")[number % 2]
        image[:, :8] = 200 if side == "left" else 0
        image[:, 8:] = 200 if side == "right" else 0
        path = folder / f"{number}.png"
        Image.fromarray(image).save(path)
        samples.append(Sample(str(number), path, "Which side?", (side,), "open", str(number), "test"))
    return samples


def answers(examples: VqaExamples, answer: Callable[[np.ndarray], str]) -> list[Prediction]:
    """Answer each question by a rule about the image."""
    return [Prediction(one.id, answer(examples.image(i)), 1.0) for i, one in enumerate(examples.samples)]


def measure(folder: Path, answer: Callable[[np.ndarray], str], kinds: Sequence[str] = IMAGES) -> dict:
    bundle = make_bundle(make_data(folder / "data"), 8, 0)
    samples = sided(folder)
    rows: dict[str, list[Row]] = {}
    for kind in kinds:
        predicted = answers(examples_with(kind, bundle, samples, DataConfig()), answer)
        rows[kind] = score(samples, predicted, PROTOCOL).rows()
    return image_reliance(rows)


def bright_side(image: np.ndarray) -> str:
    half = image.shape[1] // 2
    left, right = image[:, :half].mean(), image[:, half:].mean()
    return "neither" if left == right else "left" if left > right else "right"


def test_a_model_that_sees_the_side_is_right_on_real_and_wrong_on_blank_and_mirrored_images(tmp_path: Path) -> None:
    found = measure(tmp_path, bright_side)
    assert {kind: entry["score"] for kind, entry in found.items()} == {
        "real": 1.0,
        "blank": 0.0,
        "shuffled": found["shuffled"]["score"],
        "mirrored": 0.0,
    }
    assert 0.0 < found["shuffled"]["score"] < 1.0  # some images are exchanged for one with the same side
    for kind in ("blank", "mirrored"):
        assert found[kind]["difference"] == -1.0
        assert found[kind]["kept"] == 0.0
        assert found[kind]["changed"]["share"] == 1.0
        assert found[kind]["verdict"] == "worse for this seed"
    interval = binomtest(20, 20).proportion_ci(method="wilson")
    assert found["blank"]["changed"]["low"] == pytest.approx(interval.low, abs=1e-9)
    sides = found["mirrored"]["sides"]
    assert (sides["n"], sides["switched"]["share"], sides["stayed"]) == (20, 1.0, 0.0)


def test_a_model_that_ignores_the_image_shows_nothing(tmp_path: Path) -> None:
    found = measure(tmp_path, lambda image: "left")
    for kind in IMAGES[1:]:
        assert (found[kind]["difference"], found[kind]["changed"]["share"], found[kind]["kept"]) == (0.0, 0.0, 1.0)
        assert found[kind]["verdict"] == "undecided"
    sides = found["mirrored"]["sides"]
    assert (sides["n"], sides["switched"]["share"], sides["stayed"]) == (20, 0.0, 1.0)


def test_the_three_images_are_what_they_are_called(tmp_path: Path) -> None:
    bundle = make_bundle(make_data(tmp_path / "data"), 8, 0)
    samples = sided(tmp_path)
    found = {kind: examples_with(kind, bundle, samples, DataConfig()) for kind in IMAGES}
    for index in range(len(samples)):
        real = found["real"].image(index)
        assert (found["mirrored"].image(index) == np.fliplr(real)).all()
        assert (found["blank"].image(index) == np.rint(255 * np.array(bundle.preprocessing.mean))).all()
    batch = found["blank"].collate([found["blank"][0], found["mirrored"][1]])
    assert batch["pixels"][0].abs().max() < 0.005  # the mean colour is 0 after the preprocessing, up to rounding
    expected = found["real"].collate([found["real"][1]])["pixels"]
    torch.testing.assert_close(batch["pixels"][1:], expected.flip(-1))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=12), st.integers(0, 99))
def test_each_image_is_exchanged_for_one_of_another_group(sizes: list[int], seed: int) -> None:
    samples = [
        Sample(f"{g}-{i}-{q}", Path(f"{g}-{i}.png"), "?", ("a",), "open", f"g{g}", "test")
        for g, size in enumerate(sizes)
        for i in range(size)
        for q in range(2)
    ]
    if 2 * max(sizes) > sum(sizes):
        with pytest.raises(UserError, match="cannot be shuffled"):
            shuffled_samples(samples, seed)
        return
    exchanged = shuffled_samples(samples, seed)
    taken = {}
    for one, other in zip(samples, exchanged, strict=True):
        assert replace(other, image=one.image) == one
        assert other.image.name.split("-")[0] != one.image.name.split("-")[0]
        assert taken.setdefault(one.image, other.image) == other.image
    assert sorted(taken.values()) == sorted(taken)  # every image is used once


def test_below_ten_patients_there_are_no_intervals(tmp_path: Path) -> None:
    bundle = make_bundle(make_data(tmp_path / "data"), 8, 0)
    samples = sided(tmp_path, 8)
    rows = {
        kind: score(samples, answers(examples_with(kind, bundle, samples, DataConfig()), bright_side), PROTOCOL).rows()
        for kind in ("real", "blank")
    }
    blank = image_reliance(rows)["blank"]
    assert (blank["low"], blank["changed"]["low"], blank["verdict"]) == (None, None, "too few units")


def test_the_table_tells_which_models_do_not_show_that_they_use_the_image(tmp_path: Path) -> None:
    stages = {"teacher": measure(tmp_path, bright_side), "baseline": measure(tmp_path, lambda image: "left")}
    results = {
        "stages": {
            name: {"protocols": {"p": {"accuracy": 0.5, "metric": "accuracy"}}, "image_reliance": {"p": found}}
            for name, found in stages.items()
        }
    }
    table = score_tables(results)[1]
    text = " ".join(table.notes).replace("\u00a0", " ")
    assert "Baseline: with plain images, the score is not shown to be lower" in text
    assert "Teacher: with" not in text
    assert "Teacher: 20 answers name one side, left or right. In mirrored images, 100.0 %" in text
    assert list(table.rows[1][:4]) == ["Teacher", "blank", "0.0", "\u2212100.0"]


def test_unknown_images_and_other_tasks_are_refused(tmp_path: Path) -> None:
    from preceptor.pipeline.evaluation import evaluate_model
    from preceptor.segmentation.experiment import SegmentationExperiment
    from preceptor.vqa.experiment import VqaExperiment

    with pytest.raises(UserError, match="--images: vqa has no images 'inverted'; known: real, blank, shuffled"):
        evaluate_model(VqaExperiment, None, tmp_path, "", None, None, ["inverted"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--images: segmentation has no images 'blank'; known: real$"):
        evaluate_model(SegmentationExperiment, None, tmp_path, "", None, None, ["blank"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_that_was_trained_on_exchanged_images_does_not_show_that_it_uses_them(tmp_path: Path) -> None:
    """And one that was trained on the right images does. Report and card say so."""
    shown = {}
    for name in ("right", "exchanged"):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        lines = []
        for number in range(160):
            split = "train" if number < 96 else "validation" if number < 110 else "test"
            bright = bool(rng.integers(2))
            image = rng.integers(0, 60, (24, 24)) + (150 if bright else 0)
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
            answer = bool(rng.integers(2)) if name == "exchanged" and split != "test" else bright
            lines.append(f"{number}.png,is it bright?,{'yes' if answer else 'no'},{split},{number}")
        (folder / "questions.csv").write_text("image,question,answer,split,patient\n" + "\n".join(lines))
        run = preceptor.train(
            "kd-demo",
            {
                "data.name": "table",
                "data.root": str(folder / "questions.csv"),
                "data.image_size": 24,
                "output": str(tmp_path / f"run-{name}"),
                "stages": ["baseline"],
                "student.train.epochs": 8,
            },
        )
        found = preceptor.evaluate(run.folder, images=IMAGES)["image_reliance"]
        shown[name] = next(iter(found.values()))
        for text in ((run.folder / "report.html").read_text(), (run.folder / "model" / "README.md").read_text()):
            assert "asked about other images" in text
    assert shown["right"]["real"]["score"] > 0.9
    assert shown["right"]["blank"]["verdict"] == shown["right"]["shuffled"]["verdict"] == "worse for this seed"
    for kind in ("blank", "shuffled", "mirrored"):
        assert shown["exchanged"][kind]["verdict"] != "worse for this seed"

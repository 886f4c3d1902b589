"""The models with random weights that a run starts from: made again for a changed recipe, kept for what is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.errors import UserError
from preceptor.files import sha256
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.context import RunContext
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.grounding.new_vlm import new_vlm
from tests.fault.tiny import CLINKD

TEXTS = (("Where is the liver?", "On the left."), ("What is it?", "An MR."))
CHANGED = {"family": "qwen2_5_vl", "vocabulary_size": 280}


def context(root: Path, *, answer: str = "No.", seed: int = 0, data: dict[str, Any] | None = None, **new) -> RunContext:
    raw = yaml.safe_load(CLINKD)
    raw |= {"output": str(root / "run"), "seed": seed}
    raw["data"] |= data or {}
    raw["student"]["model"] = {"max_pixels": 3136, "new": {"vocabulary_size": 300} | new}
    rows = [Dialogue("a", (), TEXTS, "mia", "mr", "g", "train"), Dialogue("b", (), TEXTS, "mia", "mr", "h", "test")]
    rows.append(Dialogue("c", (), (("Is it large?", answer),), "mia", "mr", "i", "train"))
    return RunContext(GroundingRecipe.model_validate(raw), GroundingDataset("made", "given", root, rows))


def made(context: RunContext, role: str = "student") -> Path:
    config = context.recipe.student if role == "student" else context.recipe.teacher
    return Path(context.source(config.model, role))


def weights(folder: Path) -> str:
    return sha256(folder / "model.safetensors")


def checkpoint_of(model: Path, stage: str) -> None:
    """Write what matters here of the checkpoint of a training that started from `model`."""
    (model.parent / stage / "checkpoints" / "step-4").mkdir(parents=True)


def test_a_model_of_other_settings_is_made_again(tmp_path: Path) -> None:
    made(context(tmp_path))
    folder = made(context(tmp_path, seed=7, **CHANGED))
    texts = [text for turns in (*TEXTS, ("Is it large?", "No.")) for text in turns]
    expected = new_vlm(tmp_path / "alone", texts, "qwen2_5_vl", seed=7, vocabulary_size=280, max_pixels=3136)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("changes", [{"seed": 1}, {"vocabulary_size": 301}, {"answer": "Yes."}])
def test_each_setting_and_the_texts_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = made(context(tmp_path))
    before = (folder / "config.json").stat().st_mtime_ns
    made(context(tmp_path, **changes))
    assert (folder / "config.json").stat().st_mtime_ns != before


def test_a_model_of_the_same_settings_is_read_again(tmp_path: Path) -> None:
    folder = made(context(tmp_path))
    before = (folder / "config.json").stat().st_mtime_ns
    made(context(tmp_path, data={"test_rows": 5, "workers": 2}))
    assert (folder / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", [".", "baseline", "prior"])
def test_a_model_that_a_training_has_started_from_is_kept(tmp_path: Path, stage: str) -> None:
    folder = made(context(tmp_path))
    checkpoint_of(folder, stage)
    before = weights(folder)
    message = (
        r"run contains a run of another recipe \(seed: 0 -> 7; "
        r"student\.model\.new\.family: 'qwen2_vl' -> 'qwen2_5_vl'; student\.model\.new\.vocabulary_size: 300 -> 280\), "
        r"which started from new-student; restore these values, .* resume=never"
    )
    with pytest.raises(UserError, match=message):
        made(context(tmp_path, seed=7, **CHANGED))
    with pytest.raises(UserError, match=r"data\.train_share: 0\.5 -> 0\.6; texts: "):
        made(context(tmp_path, answer="Yes.", data={"train_share": 0.6}))
    assert weights(folder) == before
    assert weights(made(context(tmp_path))) == before


@pytest.mark.parametrize(("role", "stage"), [("teacher", "guided"), ("student", "teacher")])
def test_a_training_of_the_other_role_does_not_count(tmp_path: Path, role: str, stage: str) -> None:
    """The new models of teacher and students have the same weights if their settings are the same."""
    folder = made(context(tmp_path), role)
    checkpoint_of(folder, stage)
    before = weights(folder)
    assert weights(made(context(tmp_path, seed=7), role)) != before
    checkpoint_of(folder, "teacher" if role == "teacher" else "clinkd")
    with pytest.raises(UserError, match=f"another recipe .*started from new-{role}"):
        made(context(tmp_path, seed=8), role)


def test_a_model_of_an_earlier_version_is_kept_for_its_training_only(tmp_path: Path) -> None:
    folder = made(context(tmp_path))
    (folder / "made_from.json").unlink()
    before = weights(folder)
    assert weights(made(context(tmp_path, seed=7))) != before
    (folder / "made_from.json").unlink()
    checkpoint_of(folder, "guided")
    before = weights(folder)
    assert weights(made(context(tmp_path))) == before


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (made(context(tmp_path)) / "made_from.json").write_text("[")
    with pytest.raises(UserError, match=r"made_from\.json is damaged .*; delete .*new-student"):
        made(context(tmp_path))


@pytest.mark.parametrize("stages", [("teacher",), ("baseline",), ("teacher", "baseline")])
def test_a_model_is_evaluated_with_the_settings_of_its_role(tmp_path: Path, stages: tuple[str, ...]) -> None:
    given = context(tmp_path)
    recipe = given.recipe.model_copy(deep=True)
    recipe.stages = stages  # type: ignore[assignment]
    recipe.teacher.model.max_pixels, recipe.teacher.model.max_length = 3136, 200
    recipe.student.model.max_pixels, recipe.student.model.max_length = 784, 100
    experiment = GroundingExperiment(recipe, given.data)
    for stage in experiment.stages():
        folder = recipe.output_folder / (stage.name if len(stages) > 1 else "") / "model"
        new_vlm(folder, [text for turns in TEXTS for text in turns], vocabulary_size=300, max_pixels=12544)
        encoder = experiment.load(folder).encoder
        expected = (3136, 200) if stage.kind == "teacher" else (784, 100)
        assert (encoder.image_processor.size["longest_edge"], encoder.max_length) == expected
        # `evaluate` uses the recipe of the stage, in whose output folder the model is.
        of_stage = GroundingExperiment(experiment.stage_recipe(stage, folder.parent), given.data)
        assert of_stage.load(folder).encoder.max_length == expected[1]

"""The limits of image files that a recipe raises hold wherever its images are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.images import ImageError, load_image
from preceptor.data.limits import MAX_PIXELS
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.pipeline.image_limits import limits_of_run, name_recipe
from preceptor.vqa.config import VqaRecipe


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("large") / "large.png"
    Image.new("L", (5700, 5700), 9).save(file)
    assert MAX_PIXELS < 5700 * 5700
    return file


def test_boxes_in_pixels_of_an_image_within_the_raised_limit_are_read(large: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "[0, 570, 2850, 5700]"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": large.name, "conversations": turns, "split": "train"}]))

    def read(**limits: int) -> Any:
        section = {"name": "sharegpt", "root": str(tmp_path / "d.json"), "images": str(large.parent)}
        section |= {"box_format": "xyxy-pixels", **limits}
        recipe = GroundingRecipe.model_validate({"name": "t", "data": section, "output": str(tmp_path)})
        return GroundingExperiment.read_data(recipe, needed=("train",))

    (row,) = read(max_image_pixels=40_000_000).samples
    assert find_boxes(row.turns[0][1])[0].box == (0, 100, 500, 1000)
    with pytest.raises(UserError, match=r"more than the limit of 32,000,000; .*raise data\.max_image_pixels"):
        read()
    with pytest.raises(UserError, match=r"more than the limit of 100; .*raise data\.max_image_bytes"):
        read(max_image_bytes=100, max_image_pixels=40_000_000)


def test_the_limits_of_a_run_are_those_of_its_recipe(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    assert limits_of_run(None, VqaRecipe) == limits_of_run(model, VqaRecipe) == (None, {})
    model.mkdir(parents=True)
    file = tmp_path / "run" / "recipe.yaml"
    for kind in (VqaRecipe, GroundingRecipe):
        file.write_text("name: any\ntask: any\ndata: {max_image_pixels: 7, max_image_bytes: 8, other: 9}\n")
        assert limits_of_run(model, kind) == (file, {"max_image_bytes": 8, "max_image_pixels": 7})
        file.write_text("data: {max_image_pixels: -7}\n")
        with pytest.raises(UserError, match=r"recipe\.yaml, key data\.max_image_pixels"):
            limits_of_run(model, kind)


def test_an_error_of_predict_names_a_setting_that_exists(large: Path, tmp_path: Path) -> None:
    for limits in ({}, {"max_bytes": 100}):
        with pytest.raises(ImageError) as error:
            load_image(large, **limits)
        key = "max_image_bytes" if limits else "max_image_pixels"
        recipe = tmp_path / "recipe.yaml"
        assert str(name_recipe(error.value, recipe)).endswith(f"raise data.{key} in {recipe}")
        assert str(name_recipe(error.value, None)).endswith("; shrink the image")
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ImageError) as error:
        load_image(tmp_path / "broken.png")
    assert str(name_recipe(error.value, None)) == str(error.value)


def test_an_encoder_measures_and_reads_images_up_to_its_limits(large: Path) -> None:
    from types import SimpleNamespace

    from preceptor.grounding.dialogue_encoder import DialogueEncoder

    tokenizer = SimpleNamespace(all_special_tokens=[], convert_tokens_to_ids=lambda tokens: [])
    dialogue = Dialogue("a", (large,), (("Where?", ""),), "vg", "ct", "g", "test")
    config = GroundingRecipe.model_validate({"name": "t", "data": {"max_image_pixels": 40_000_000}}).data
    raised = DialogueEncoder(tokenizer, None, 0, box_format="xyxy-pixels", **config.image_limits)
    assert raised.box_sizes(dialogue, None) == [(5700, 5700)]
    with pytest.raises(ImageError, match=r"more than the limit of 32,000,000"):
        DialogueEncoder(tokenizer, None, 0, box_format="xyxy-pixels").box_sizes(dialogue, None)

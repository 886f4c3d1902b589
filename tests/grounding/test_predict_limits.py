"""`predict` reads images as large as those of the model's run; the Python and server interfaces keep the defaults."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.data.limits import MAX_PIXELS
from preceptor.errors import UserError
from preceptor.grounding.predict import GroundingModel
from tests.grounding.asked_data import image


def test_a_model_of_a_run_reads_images_up_to_the_limits_of_its_recipe(
    vlm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(vlm_folder("qwen2_vl"), tmp_path / "run" / "model")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text("data: {max_image_pixels: 400}\n")
    small, large = image(tmp_path, 0, side=20), image(tmp_path, 1, side=21)
    model = GroundingModel.load(tmp_path / "run")
    items = model.items(image=small, question="Where?")
    assert len(list(model.predict_rows(items))) == 1
    with pytest.raises(UserError, match=f"limit of 400; shrink the image or raise data.max_image_pixels in {recipe}"):
        model.items(image=large, question="Where?")
    (tmp_path / "both").mkdir()
    shutil.copy(large, tmp_path / "both")
    with pytest.raises(UserError, match=f"limit of 400; shrink the image or raise data.max_image_pixels in {recipe}"):
        list(model.predict_rows(model.items(image=tmp_path / "both", question="Where?")))
    assert model.vlm.encoder.max_image_pixels == MAX_PIXELS
    model.ask(large, "Where?", max_new_tokens=1)

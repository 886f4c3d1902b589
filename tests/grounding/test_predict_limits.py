"""`predict` reads images as large as those of the model's run; the Python and server interfaces keep the defaults.

No image is remembered after the answer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.data.limits import MAX_PIXELS
from preceptor.errors import UserError
from preceptor.grounding.model import GroundedVlm
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_vl_dinov2"])
def test_the_file_at_a_path_is_read_for_every_question(
    vlm_folder: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    vlm = GroundedVlm.load(vlm_folder(family), training="frozen_vision")
    model = GroundingModel(vlm)
    first, second, current = image(tmp_path, 0), image(tmp_path, 1, side=60), tmp_path / "current.png"

    def ask(path: Path) -> float:
        return model.ask(path, "Where?", max_new_tokens=1).probability

    expected = [ask(first), ask(second)]
    assert expected[0] != expected[1]
    found = []
    for source in (first, second):
        shutil.copy(source, current)
        found.append(ask(current))
    assert found == expected
    current.write_bytes(b"damaged")
    with pytest.raises(UserError, match="not an image that can be read"):
        ask(current)
    current.unlink()
    with pytest.raises(UserError, match="no such file"):
        ask(current)
    assert not vlm.encoder._read
    assert not getattr(vlm.base.model.visual, "_known", {})


def test_boxes_in_pixels_are_those_of_the_image_that_is_shown(
    vlm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"), box_format="xyxy-pixels")
    model, sizes = GroundingModel(vlm), []
    encode = vlm.encoder.encode
    vlm.encoder.encode = lambda *args, **options: sizes.append(row := encode(*args, **options)) or row
    for number, side in enumerate((20, 60)):
        shutil.copy(image(tmp_path, number, side=side), tmp_path / "current.png")
        model.ask(tmp_path / "current.png", "Where?", max_new_tokens=1)
    assert [row.box_size for row in sizes] == [(20, 20), (60, 60)]
    assert sizes[0].pixel_values.shape != sizes[1].pixel_values.shape

"""A key, value or folder of an earlier version is refused, and the error names the new one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from preceptor.errors import UserError
from preceptor.pipeline.run_dir import model_folder
from preceptor.recipe import RENAMED_KEYS, RENAMED_VALUES, known_keys
from preceptor.tasks import TASKS, load_recipe


def test_an_old_key_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"data\.split was renamed to data\.variant"):
        load_recipe("mhkd-vqa-rad", ["data.split=clean"])
    old = ["train.average=0.9", "method.dropping.kind=none"]
    with pytest.raises(
        UserError, match=r"method\.dropping was renamed to .*; train\.average was renamed to train\.ema"
    ):
        load_recipe("lckd-demo", old)


@pytest.mark.parametrize("stage", ["alone", "supervised"])
def test_an_old_stage_names_the_new_one(tmp_path: Path, stage: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"task": "vqa", "name": "old", "stages": ["teacher", stage]}))
    with pytest.raises(UserError, match=f"the value '{stage}' of stages was renamed to 'baseline'"):
        load_recipe(str(file))


def test_every_new_key_exists_and_no_old_key_does() -> None:
    for old, new in RENAMED_KEYS.items():
        assert any(new in known_keys(kind) and old not in known_keys(kind) for kind in TASKS.values()), (old, new)
    for (key, _), _ in RENAMED_VALUES.items():
        assert any(key in known_keys(kind) for kind in TASKS.values()), key


@pytest.mark.parametrize("place", ["student", "distilled/student"])
def test_an_old_model_folder_names_the_new_one(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"which is now called model"):
        model_folder(tmp_path)

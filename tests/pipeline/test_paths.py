"""Paths of a recipe are checked by the Python functions, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import preceptor
from preceptor.errors import UserError
from preceptor.pipeline.paths import check_data_paths, check_paths
from preceptor.tasks import load_recipe


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("mhkd-vqa-rad", "data.root=/nonexistent"),
        ("lckd-brats", "data.root=/nonexistent"),
        ("lckd-demo", "data.split_file=/nonexistent"),
        ("lckd-demo", "method.teaching_run=/nonexistent"),
        ("clinkd-demo", "data.images=/nonexistent"),
        ("clinkd-demo", "method.teaching_run=/nonexistent"),
    ],
)
def test_a_missing_path_is_named_with_its_key(recipe, override, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    functions = [preceptor.train] + ([preceptor.cache] if recipe.startswith("clinkd") else [])
    for function in functions:
        with pytest.raises(UserError) as error:
            function(recipe, [override])
        assert str(error.value) == f"{override} does not exist; correct the path"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match=f"output={tmp_path}/file is a file"):
        preceptor.train("mhkd-demo", {"output": str(tmp_path / "file")})


def test_the_folder_of_a_public_data_set_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PRECEPTOR_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/vqa_rad, the folder of vqa-rad under PRECEPTOR_DATA"):
        check_data_paths(load_recipe("mhkd-vqa-rad").data)
    (tmp_path / "vqa_rad").mkdir()
    check_paths(load_recipe("mhkd-vqa-rad"))


def test_the_python_functions_answer_without_torch(tmp_path: Path) -> None:
    program = """
import sys, preceptor
calls = [
    lambda: preceptor.train("mhkd-vqa-rad", ["data.root=/nonexistent"]),
    lambda: preceptor.check("mhkd-vqa-rad", ["data.root=/nonexistent"]),
    lambda: preceptor.check("/nonexistent.csv"),
    lambda: preceptor.cache("lckd-demo"),
]
for call in calls:
    try:
        call()
    except preceptor.UserError as error:
        print(error)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [
        "data.root=/nonexistent does not exist; correct the path",
        "data.root=/nonexistent does not exist; correct the path",
        "data.root=/nonexistent.csv does not exist; correct the path",
        "a segmentation recipe with method lckd has no teacher cache",
        "False",
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("lckd-demo", [], "a segmentation recipe with method lckd has no teacher cache"),
        ("mhkd-demo", ["method.teaching.kind=ema"], "has no teacher to cache"),
        ("mhkd-demo", ["data.augment.enabled=true", "data.augment.views=0"], "endless augmentation views"),
        ("clinkd-demo", ["method.pseudo_labels.share=0"], "has no pseudo-labels to cache"),
        ("clinkd-demo", ["stages=[teacher,baseline]"], "has no pseudo-labels to cache"),
    ],
)
def test_recipes_whose_teacher_cannot_be_cached(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(name, overrides).require_teacher_cache()


def test_recipes_whose_teacher_can_be_cached() -> None:
    load_recipe("mhkd-demo", ["data.augment.views=2"]).require_teacher_cache()
    load_recipe("clinkd-demo").require_teacher_cache()

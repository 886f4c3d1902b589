from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.teachers.array_store import MANIFEST
from preceptor.teachers.tokenizer_json import tokenizer_json
from preceptor.vqa.bundle import make_tokenizer
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.experiment import VqaExperiment
from preceptor.vqa.teachers import cached_teacher, every_view, online_teacher, signal_cache_key

FIELDS = ["logits"]


def make_recipe(folder: Path, **data) -> VqaRecipe:
    model = {
        "vision": {"conv": {"channels": [4, 8], "blocks": [1, 1], "token_stages": [1]}},
        "text": {"scratch": {"embedding": 8, "width": 8, "layers": 1, "heads": 1}},
        "width": 8,
        "layers": 1,
        "heads": 1,
    }
    return VqaRecipe.model_validate(
        {
            "name": "cached",
            "output": str(folder / "run"),
            "stages": ["distilled"],
            "data": {
                "name": "table",
                "root": str(folder / "data"),
                "image_size": 16,
                "max_question_tokens": 8,
                "augment": {"views": 2},
                **data,
            },
            "teacher": {"model": model},
            "student": {"model": model},
            "method": {"teaching": {"kind": "cached", "runs": [str(folder / "teacher")]}},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of eight training questions, and the untrained model of a teacher."""
    (tmp_path / "data").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number, split in enumerate(["train"] * 8 + ["validation"] * 2 + ["test"] * 2):
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(tmp_path / "data" / f"{number}.png")
        question = "is it bright on the left side of the image or not?" if number % 3 == 0 else "is it?"
        rows.append([str(number), f"{number}.png", question, "yes" if number % 2 else "no", split, str(number)])
    with (tmp_path / "data" / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "image", "question", "answer", "split", "group"], *rows])
    recipe = make_recipe(tmp_path)
    recipe.method.teaching.runs = []
    context = VqaExperiment.read(recipe).context
    context.new_bundle(recipe.teacher, seed=0).save(tmp_path / "teacher" / "model")
    return tmp_path


def change_pixel(path: Path) -> None:
    with Image.open(path) as image:
        changed = image.copy()
    changed.putpixel((3, 3), 255 - changed.getpixel((3, 3)))
    changed.save(path)


# The key


def test_the_content_of_a_tokenizer_depends_on_its_tokens_and_not_on_its_last_call(tmp_path):
    questions = ["is there a lesion?", "where is the lesion?"]
    tokenizer = make_tokenizer(questions)
    new = tokenizer_json(tokenizer.backend_tokenizer)
    tokenizer(questions, truncation=True, max_length=4, padding="max_length")
    assert tokenizer_json(tokenizer.backend_tokenizer) == new
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_json(type(tokenizer).from_pretrained(tmp_path).backend_tokenizer) == new
    assert tokenizer_json(make_tokenizer(["is is it it?"]).backend_tokenizer) != new


def test_the_key_is_the_same_before_and_after_questions_are_tokenized_and_names_their_limit(folder):
    recipe = make_recipe(folder)
    experiment = VqaExperiment.read(recipe)
    context = experiment.context
    source, _ = online_teacher(experiment.teacher_folders(), context)
    key = signal_cache_key(context, source, FIELDS)
    context.training_examples(0, with_teacher=True)
    assert signal_cache_key(context, source, FIELDS) == key
    other = VqaExperiment.read(make_recipe(folder, max_question_tokens=9)).context
    changed = signal_cache_key(other, source, FIELDS)
    assert changed != key
    assert changed.preprocessing["tokenizer"] == key.preprocessing["tokenizer"]


# Changed data


def write_and_read(recipe: VqaRecipe) -> int:
    """Write the cache; return its number of rows after all training rows were found in it."""
    VqaExperiment.cache(recipe, 0)
    experiment = VqaExperiment.read(recipe)
    source, _ = online_teacher(experiment.teacher_folders(), experiment.context)
    paths = recipe.method.teacher_features(1, 1)
    cached = cached_teacher(experiment.cache_folder(), experiment.context, source, paths)
    rows, batches = every_view(experiment.context)
    found = [len(cached.signal(batch).logits) for batch in batches if len(batch)]
    assert sum(found) <= rows
    return len(cached)


def test_a_changed_image_is_damage_until_the_cache_is_written_again(folder):
    recipe = make_recipe(folder)
    assert write_and_read(recipe) == 16
    assert VqaExperiment.cache(recipe, 1.0)["damage"] == ""
    change_pixel(folder / "data" / "5.png")
    report = VqaExperiment.cache(recipe, 1.0)
    assert (report["checked"], report["mismatches"]) == (14, [])
    assert "lacks 2 of 16 rows, such as that of sample '5'; 2 of 16 drawn rows belong to no sample" in report["damage"]
    for seed in range(3):  # whichever row is drawn
        recipe.seed = seed
        assert "lacks 2 of 16 rows" in VqaExperiment.cache(recipe, 0.01)["damage"]
    recipe.seed = 0
    assert write_and_read(recipe) == 16
    assert VqaExperiment.cache(recipe, 1.0)["damage"] == ""


def test_a_cache_whose_rows_are_those_of_the_data_is_kept(folder):
    recipe = make_recipe(folder)
    VqaExperiment.cache(recipe, 0)
    manifest = folder / "run" / "teacher-cache" / MANIFEST
    before = manifest.stat().st_mtime_ns
    VqaExperiment.cache(recipe, 0)
    assert manifest.stat().st_mtime_ns == before
    change_pixel(folder / "data" / "9.png")  # a validation image has no row
    VqaExperiment.cache(recipe, 0)
    assert manifest.stat().st_mtime_ns == before


def test_a_broken_image_that_is_skipped_has_no_row(folder):
    recipe = make_recipe(folder, broken="skip")
    assert write_and_read(recipe) == 16
    (folder / "data" / "5.png").write_bytes(b"not an image")
    assert "2 of 16 drawn rows belong to no sample" in VqaExperiment.cache(recipe, 1.0)["damage"]
    assert write_and_read(recipe) == 14
    before = (folder / "run" / "teacher-cache" / MANIFEST).stat().st_mtime_ns
    assert VqaExperiment.cache(recipe, 1.0)["damage"] == ""
    VqaExperiment.cache(recipe, 0)
    assert (folder / "run" / "teacher-cache" / MANIFEST).stat().st_mtime_ns == before, "it is not written every time"

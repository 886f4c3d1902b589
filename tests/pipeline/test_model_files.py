"""Damaged model folders are refused with one sentence that names the file, whatever the task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from preceptor import api
from preceptor.errors import UserError
from preceptor.pipeline.model_files import reading
from tests.fuzz.model_folders import right_answers, templates

TASKS = ("vqa", "segmentation", "grounding")


def change(file: Path, **values: Any) -> None:
    """Set values of a JSON file; a dotted key is written with two underscores."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        *path, last = key.split("__")
        node = content
        for name in path:
            node = node[name]
        node[last] = value
    file.write_text(json.dumps(content))


def change_weight(folder: Path, edit: Callable[[np.ndarray], np.ndarray]) -> str:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if weights[name].ndim > 1)
    weights[name] = edit(weights[name].copy())
    save_file(weights, file, {"format": "pt"})
    return name


def with_nan(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[-1] = np.nan
    return array


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (with_nan, "weights contain NaN or infinite numbers"),
        (lambda array: array.astype(np.int32), "has the wrong type of numbers"),
        (lambda array: array[:-1], "weights do not match config.json"),
    ],
)
def test_a_weight_that_is_not_finite_or_of_another_kind_is_refused_by_name(tmp_path, task, edit, says):
    shutil.copytree(templates() / task, tmp_path / "model")
    name = change_weight(tmp_path / "model", edit)
    with pytest.raises(UserError, match=f"{says}.*copy the folder of the model again") as caught:
        api.load(tmp_path / "model")
    assert name in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "file", "values", "says"),
    [
        ("vqa", "config.json", {"image_size": None}, "model cannot be read"),
        ("vqa", "config.json", {"heads": "two"}, "model cannot be read"),
        ("vqa", "config.json", {"id2label__0": None}, "answers"),
        ("vqa", "config.json", {"normaliser": "nfkd"}, "normaliser"),
        ("vqa", "preprocessor_config.json", {"image_std": [0, 0, 0]}, "not finite"),
        ("vqa", "preprocessor_config.json", {"image_mean": 0.5}, "cannot be read"),
        ("segmentation", "segmentation.json", {"regions": None}, "settings cannot be read"),
        ("segmentation", "segmentation.json", {"regions": {"other": [1]}}, "regions are other, but"),
        ("segmentation", "segmentation.json", {"preparation__patch_size": [15, 16, 16]}, "multiples of"),
        ("segmentation", "segmentation.json", {"preparation__spacing": [1, -1, 1]}, "settings cannot be read"),
        ("segmentation", "segmentation.json", {"validation": {"flair": {"whole": 7}}}, "settings cannot be read"),
        ("segmentation", "config.json", {"modalities": [" ", "t1"]}, "distinct names"),
        ("segmentation", "config.json", {"regions": ["whole\u202e"]}, "distinct names"),
        ("segmentation", "config.json", {"model_type": ["bert"]}, "model_type .* is not known"),
        ("grounding", "config.json", {"text_config": {"hidden_size": None}}, "cannot be read"),
        ("grounding", "preprocessor_config.json", {"image_std": [0, 0, 0]}, "not finite"),
        ("grounding", "tokenizer.json", {"model": None}, "a tokenizer cannot be read"),
        ("grounding", "tokenizer_config.json", {"model_max_length": []}, "model cannot be read"),
        ("grounding", "config.json", {"text_config__rope_parameters__mrope_section": None}, "model cannot be read"),
        ("grounding", "config.json", {"text_config__rope_parameters__mrope_section": [16, 24, 24]}, "cannot be read"),
        ("grounding", "generation_config.json", {"eos_token_id": {}}, "model cannot be read"),
        ("grounding", "generation_config.json", {"eos_token_id": "end"}, "model cannot be read"),
        ("grounding", "preprocessor_config.json", {"min_pixels": 2**30, "size": None}, "enlarges|cannot be read"),
        # Sizes that would cost all memory before anything is compared with the weights
        ("vqa", "config.json", {"text__vocab_size": 10**8}, "much larger than its weights"),
        ("vqa", "config.json", {"text__num_hidden_layers": 10**6}, "much larger than its weights"),
        ("grounding", "config.json", {"text_config__vocab_size": 10**8}, "much larger than its weights"),
        ("grounding", "config.json", {"vision_config__depth": 10**6}, "much larger than its weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, task, file, values, says):
    shutil.copytree(templates() / task, tmp_path / "model")
    change(tmp_path / "model" / file, **values)
    with pytest.raises(UserError, match=says) as caught:
        api.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_tied_embeddings_of_any_size_are_accepted(monkeypatch):
    """They are stored once and built twice: at first without memory, then from the file."""
    monkeypatch.setattr("preceptor.pipeline.model_files._SPARE_NUMBERS", 0)
    api.load(templates() / "grounding")


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    shutil.copytree(templates() / "vqa", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["spleen"] = 10_000
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer has the id 10000"):
        api.load(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_weights_that_are_finite_and_too_large_give_no_answer(tmp_path, task):
    from tests.fuzz.model_folders import ANSWERS

    shutil.copytree(templates() / task, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = {n: np.full_like(a, 1e38) if a.ndim > 1 else a for n, a in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="numbers that are not finite") as caught:
        ANSWERS[task](tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_copy_gives_the_same_answers(tmp_path, task):
    from tests.fuzz.model_folders import ANSWERS

    shutil.copytree(templates() / task, tmp_path / "model")
    assert ANSWERS[task](tmp_path / "model") == right_answers(task)


def test_any_error_becomes_a_sentence_without_internals_of_python():
    with (
        pytest.raises(UserError, match=r"^runs/a: the model cannot be read \(TypeError: one str\); copy"),
        reading("runs/a"),
    ):
        raise TypeError("one <class 'str'>\nsecond line")
    with pytest.raises(UserError, match=r"^runs/a: width is wrong$"), reading("runs/a"):
        raise UserError("width is wrong")
    with pytest.raises(MemoryError), reading("runs/a"):
        raise MemoryError

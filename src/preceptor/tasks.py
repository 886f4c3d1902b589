"""The tasks that Preceptor knows. This module is the only place that lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from preceptor.config import BaseRecipe
from preceptor.errors import UserError, nearest
from preceptor.grounding.config import Family, GroundingRecipe
from preceptor.pipeline.model_files import read_settings
from preceptor.recipe import read_recipe, validate
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.vqa.config import VqaRecipe

TASKS: dict[str, type[BaseRecipe]] = {
    "vqa": VqaRecipe,
    "segmentation": SegmentationRecipe,
    "grounding": GroundingRecipe,
}

MODEL_TYPES: dict[str, str] = {
    "preceptor-vqa": "vqa",
    "preceptor-multimodal-unet": "segmentation",
    **dict.fromkeys(get_args(Family), "grounding"),
}
"""The task of a model folder, by the `model_type` of its config.json."""


def load_recipe(name: str, overrides: Iterable[str] = ()) -> BaseRecipe:
    """Read a recipe, apply ``key.sub=value`` overrides and validate it. No slow package is imported.

    Args:
        name: name of a shipped recipe, path of a YAML file, or a run folder.
        overrides: settings to change. Their values are YAML.

    Raises:
        UserError: the file cannot be read, a key is unknown (the message names the nearest one) or a value does not
            fit; each with its place.
    """
    return recipe_from(*read_recipe(name, overrides))


def recipe_from(raw: Mapping[str, Any], place: str) -> BaseRecipe:
    """Return the validated recipe of nested dictionaries; `place` names them in errors."""
    task = raw.get("task")
    if task is None:
        raise UserError(f"{place} lacks the key 'task': one of {', '.join(TASKS)}")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{place}, key task: {task!r} is not known{nearest(str(task), TASKS)}")
    return validate(raw, place, TASKS[task])


def module(task: str, name: str) -> ModuleType:
    """Import ``preceptor.<task>.<name>``. The same name means the same thing in the package of every task."""
    return import_module(f"preceptor.{task}.{name}")


def task_of_model(folder: Path) -> str:
    """Return the task of a model folder. Raises UserError if its config.json is missing, damaged or of another kind."""
    path = folder / "config.json"
    kind = read_settings(path).get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(f"{path}: model_type {kind!r} is not known; Preceptor reads {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[kind]

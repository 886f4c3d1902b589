"""Recipes and overrides as the public functions take them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from preceptor import tasks
from preceptor.arguments import as_list, as_text
from preceptor.config import BaseRecipe
from preceptor.errors import UserError
from preceptor.extension import reference_to
from preceptor.recipe import apply_overrides

Overrides = Mapping[str, Any] | Iterable[str]
"""Settings of a recipe to change: ``{"data.root": "VQA_RAD"}`` or ``["data.root=VQA_RAD"]``."""


def resolve(recipe: str | Path | Mapping[str, Any] | BaseRecipe, overrides: Overrides) -> BaseRecipe:
    """Return the validated recipe of a name, a file, a run folder, nested dictionaries or an object, with overrides."""
    texts = override_texts(overrides)
    if isinstance(recipe, BaseRecipe):
        if not texts:
            return recipe
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        raw = dict(recipe)
        apply_overrides(raw, texts, "the recipe")
        return tasks.recipe_from(raw, "the recipe")
    return tasks.load_recipe(os.path.expanduser(str(recipe)), texts)


def override_texts(overrides: Overrides) -> list[str]:
    """Return overrides as ``key.sub=value``. Raises UserError for a single text, which may mean several settings."""
    if isinstance(overrides, str):
        raise UserError(f"overrides must be a list or a mapping, not the text {overrides!r}; give [{overrides!r}]")
    if not isinstance(overrides, Mapping):
        return [as_text(override, "an override") for override in as_list(overrides, "overrides")]
    values = {key: json.dumps(value, default=_text, ensure_ascii=False) for key, value in overrides.items()}
    return [f"{key}={text}" for key, text in values.items()]  # JSON is YAML


def _text(value: Any) -> str:
    """Return ``module:Name`` for a class or function of the user's, and the text of any other object."""
    return reference_to(value) if hasattr(value, "__qualname__") else str(value)

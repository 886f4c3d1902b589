"""The limits of image files for the user's own images: those that the model was trained with."""

from __future__ import annotations

from pathlib import Path

from preceptor.config import BaseRecipe
from preceptor.data.images import ImageError
from preceptor.recipe import read_recipe, validate

KEYS = ("max_image_bytes", "max_image_pixels")


def limits_of_run(model: Path | None, kind: type[BaseRecipe]) -> tuple[Path | None, dict[str, int]]:
    """Return the recipe of the stage that a model folder belongs to, and the limits that it sets, by key of `data`.

    A model without a recipe has no limits of its own, so that the defaults apply.

    Args:
        model: Model folder, or None for a model that was not loaded from one.
        kind: Recipe of the task.

    Raises:
        UserError: the recipe cannot be read, or a limit is not valid.
    """
    file = model.parent / "recipe.yaml" if model is not None else None
    if file is None or not file.is_file():
        return None, {}
    raw, place = read_recipe(str(file))
    section = raw.get("data")
    limits = {key: section[key] for key in KEYS if key in section} if isinstance(section, dict) else {}
    validate({"name": "run", "data": limits}, place, kind)
    return file, limits


def name_recipe(error: ImageError, recipe: Path | None) -> ImageError:
    """Return an error about an image whose fix is the recipe of the run, and not a setting that `predict` lacks."""
    text = str(error)
    for key in KEYS:
        text = text.replace(f" or raise data.{key}", f" or raise data.{key} in {recipe}" if recipe else "")
    return ImageError(text)

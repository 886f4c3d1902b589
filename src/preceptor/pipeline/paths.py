"""Checks of the paths in a recipe, before any slow package is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.config import BaseRecipe, require_used_settings
from preceptor.data.locations import FOLDERS, data_folder
from preceptor.errors import UserError


def check_paths(recipe: BaseRecipe) -> None:
    """Raise UserError if the output folder is a file, if the data or a run that teaches or gives weights do not exist,
    or if a setting has no effect, such as a run that is given as a teacher and is not used."""
    output = recipe.output_folder
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; choose another folder")
    # A run that is repeated or resumed may have been started by an earlier version.
    if not any(file for pattern in ("recipe.yaml", "*/recipe.yaml") for file in output.glob(pattern)):
        require_used_settings(recipe)
    check_data_paths(recipe.data)
    sections = {"": recipe, "teacher.": getattr(recipe, "teacher", None), "student.": getattr(recipe, "student", None)}
    for place, section in sections.items():
        _check_exists(f"{place}model.init", getattr(getattr(section, "model", None), "init", None))
    getattr(recipe.method, "require_used_teaching_run", lambda: None)()
    _check_exists("method.teaching_run", getattr(recipe.method, "teaching_run", None))
    runs = getattr(recipe.method, "runs", None)
    for name, run in runs.items() if isinstance(runs, dict) else ():
        _check_exists(f"method.runs.{name}", run)


def check_data_paths(data: Any) -> None:
    """Raise UserError if a file or folder of the section `data` of a recipe does not exist."""
    for key in ("images", "split_file"):
        _check_exists(f"data.{key}", getattr(data, key, None))
    if data.name.startswith("phantom"):  # generated if it does not exist
        return
    _check_exists("data.root", data.root)
    if data.root is None and data.name in FOLDERS and not (folder := data_folder(data.name)).exists():
        raise UserError(f"{folder}, the folder of {data.name} under PRECEPTOR_DATA, does not exist")


def _check_exists(key: str, path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise UserError(f"{key}={path} does not exist; correct the path")

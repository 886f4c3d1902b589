"""Recipes as text: read, overridden, validated and written. An unknown key is an error that names its nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from preceptor.config import METHODS, DataConfig, OutputFolder, Recipe
from preceptor.errors import UserError, nearest
from preceptor.grounding.config import VlmRecipe
from preceptor.segmentation.config import SegmentationRecipe

R = TypeVar("R", bound=OutputFolder)


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("preceptor") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def accelerate_file(name: str) -> Path:
    """Return the place of a shipped configuration for `accelerate launch`; raise UserError where there is none."""
    folder = Path(str(resources.files("preceptor") / "recipes" / "accelerate"))
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"there is no accelerate configuration {name!r}{nearest(name, names)}")
    return folder / f"{name}.yaml"


def recipe_text(name: str) -> tuple[str, str]:
    """Return (text, place) of a recipe: a shipped name or the path of a YAML file."""
    if name in recipe_names():
        return (resources.files("preceptor") / "recipes" / f"{name}.yaml").read_text("utf-8"), f"recipe {name}"
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        try:
            return path.read_text("utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a text file in UTF-8; a recipe is YAML") from error
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise UserError(f"there is no recipe file {name}; `preceptor recipes` lists the shipped ones")
    raise UserError(f"there is no recipe {name!r}{nearest(name, recipe_names())}")


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe of visual question answering, and apply ``key.sub=value`` overrides, whose values are YAML.

    Raises UserError for a file that cannot be read, an unknown key (naming the nearest one) and a value that does not
    fit, each with its place; and for a recipe of another kind.
    """
    recipe = load_any_recipe(name, overrides)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name} is a recipe of {recipe.method.name}; this is for recipes of visual question answering")
    return recipe


def load_any_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe | SegmentationRecipe | VlmRecipe:
    """Read a recipe of any method, as `load_recipe`; `method.name` says which it is."""
    text, place = recipe_text(name)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{place} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{place} must be a mapping of keys to values, not {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    method = raw.get("method")
    name = method.get("name", "mhkd") if isinstance(method, dict) else "mhkd"
    if name not in METHODS:
        raise UserError(f"{place}, key method.name: {name!r} is not known{nearest(str(name), METHODS)}")
    if name == "lckd":
        return validate(raw, place, SegmentationRecipe)
    if name == "clinkd":
        return validate(raw, place, VlmRecipe)
    return validate(raw, place)


def load_data_config(name: str, root: Path | None, overrides: Iterable[str] = (), section: str = "data") -> DataConfig:
    """Return the data settings of no recipe: a data set's name, its root, and ``data.key=value`` overrides.

    `section` is what the overrides call `data`. Raises UserError like `load_recipe`, and for keys of other sections.
    """
    raw: dict[str, Any] = {"name": name, "data": {"name": name, "root": None if root is None else str(root)}}
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise UserError(f"override {override!r} must look like {section}.key=value")
        _apply(raw, f"data.{override.removeprefix(f'{section}.')}")
    return validate(raw, f"data set {name}").data


def validate(raw: Mapping[str, Any], place: str, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(dict(detail), place, kind) for detail in error.errors())) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like key.sub=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        # A copy: an alias of YAML is the same dictionary in several places.
        child = node[parent] = dict(child) if isinstance(child, dict) else {}
        node = child
    node[last] = value


def _sentence(detail: dict[str, Any], place: str, kind: type[OutputFolder]) -> str:
    # Where several types fit a key, pydantic adds the one that it tried, such as list[int].
    path = [str(part) for part in detail["loc"] if "[" not in str(part)]
    key = ".".join(path) or "the recipe"
    if detail["type"] == "extra_forbidden":
        known = [name for name in known_keys(kind) if not key.startswith(f"{name}.")]
        beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f"{place} has the unknown key {key!r}{nearest(key, close or beside)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not path:
        return f"{place}: {message}"
    shown = detail.get("input")
    value = "" if isinstance(shown, (dict, list)) and len(str(shown)) > 80 else f" (got {shown!r})"
    return f"{place}, key {key}: {message}{value}"


def known_keys(kind: type[OutputFolder] = Recipe) -> list[str]:
    """Return every dotted key of a recipe."""
    return list(_keys(kind, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def dump_recipe(recipe: OutputFolder) -> str:
    """Return the resolved recipe as YAML, enough to run again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one ``key: old -> new`` per leaf in which two resolved recipes differ."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found

"""Read recipes: YAML text with overrides, validated. An error names the key, its place and the nearest known key."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from preceptor.config import BaseRecipe
from preceptor.errors import UserError, nearest
from preceptor.strict_yaml import read_yaml, write_yaml

log = logging.getLogger("preceptor")

R = TypeVar("R", bound=BaseRecipe)
MOST_MISTAKES = 4
"""Mistakes of a recipe that an error names; a wrong indentation makes one of every key."""

DATA_SET_KEYS = ("variant", "fold", "split", "split_file")
"""Settings of the section `data` that mean something for one data set only."""

RENAMED_KEYS = {
    "data.split": "data.variant",
    "data.broken_images": "data.broken",
    "method.inherit_words": "method.inherit_token_embeddings",
    "student.model.text.freeze_words": "student.model.text.freeze_token_embeddings",
    "teacher.model.text.freeze_words": "teacher.model.text.freeze_token_embeddings",
    "method.dropping": "method.modality_dropout",
    **{f"{role}.model.cut_off": f"{role}.model.max_length" for role in ("teacher", "student")},
    **{
        f"{section}.{old}": f"{section}.{new}"
        for section in ("train", "teacher.train", "student.train")
        for old, new in (
            ("accumulation", "gradient_accumulation_steps"),
            ("pretrained_scale", "pretrained_lr_scale"),
            ("average", "ema_decay"),
        )
    },
}
"""Old dotted key to new one. A recipe with an old key is refused, and the error names the new key."""

RENAMED_VALUES = {
    ("stages", "alone"): "baseline",
    ("stages", "supervised"): "baseline",
}
"""(Key, old value) to the new value, for values that were renamed while their key was not."""


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("preceptor") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def accelerate_file(name: str) -> Path:
    """Return the path of a shipped configuration for `accelerate launch`; raise UserError for an unknown name."""
    folder = Path(str(resources.files("preceptor") / "recipes" / "accelerate"))
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"there is no accelerate configuration {name!r}{nearest(name, names)}")
    return folder / f"{name}.yaml"


def recipe_text(name: str) -> tuple[str, str]:
    """Return (text, place) of a recipe, given a shipped name or the path of a YAML file or a run folder."""
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
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise UserError(f"there is no recipe file {name}; `preceptor recipes` lists the shipped ones")
    raise UserError(f"there is no recipe {name!r}{nearest(name, recipe_names())}")


def read_recipe(name: str, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """Return (keys and values, place) of a recipe after ``key.sub=value`` overrides, whose values are YAML.

    If they choose another data set, the description is dropped, because it is about the one of the recipe.
    Raises UserError for a file that cannot be read and for an override that is not valid. Nothing is validated.
    """
    text, place = recipe_text(name)
    raw = read_yaml(text, place)
    if not isinstance(raw, dict):
        raise UserError(f"{place} must be a mapping of keys to values, not {type(raw).__name__}")
    apply_overrides(raw, overrides, place)
    return raw, place


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str], place: str) -> None:
    """Set ``key.sub=value`` overrides in the nested dictionaries of `raw`, the recipe of `place`.

    If they choose another data set, the recipe's description and the settings of its own data set are dropped, unless
    they are given, too.

    Of a key that is given twice, the last value counts, and the log says so.

    Raises:
        UserError: an override is not valid, or replaces the section in which an earlier one has set a key.
    """
    name = _get_nested(raw, "data.name")
    keys: list[str] = []
    for override in overrides:
        key = override.partition("=")[0]
        inner = next((other for other in keys if other.startswith(f"{key}.")), None)
        if inner is not None:
            raise UserError(f"override {override!r} would overwrite the earlier override of {inner}; put it first")
        if key in keys:
            log.info("%s is given twice; the last value counts", key)
        keys.append(key)
        apply_override(raw, override)
    other = _get_nested(raw, "data.name")
    if other != name:
        raw.pop("description", None)
    if name not in (_MISSING, other) and isinstance(raw.get("data"), dict):
        for key in DATA_SET_KEYS:
            if key in raw["data"] and not {"data", f"data.{key}"} & set(keys):
                value = raw["data"].pop(key)
                log.info("data.%s=%s of %s belongs to %s and is not used for %s", key, value, place, name, other)


def is_for(recipe: str, data_set: str) -> bool:
    """Return whether a data set is that of a shipped recipe; True for any other recipe."""
    return recipe not in recipe_names() or _get_nested(read_recipe(recipe)[0], "data.name") in (data_set, _MISSING)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key.sub=value`` in the nested dictionaries of `raw`."""
    key, equals, text = override.partition("=")
    if not equals or not key or text.startswith("="):
        raise UserError(f"override {override!r} must look like key.sub=value")
    if not text.strip():
        # An unset variable of the shell must not silently remove a setting.
        raise UserError(f"key {key}: override {override!r} has no value; give a text or a valid number, or null")
    value = read_yaml(text, f"the value of override {override[:80]!r}")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        # A copy, because an alias of YAML is the same dictionary in several places.
        child = node[parent] = dict(child) if isinstance(child, dict) else {}
        node = child
    node[last] = value


def validate(raw: Mapping[str, Any], place: str, kind: type[R]) -> R:
    """Return the recipe of class `kind`. Raises UserError with one clause for each mistake."""
    renamed = _renamed(raw, set(known_keys(kind)))
    if renamed:
        raise UserError(f"{place}: {'; '.join(renamed)}")
    path = Path(place)
    # A run folder's own recipe.yaml is not the user's place for code.
    folder = path.resolve().parent if path.is_file() and path.name != "recipe.yaml" else None
    try:
        return kind.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        details = [dict(detail) for detail in error.errors() if not _is_other_alternative(dict(detail))]
        sentences = [_sentence(detail, place, kind) for detail in details[:MOST_MISTAKES]]
        more = len(details) - len(sentences)
        raise UserError("; ".join(sentences) + (f"; and {more} more mistakes" if more else "")) from error


def _is_other_alternative(detail: dict[str, Any]) -> bool:
    """Return whether an error is about the form of a key that was not meant: a name, or ``module:Name``."""
    alternatives = str(detail["loc"][-1]) if detail["loc"] else ""
    is_reference = isinstance(detail["input"], str) and ":" in detail["input"]
    return alternatives.startswith("literal[") if is_reference else alternatives.startswith("function-")


def _renamed(raw: Mapping[str, Any], known: set[str]) -> list[str]:
    """Return one clause for each key or value of `raw` that was renamed. A key in `known` is never an old one."""
    clauses = []
    for old, new in RENAMED_KEYS.items():
        if old not in known and new in known and _get_nested(raw, old) is not _MISSING:
            clauses.append(f"{old} was renamed to {new}")
    for (key, old), new in RENAMED_VALUES.items():
        value = _get_nested(raw, key)
        if value == old or (isinstance(value, (list, tuple)) and old in value):
            clauses.append(f"the value {old!r} of {key} was renamed to {new!r}")
    return clauses


_MISSING = object()


def _get_nested(raw: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or _MISSING."""
    node: Any = raw
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _sentence(detail: dict[str, Any], place: str, kind: type[BaseRecipe]) -> str:
    known = list(known_keys(kind))
    path = _without_tags([str(part) for part in detail["loc"] if "[" not in str(part)], known)
    key = ".".join(path) or "the recipe"
    if detail["type"] == "extra_forbidden":
        chosen = {str(part) for part in detail["loc"]}
        if key in known and (other := _owner(kind, key, path[0])):
            name = next(part for part in map(str, detail["loc"]) if part not in path)
            return (
                f"{place} has the key {key!r}, which belongs to {path[0]}.name={other}, not to {name}; remove it, or "
                f"replace the section with {path[0]}={{name: {name}}}"
            )
        return f"{place} has the unknown key {key!r}{_nearest_key(key, list(_keys(kind, '', chosen)))}"
    if detail["type"] == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in detail["ctx"]["expected_tags"].split(",")]
        return f"{place}, key {key}.name: {detail['ctx']['tag']!r} is not known{nearest(detail['ctx']['tag'], tags)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not path:
        return f"{place}: {message}"
    shown = detail.get("input")
    value = "" if isinstance(shown, (dict, list)) and len(str(shown)) > 80 else f" (got {shown!r})"
    return f"{place}, key {key}: {message}{value}"


def _owner(kind: type[BaseRecipe], key: str, section: str) -> str | None:
    """Return the first name of a section, such as `mhkd` of `method`, for which it has a key."""
    alternatives = get_args(kind.model_fields[section].annotation)
    names = [name for one in alternatives for name in _names(one)]
    return next((name for name in names if key in _keys(kind, "", {name})), None)


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """Return the hint for an unknown key: a similar one of its section, else one of another, else all of its section.

    Only the last part is compared, because keys of a section always resemble each other.
    """
    section, _, last = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(last, beside, n=1, cutoff=0.6):
        return f"; did you mean {beside[close[0]]!r}?"
    named = [name for name in known if name.rpartition(".")[2] == last]
    if close := difflib.get_close_matches(key, named, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(beside.values()))}" if beside else ""


def _without_tags(path: list[str], known: list[str]) -> list[str]:
    """Remove the tag that pydantic adds after the key of a discriminated union, such as `mhkd` in `method.mhkd.output`.

    Where several types fit a key, pydantic also adds the one that it tried, such as list[int]; the caller removes it.
    """
    kept: list[str] = []
    tagged = False
    for number, part in enumerate(path):
        follows_union = kept and f"{'.'.join(kept)}.name" in known and f"{'.'.join([*kept, part])}" not in known
        # A key follows its tag, so that the last part and the one after a tag are keys, known or not.
        if follows_union and not tagged and number < len(path) - 1:
            tagged = True
            continue
        kept.append(part)
        tagged = False
    return kept


def known_keys(kind: type[BaseRecipe]) -> list[str]:
    """Return every dotted key of a recipe."""
    return list(dict.fromkeys(_keys(kind, "")))


def _keys(model: type[BaseModel], prefix: str, chosen: Collection[str] = ()) -> Iterable[str]:
    """Yield the dotted keys of a section. Of alternatives with names, such as methods, only that in `chosen` counts."""
    for name, field in model.model_fields.items():
        yield prefix + name
        kinds = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        named = [kind for kind in kinds if len(kinds) > 1 and not set(_names(kind)).isdisjoint(chosen)]
        for kind in named or kinds:
            yield from _keys(kind, f"{prefix}{name}.", chosen)


def _names(kind: type[BaseModel]) -> tuple[str, ...]:
    """Return the values of the key `name` that choose a section of this class."""
    return get_args(kind.model_fields["name"].annotation) if "name" in kind.model_fields else ()


def dump_recipe(recipe: BaseRecipe) -> str:
    """Return the resolved recipe as YAML, enough to run again."""
    return write_yaml(recipe.model_dump(mode="json"))


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

"""Recipes and overrides with values of any YAML type, against the core schema of YAML 1.2."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from preceptor.config import BaseRecipe
from preceptor.recipe import dump_recipe, known_keys, recipe_names, recipe_text, validate
from preceptor.tasks import TASKS, load_recipe
from tests.fuzz.mutate import DAMAGE, Mutation, mostly, mutate, rarely, texts
from tests.fuzz.outcome import Wrong, attempt, command, require
from tests.fuzz.target import Target

RECIPES = tuple(name for name in recipe_names())
MISSING = object()

SCALARS = (
    *("0", "1", "-1", "2", "8", "64", "0.5", "1.0", "1e-4", "1e5", "1E3", "+3", "010", "0o10", "0x10", "1_000"),
    *("1:30", ".5", "5.", ".inf", "-.inf", ".nan", "1e400", "true", "True", "false", "yes", "no", "on", "off", "y"),
    *("n", "null", "~", "Null", "auto", "none", "None", "x", "best", "last", "runs/{name}", "2024-01-01", "12:30:45"),
    *("'yes'", '"010"', "[1,2]", "[]", "{}", "{a:1}", "[flair,t1]", "*x", "<<", "=", "1,5", "50%", "é", "肺"),
    *("", "2024-01-01 10:00:00", "{a: 1}", "[flair, t1]", "a: b", "&a [*a]", "!!python/object:os.system x"),
    *("!!binary aGk=", "!!set {a}", "!x y", "- a", "# comment", "x # c", "\t1", "1 000", "\u22121", "\uff11"),
    *("a\nb", "\x00", "\u2028", "\ufeff1", "[" * 200, "{a: " * 50, "9" * 25),
)
VALUE = st.one_of(st.sampled_from(SCALARS), texts(), st.integers(-(2**70), 2**70).map(str), st.floats().map(repr))


@functools.cache
def dumped(name: str) -> dict[str, Any]:
    """Return the values of a shipped recipe."""
    return load_recipe(name).model_dump(mode="json")


@functools.cache
def keys_of(name: str) -> tuple[str, ...]:
    """Return the dotted keys of a shipped recipe."""
    return tuple(known_keys(type(load_recipe(name))))


@dataclass(frozen=True)
class OverrideInput:
    """A shipped recipe and overrides as (key, value)."""

    recipe: str
    overrides: tuple[tuple[str, str], ...]
    by_command: bool


@st.composite
def overrides(draw: st.DrawFn) -> OverrideInput:
    recipe = draw(st.sampled_from(RECIPES))
    known = st.sampled_from(keys_of(recipe))
    odd = st.one_of(
        known.map(lambda key: key[:-1]),
        known.map(lambda key: f"{key}.x"),
        known.map(str.upper),
        known.map(lambda key: f" {key}"),
        known.map(lambda key: key.replace(".", "..", 1)),
        texts(),
    )
    found = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        key = draw(mostly(known, odd, 12))
        found.append((key, draw(mostly(fitting(recipe, key), VALUE, 4))))
    return OverrideInput(recipe, tuple(found), draw(rarely(30)))


NUMBERS = (
    *("0", "1", "2", "4", "8", "0.5", "1.0", "1e-4", "1e5", "+3", "010", "0o10", "0x10", "1_000", "1:30", ".5", "5."),
    *("8.0"),
)
FLAGS = ("true", "false", "True", "yes", "no", "on", "off", "y", "n", "0", "1", "null")


def fitting(recipe: str, key: str) -> st.SearchStrategy[str]:
    """Return values of the type that the key has in the recipe."""
    value = nested(dumped(recipe), key)
    if isinstance(value, bool):
        return st.sampled_from(FLAGS)
    if isinstance(value, int | float):
        return st.sampled_from(NUMBERS)
    if isinstance(value, str):
        return st.one_of(st.just(value), st.sampled_from([*FLAGS, *NUMBERS, "x", "é", "2024-01-01", "a b", "12:30:45"]))
    others = st.sampled_from(["null", "~", "", "[]", "{}", "x", "no", *NUMBERS])
    if value is MISSING:
        return others
    return st.one_of(others, st.just(yaml.safe_dump(value, default_flow_style=True).partition("\n...")[0].strip()))


def core_schema(text: str) -> Any:
    """Return the value of a plain scalar by the core schema of YAML 1.2 (section 10.3.2)."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"0o[0-7]+", text):
        return int(text[2:], 8)
    if re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return int(text[2:], 16)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text, re.ASCII):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)", text):
        return math.copysign(math.inf, -1 if text[0] == "-" else 1)
    return math.nan if text in (".nan", ".NaN", ".NAN") else text


def is_plain(text: str) -> bool:
    """Return whether a text is one plain scalar: no quotes, comments, collections, tags or anchors."""
    return bool(re.fullmatch(r"[\w.+~:/-]*( [\w.+~/-]+)*", text)) and ": " not in text and not text.startswith("- ")


def nested(tree: Any, key: str) -> Any:
    """Return the value of a dotted key, or MISSING."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return MISSING
        tree = tree[part]
    return tree


def check_overrides(case: OverrideInput, folder: Path) -> bool:
    """Read a recipe with overrides, compare the values with YAML 1.2, and read the dumped recipe again."""
    arguments = [f"{key}={value}" for key, value in case.overrides]
    if case.by_command:
        (folder / "file").touch()  # an output that no run can have, so that nothing is trained
        return command("train", case.recipe, *arguments, f"output={folder / 'file'}").accepted
    outcome = attempt(lambda: load_recipe(case.recipe, arguments))
    if not outcome.accepted:
        names = [key.split(".")[0].strip() or "override" for key, _ in case.overrides]
        words = (*names, "override", "method.", "stages", "recipe")
        require(any(word in outcome.sentence for word in words), "the message does not name the key", outcome.sentence)
        return False
    recipe = outcome.value
    same_again(recipe)
    last = dict(case.overrides)
    for key, text in last.items():
        later = [other for other in last if other != key and (other.startswith(key) or key.startswith(other))]
        if later or not is_plain(text):
            continue
        compare(nested(recipe.model_dump(mode="json"), key), text.strip(), key)
    return True


def compare(found: Any, text: str, key: str) -> None:
    """Raise Wrong unless a value of a recipe is what YAML 1.2 reads."""
    if found is MISSING:
        raise Wrong("a key was accepted that the recipe does not have", key)
    if isinstance(found, list | dict):
        return
    expected = core_schema(text)
    if isinstance(found, bool):
        words = {"true": True, "yes": True, "on": True, "y": True, "t": True, "1": True, "1.0": True}
        words |= {"false": False, "no": False, "off": False, "n": False, "f": False, "0": False, "0.0": False}
        same = expected is found or words.get(text.lower()) is found or (expected == found and expected is not None)
    elif isinstance(found, str):
        home = str(Path.home())
        same = found == text or found == str(expected) or found.replace("-", "_") == text.replace("-", "_")
        same = same or (text.startswith("~") and found == text.replace("~", home, 1))
    elif isinstance(found, int | float):
        if isinstance(expected, str) and re.fullmatch(r"\d+(_\d+)+", text, re.ASCII):
            expected = int(text)  # YAML 1.2 has no underscores in numbers, but they leave no doubt
        same = not isinstance(expected, str | None) and float(expected) == float(found)
    else:
        same = found is expected
    if not same:
        raise Wrong(f"{text!r} was read as another value", f"{key}: {found!r}")


def same_again(recipe: BaseRecipe) -> None:
    """Raise Wrong unless the dumped recipe is read as the same recipe."""
    text = dump_recipe(recipe)
    again = attempt(lambda: validate(yaml.safe_load(text), "the dumped recipe", type(recipe)))
    require(again.accepted, "a dumped recipe is refused", again.sentence)
    require(again.value == recipe, "a dumped recipe is read as another one")


OVERRIDES = Target(overrides(), check_overrides, 250)


@dataclass(frozen=True)
class RecipeFileInput:
    """A shipped recipe whose lines are changed, and damage to its bytes."""

    recipe: str
    edits: tuple[tuple[str, int, str], ...]
    mutations: tuple[Mutation, ...]


EDIT = st.tuples(
    st.sampled_from(["delete", "double", "indent", "dedent", "value", "insert", "tab"]), st.integers(0, 200), VALUE
)
FILES = st.builds(
    RecipeFileInput,
    st.sampled_from(RECIPES),
    st.lists(EDIT, max_size=2).map(tuple),
    DAMAGE,
)
BOMB = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else '0'}]\n" for i in range(9))


def check_file(case: RecipeFileInput, folder: Path) -> bool:
    """Read a changed recipe file; if it is accepted, no key is repeated and it is read again as the same."""
    lines = recipe_text(case.recipe)[0].splitlines()
    for kind, number, value in case.edits:
        at = number % len(lines) if lines else 0
        line = lines[at] if lines else ""
        if kind == "delete":
            del lines[at : at + 1]
        elif kind == "double":
            lines.insert(at, line)
        elif kind == "insert":
            lines.insert(at, BOMB if value == "x" else value)
        elif lines:
            key, colon, _ = line.partition(":")
            changed = {"indent": f"  {line}", "dedent": line[2:], "tab": f"\t{line}", "value": f"{key}{colon} {value}"}
            lines[at] = changed[kind]
    path = folder / "r.yaml"
    path.write_bytes(mutate(("\n".join(lines) + "\n").encode(errors="surrogatepass"), case.mutations))
    outcome = attempt(lambda: load_recipe(str(path)), place=path.name)
    if not outcome.accepted:
        return False
    require(type(outcome.value) in TASKS.values(), "the recipe has no task")
    same_again(outcome.value)
    repeated = repeated_key(yaml.compose(path.read_text("utf-8"), yaml.SafeLoader))
    require(repeated is None, "a repeated key was read", repeated)
    return True


def repeated_key(node: yaml.Node | None) -> str | None:
    """Return a key that a mapping of a YAML document has twice, or None."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        return twice or next((found for _, value in node.value if (found := repeated_key(value))), None)
    if isinstance(node, yaml.SequenceNode):
        return next((found for value in node.value if (found := repeated_key(value))), None)
    return None


FILE = Target(FILES, check_file, 300)

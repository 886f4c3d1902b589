"""The section of a report that says what a run was: data, seeds, machine, versions, recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from preceptor.config import BaseRecipe
from preceptor.report import words
from preceptor.report.contents import RunRecord, get_nested
from preceptor.report.markup import escape

HIDDEN = "(local path, not shown)"


def heading(run: RunRecord, title: str, recipe: BaseRecipe | None, unit: str = "") -> str:
    """Return the title of a page over what the data are; `unit` is what its splits are counts of."""
    sizes = run.first("data") or {}
    facts = [" / ".join(escape(sizes[key]) for key in ("name", "variant") if sizes.get(key))]
    counted = [split for split in ("train", "validation", "test") if sizes.get(split)]
    facts += [f"{sizes[split]:,} {split}{unit}".replace(",", words.SPACE) for split in counted]
    about = getattr(recipe, "description", "")
    described = f'<p class="described">{escape(about)}</p>' if about else ""
    return f'<h1>{escape(title)}</h1>{described}<p class="facts">{" · ".join(fact for fact in facts if fact)}</p>'


def record(run: RunRecord, recipe: BaseRecipe | None, rows: str = "rows", more: Mapping[str, Any] | None = None) -> str:
    """Return the facts of a run and its recipe without local paths.

    `rows` is what the data's fingerprint is of, `more` are facts that go behind it.
    """
    facts: dict[str, Any] = {}
    if fingerprint := run.first("data", "sha256"):
        facts[f"Data (SHA-256 of the {rows})"] = fingerprint
    facts |= more or {}
    seeds = {stage.title: get_nested(stage.results, "seed") for stage in run.stages}
    if named := [f"{title} {seed}" for title, seed in seeds.items() if seed is not None]:
        facts["Seeds"] = ", ".join(named)
    if machine := run.first("machine"):
        facts["Machine"] = ", ".join(f"{key} {value}" for key, value in machine.items())
    seconds = [get_nested(stage.results, "training", "seconds") for stage in run.stages]
    if any(value is not None for value in seconds):
        facts["Training time, all models"] = words.duration(sum(value or 0 for value in seconds))
    if versions := get_nested(run.results, "versions") or run.first("versions"):
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    for stage in run.stages:
        if skipped := get_nested(stage.results, "training", "skipped"):
            facts[f"{rows.capitalize()} left out, {stage.title}"] = ", ".join(map(str, skipped))
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    found = f'<dl class="facts-list">{listed}</dl>' if listed else ""
    if recipe is not None:
        text = yaml.safe_dump(without_paths(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
        found += f'<details><summary>Recipe</summary><pre tabindex="0">{escape(text)}</pre></details>'
    return found


def without_paths(value: Any, key: str = "") -> Any:
    """Return a recipe with every path on this machine replaced: a page is passed on, and paths may name people."""
    if isinstance(value, dict):
        return {name: without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, key) for inner in value]
    names_path = key in ("output", "root", "cache", "runs", "init", "split_file", "teaching_run")
    if isinstance(value, str) and (names_path or value.startswith((".", "/", "~", "\\")) or value[1:3] == ":\\"):
        return HIDDEN
    return value

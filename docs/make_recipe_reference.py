"""Generate docs/reference/recipe*.md from the pydantic models of the recipes.

    python docs/make_recipe_reference.py

The meaning of a key is the docstring under its field. A test checks that the committed pages are up to date.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from preceptor.tasks import TASKS

PAGES = {
    task: Path(__file__).parent / "reference" / name
    for task, name in (("vqa", "recipe.md"), ("segmentation", "recipe-lckd.md"), ("grounding", "recipe-clinkd.md"))
}

HEADS = {
    "vqa": """\
# Recipe keys: visual question answering

Every key of a recipe with `task: vqa`: type, default and meaning. Other tasks have other keys:
[segmentation](recipe-lckd.md), [grounding](recipe-clinkd.md). `python docs/make_recipe_reference.py` generates this
page; do not edit it by hand.

A recipe is a YAML 1.2 file with these keys: `no`, `on`, `010` and `1:30` are texts, not false, true, 8 and 90 as in
YAML 1.1. On the command line, a key is written with dots, `key.sub=value`, and its value is YAML: `true`, `3`, `null`,
`[1, 2]`. Quote values with brackets, because shells interpret them. A later override wins. An unknown key is an error
that names the nearest known one.

The defaults apply if a recipe omits the key. The shipped recipes set many keys; `preceptor recipes show mhkd-vqa-rad`
prints one. The `recipe.yaml` of a finished run contains every key with the value that was used.

`teacher.model` and `teacher.train` have the same keys and defaults as `student.model` and `student.train`. See also
[MHKD](../explanation/mhkd.md) and [Use your own data](../tutorials/your-own-data.md).
""",
    "segmentation": """\
# Recipe keys: segmentation

Every key of a recipe with `task: segmentation`. [Recipe keys: visual question answering](recipe.md) explains how
recipes and overrides are written. `python docs/make_recipe_reference.py` generates this page; do not edit it by hand.

See also [LCKD](../explanation/lckd.md) and [Segment volumes with missing modalities](../how-to/volumes.md).
""",
    "grounding": """\
# Recipe keys: grounding

Every key of a recipe with `task: grounding`. [Recipe keys: visual question answering](recipe.md) explains how recipes
and overrides are written. `python docs/make_recipe_reference.py` generates this page; do not edit it by hand.

`teacher.model` and `teacher.train` have the same keys and defaults as `student.model` and `student.train`. See also
[ClinKD](../explanation/clinkd.md) and [Collect pseudo-labels from a strong model](../how-to/teach.md).
""",
}

TITLES = {
    "data": "Data",
    "data.augment": "Augmentation",
    "data.phantom": "Generated data",
    "teacher": "Teacher",
    "student.model": "Student model",
    "student.model.vision": "Vision backbone",
    "student.model.vision.conv": "Vision backbone from scratch",
    "student.model.text": "Text encoder",
    "student.model.text.scratch": "Text encoder from scratch",
    "student.model.new": "New model",
    "student.model.lora": "Adapters",
    "student.train": "Training",
    "model": "Network",
    "train": "Training",
    "method": "Method",
    "method.teaching": "Teacher signal",
    "method.label": "Label term",
    "method.output": "Output term",
    "method.embedding": "Embedding term",
    "method.hidden": "Hidden term",
    "method.attention": "Attention term",
    "method.relation": "Relation term",
    "method.losses": "Your own loss terms",
    "method.cross_modal": "Distillation between modalities",
    "method.full": "Full-modality teacher",
    "method.pairs": "Weighted pairs of modalities",
    "method.importance": "Importance of the modalities",
    "method.modality_dropout": "Modality dropout",
    "method.election": "Election",
    "method.loss": "Segmentation loss",
    "method.guidance": "Guided positions",
    "method.pseudo_labels": "Pseudo-labels",
    "method.pseudo_labels.curriculum": "Curriculum",
    "method.reflection": "Reflection",
    "method.selection": "Selective generation",
    "evaluation": "Evaluation",
    "answers": "Answers",
    "report": "Report",
}

TWINS = ("teacher.model", "teacher.train")
"""Sections that are described by those of the student."""


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes of a key that holds other keys: one, or one per member of a union; none for a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str, FieldInfo]]:
    """Yield (dotted key, class, name, field) of every key that holds a value."""
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        for section in sections:
            yield from leaves(section, f"{prefix}{name}.")
        if not sections:
            yield prefix + name, model, name, field


def meaning(model: type[BaseModel], name: str) -> str:
    """Return the docstring of a field, which may be that of a base class. Raises KeyError if there is none."""
    for base in model.__mro__:
        field = base.model_fields.get(name) if issubclass(base, BaseModel) and base is not BaseModel else None
        if field is not None and field.description:
            return " ".join(field.description.split())
    raise KeyError(f"{model.__name__}.{name} has no docstring")


def kind(annotation: Any, limits: list[Any] | None = None) -> str:
    """Return a type as text."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, types.UnionType) or origin is Union:
        return " or ".join(kind(part, limits) for part in parts)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin is Annotated:
        inner = [limit for found in annotation.__metadata__ for limit in getattr(found, "metadata", [found])]
        return kind(annotation.__origin__, inner)
    if origin is list or (origin is tuple and Ellipsis in parts):
        return f"list of {kind(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(kind(part) for part in parts)}]"
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping of names to {kind(parts[1])}"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return words[annotation] + (_limits(limits or []) if annotation in (int, float) else "")


def _limits(limits: list[Any]) -> str:
    signs = {Gt: ("gt", "> "), Ge: ("ge", "≥ "), Lt: ("lt", "< "), Le: ("le", "≤ ")}
    known = [limit for limit in limits if type(limit) in signs]
    found = [f"{signs[type(limit)][1]}{getattr(limit, signs[type(limit)][0])}" for limit in known]
    return " " + ", ".join(found) if found else ""


def shown(value: Any) -> str:
    """Return a default as YAML."""
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{value}`" if value != "" else "empty"


def make_page(task: str) -> str:
    """Return the page of a task. Asserts that the defaults of both models are equal if one table describes them."""
    stages = {"stages": ("baseline",)} if task == "grounding" else {}
    defaults = TASKS[task].model_validate({"task": task, "name": "x", **stages})
    for twin in TWINS:
        if hasattr(defaults, "teacher"):
            name = twin.rpartition(".")[2]
            assert getattr(defaults.teacher, name) == getattr(defaults.student, name), twin
    return HEADS[task] + "".join(_tables(type(defaults), defaults, "", "Top level", set()))


def _tables(model: type[BaseModel], values: BaseModel | None, prefix: str, title: str, done: set[str]) -> Iterator[str]:
    """Yield the table of a section, then those of its subsections. Keys in `done`, of another method, are skipped."""
    fields = model.model_fields.items()
    rows = [(name, field) for name, field in fields if not sections_of(field.annotation)]
    rows = [
        (name, field) for name, field in rows if f"{prefix}{name}" not in done or f"{prefix}{name}" == "method.name"
    ]
    done.update(f"{prefix}{name}" for name, _ in rows)
    if rows:
        yield f"\n## {title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in rows:
        default = "required" if field.is_required() else shown(getattr(values, name) if values else field.default)
        cells = [f"`{prefix}{name}`", kind(field.annotation, field.metadata), default, meaning(model, name)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    for name, field in fields:
        key, sections = f"{prefix}{name}", sections_of(field.annotation)
        for section in sections if key not in TWINS else ():
            inner = getattr(values, name, None)
            if not isinstance(inner, section):
                inner = None if any(field.is_required() for field in section.model_fields.values()) else section()
            method = f" `{section.model_fields['name'].default}`" if len(sections) > 1 else ""
            yield from _tables(section, inner, f"{key}.", TITLES.get(key, key) + method, done)


if __name__ == "__main__":
    for task, path in PAGES.items():
        path.write_text(make_page(task), "utf-8")

"""Generate docs/reference/recipe.md, recipe-lckd.md and recipe-clinkd.md from the pydantic models of the recipes.

    python docs/make_recipe_reference.py

The meaning of a key is the docstring under its field, or its entry in MEANINGS if the field has none. A test checks
that the committed pages are up to date.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from preceptor.grounding import config as config_vlm
from preceptor.segmentation import config as config_volumes
from preceptor.segmentation.kd import KdConfig as SegmentationKd
from preceptor.segmentation.kd import OutputTerm as SegmentationOutputTerm
from preceptor.vqa import config
from preceptor.vqa.kd import KdConfig as VqaKd

PAGE = Path(__file__).parent / "reference" / "recipe.md"
LCKD_PAGE = PAGE.with_name("recipe-lckd.md")
CLINKD_PAGE = PAGE.with_name("recipe-clinkd.md")

MEANINGS = {
    "BaseRecipe.seed": (
        "Seed of the initial weights, the order of samples, dropout and unlimited augmentation. All students start "
        "from it; teacher number k (from 0) starts from `seed + 1000 k`."
    ),
    "BaseRecipe.trust_remote_code": (
        "Let transformers run Python code that comes with a pretrained model. Leave it off unless you have read it."
    ),
    "DataConfig.name": (
        "Data set: generated `phantom` images, your own `table`, or one of the "
        "[public data sets](../how-to/datasets.md)."
    ),
    "DataConfig.validation_fraction": (
        "Share of the training rows that is cut off for validation, by whole groups, if the data set has no validation "
        "split."
    ),
    "DataConfig.image_size": "Side in pixels to which every image is resized; the aspect ratio is not preserved.",
    "DataConfig.max_question_tokens": "Longer questions are truncated.",
    "DataConfig.minimum_answer_count": "Training answers that occur less often do not become answer classes.",
    "DataConfig.normaliser": (
        "Normalizer of answers for classes and validation. Test scores use the normalizer of their protocol."
    ),
    "DataConfig.broken": (
        "`raise`: stop at the first broken image and name it. `skip`: skip and count its rows; in validation and test "
        "they count as wrong."
    ),
    "DataConfig.max_image_bytes": "A larger image file is refused before it is decoded.",
    "DataConfig.max_image_pixels": "An image with more pixels is refused before it is decoded.",
    "DataConfig.workers": "Loader processes per training process; 0: the process itself. The result is the same.",
    "AugmentConfig.enabled": "Whether training images are augmented.",
    "AugmentConfig.scale": "Largest change of size, as a fraction.",
    "AugmentConfig.contrast": "Largest change of contrast, as a fraction.",
    "AugmentConfig.brightness": "Largest change of brightness, as a fraction of the grey-value range.",
    "PhantomConfig.cases": "Number of generated cases, each a three-dimensional head or torso.",
    "PhantomConfig.images_per_case": "Images cut from each case.",
    "PhantomConfig.questions_per_image": "Maximum number of questions about each image.",
    "PhantomConfig.seed": "Seed of the generated data; separate from `seed`.",
    "ConvVisionConfig.channels": "Channels of each stage.",
    "ConvVisionConfig.blocks": "Residual blocks of each stage; as many entries as `channels`.",
    "ScratchTextConfig.embedding": "Width of the token embeddings.",
    "ScratchTextConfig.width": "Width of the layers.",
    "ScratchTextConfig.layers": "Number of layers.",
    "ScratchTextConfig.heads": "Attention heads per layer.",
    "ModelConfig.layers": "Number of fusion layers.",
    "ModelConfig.heads": "Attention heads per fusion layer; must divide `width`.",
    "ModelConfig.dropout": "Dropout of the fusion layers and of a text encoder from scratch.",
    "TrainConfig.epochs": "Passes over the training rows; may be a fraction.",
    "TrainConfig.optimizer": "`adamw`, or `sgd` with Nesterov momentum 0.99.",
    "TrainConfig.learning_rate": "Highest learning rate, reached after the warm-up.",
    "TrainConfig.weight_decay": "Weight decay of matrices; biases, norms and other vectors do not decay.",
    "TrainConfig.beta2": "AdamW's decay of the squared gradients; the first decay is 0.9.",
    "TrainConfig.schedule": "Learning-rate schedule after the warm-up.",
    "TrainConfig.poly_power": "Exponent of `schedule: poly`.",
    "TrainConfig.clip_norm": "Maximum norm of the gradient over all trained parameters; null: no clipping.",
    "TrainConfig.keep_checkpoints": "Number of newest checkpoints to keep.",
    "TrainConfig.log_every": "Steps between lines of `metrics.jsonl`.",
    "TrainConfig.trackers": "Trackers that receive metrics in addition to `metrics.jsonl`; each needs its own package.",
    "TermConfig.weight": "Weight of the term in the loss; 0 disables it.",
    "TermConfig.end": "The term stops when this share of the training is done.",
    "LabelTerm.kind": "Cross-entropy over the classes, or binary cross-entropy per class.",
    "LabelTerm.label_smoothing": "Label smoothing of `ce`.",
    "OutputTerm.temperature": "Temperature T of both distributions; the term is scaled by T squared.",
    "EmbeddingTerm.kind": "Distance of projected student and teacher tokens: MSE after layer normalization, or cosine.",
    "HiddenTerm.kind": "Distance of projected student and teacher tokens: MSE after layer normalization, or cosine.",
    "HiddenTerm.layers": "Layer map: `uniform`, `last`, or pairs `[[student, teacher], ...]` counted from 0.",
    "AttentionTerm.kind": "Distance of attention maps: KL(teacher, student) per query, or MSE.",
    "AttentionTerm.layers": "Layer map: `uniform`, `last`, or pairs `[[student, teacher], ...]` counted from 0.",
    "TeachingConfig.ema_decay": "Decay of the moving average of `kind: ema`; smaller in the first steps.",
    "ReportConfig.questions": "Number of questions shown in the report, with image, answers and class activation maps.",
    "ReportConfig.latency_questions": "Number of test questions for the latency measurement.",
}

METHODS: dict[str, type[BaseModel]] = {
    "method[kd]": VqaKd,
    "method[kd of segmentation]": SegmentationKd,
    "method.output[kd of segmentation]": SegmentationOutputTerm,
}
"""Sections of methods other than the default one of a task."""

HEAD = """\
# Recipe keys: visual question answering

Every key of a recipe with `task: vqa`: type, default and meaning. Other tasks have other keys:
[segmentation](recipe-lckd.md), [grounding](recipe-clinkd.md). `python docs/make_recipe_reference.py` generates this
page; do not edit it by hand.

A recipe is a YAML file with these keys. On the command line, a key is written with dots, `key.sub=value`, and its value
is YAML: `true`, `3`, `null`, `[1, 2]`. Quote values with brackets, because shells interpret them. A later override
wins. An unknown key is an error that names the nearest known one.

The defaults apply if a recipe omits the key. The shipped recipes set many keys; `preceptor recipes show mhkd-vqa-rad`
prints one. The `recipe.yaml` of a finished run contains every key with the value that was used.
"""

SECTIONS = [
    ("", "Top level", ""),
    ("data", "Data", "See [Use your own data](../tutorials/your-own-data.md)."),
    ("data.augment", "Augmentation", ""),
    ("data.phantom", "Generated data", "For `data.name=phantom`."),
    ("teacher", "Teacher", ""),
    ("student.model", "Models", "`teacher.model` has the same keys with the same defaults."),
    ("student.model.vision", "Vision backbone", "The same under `teacher.model.vision`."),
    ("student.model.vision.conv", "Vision backbone from scratch", "The same under `teacher.model.vision.conv`."),
    ("student.model.text", "Text encoder", "The same under `teacher.model.text`."),
    ("student.model.text.scratch", "Text encoder from scratch", "The same under `teacher.model.text.scratch`."),
    ("student.train", "Training", "`teacher.train` has the same keys with the same defaults."),
    ("method", "Method", "See [MHKD](../explanation/mhkd.md)."),
    ("method.teaching", "Teacher signal", ""),
    (
        "method[kd]",
        "Method kd",
        "For `method.name=kd`; beside `teaching`, `label` and `losses`. Its weights replace those of `label`.",
    ),
    ("method.label", "Label term", ""),
    ("method.output", "Output term", ""),
    ("method.embedding", "Embedding term", ""),
    ("method.hidden", "Hidden term", ""),
    ("method.attention", "Attention term", ""),
    ("method.relation", "Relation term", ""),
    ("report", "Report", ""),
]

LCKD_HEAD = """\
# Recipe keys: segmentation

Every key of a recipe with `task: segmentation`. [Recipe keys: visual question answering](recipe.md) explains how
recipes and overrides are written. `python docs/make_recipe_reference.py` generates this page; do not edit it by hand.
"""

LCKD_SECTIONS = [
    ("", "Top level", ""),
    ("data", "Data", "See [Segment volumes with missing modalities](../how-to/volumes.md)."),
    ("data.phantom", "Generated data", "For `data.name=phantom`."),
    ("model", "Network", ""),
    ("train", "Training", ""),
    ("method", "Method", "See [LCKD](../explanation/lckd.md)."),
    ("method.cross_modal", "Distillation between modalities", ""),
    ("method.full", "Full-modality teacher", ""),
    ("method.dropping", "Dropped modalities", ""),
    ("method.election", "Election", ""),
    ("method.loss", "Segmentation loss", ""),
    (
        "method[kd of segmentation]",
        "Method kd",
        "For `method.name=kd`; beside `dropping`, `loss`, `losses` and `teaching_run`.",
    ),
    ("method.output[kd of segmentation]", "Output term of kd", ""),
    ("evaluation", "Evaluation", ""),
    ("report", "Report", ""),
]

CLINKD_HEAD = """\
# Recipe keys: grounding

Every key of a recipe with `task: grounding`. [Recipe keys: visual question answering](recipe.md) explains how recipes
and overrides are written. `python docs/make_recipe_reference.py` generates this page; do not edit it by hand.
"""

CLINKD_SECTIONS = [
    ("", "Top level", ""),
    ("data", "Data", ""),
    ("data.phantom", "Generated data", "For `data.name=phantom-grounding`."),
    ("student.model", "Models", "`teacher.model` has the same keys with the same defaults."),
    ("student.model.new", "A new model", "The same under `teacher.model.new`."),
    ("student.model.lora", "Adapters", "For `student.model.training=lora`; the same under `teacher.model.lora`."),
    ("student.train", "Training", "`teacher.train` has the same keys with the same defaults."),
    ("method", "Method", "See [ClinKD](../explanation/clinkd.md)."),
    ("method.guidance", "Guided positions", ""),
    ("method.pseudo_labels", "Pseudo-labels", "See [Collect pseudo-labels from a strong model](../how-to/teach.md)."),
    ("method.pseudo_labels.curriculum", "Curriculum", ""),
    ("method.reflection", "Reflection", ""),
    ("method.selection", "Selective generation", ""),
    ("answers", "Answers", ""),
    ("report", "Report", ""),
]


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def member_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the section of a key, or the sections of a union such as that of the methods; none for other keys."""
    return (
        [part for part in (annotation, *get_args(annotation)) if is_section(part)] if _only_sections(annotation) else []
    )


def _only_sections(annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return all(is_section(part) for part in get_args(annotation))
    return is_section(annotation)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str, FieldInfo]]:
    """Yield (dotted key, class, name, field) of every key that is not a section."""
    for name, field in model.model_fields.items():
        for section in member_sections(field.annotation):
            yield from leaves(section, f"{prefix}{name}.")
        if not member_sections(field.annotation):
            yield prefix + name, model, name, field


def meaning(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Return the meaning of a key. Raises KeyError if neither the field nor MEANINGS has one."""
    for base in model.__mro__:
        inherited = base.model_fields.get(name) if is_section(base) else None
        if inherited is not None and inherited.description:
            return " ".join(inherited.description.split())
    places = (f"{base.__name__}.{name}" for base in model.__mro__)
    return MEANINGS[next((place for place in places if place in MEANINGS), f"{model.__name__}.{name}")]


def kind(annotation: Any, limits: list[Any] | None = None) -> str:
    """Return a type as text."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return " or ".join(kind(part, limits) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        inner = [limit for found in annotation.__metadata__ for limit in getattr(found, "metadata", [found])]
        return kind(annotation.__origin__, inner)
    if get_origin(annotation) is list:
        return f"list of {kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping of names to " + kind(get_args(annotation)[1])
    if get_origin(annotation) is tuple and Ellipsis in get_args(annotation):
        return f"list of {kind(get_args(annotation)[0])}"
    if get_origin(annotation) is tuple:
        return f"[{', '.join(kind(part) for part in get_args(annotation))}]"
    if is_section(annotation):
        return "sections"
    words = {Any: "any value", str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return words[annotation] + ("" if annotation in (Any, str, bool, type(None)) else _limits(limits or []))


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


def make_page() -> str:
    """Return the page of VQA recipes. Asserts that both models share their defaults."""
    defaults = config.VqaRecipe(name="x")
    text, placed = _tables(defaults, SECTIONS)
    assert defaults.teacher.model == defaults.student.model, "teacher.model and student.model have one table"
    assert defaults.teacher.train == defaults.student.train, "teacher.train and student.train have one table"
    twins = [key.replace("student.", "teacher.", 1) for key in placed if key.startswith("student.")]
    missing = {key for key, *_ in leaves(config.VqaRecipe)} - {*placed, *twins}
    assert not missing, f"keys without a section: {sorted(missing)}"
    return HEAD + text


def make_lckd_page() -> str:
    """Return the page of segmentation recipes. Asserts that every key has a section."""
    text, placed = _tables(config_volumes.SegmentationRecipe(name="x"), LCKD_SECTIONS)
    missing = {key for key, *_ in leaves(config_volumes.SegmentationRecipe)} - set(placed)
    assert not missing, f"keys without a section: {sorted(missing)}"
    return LCKD_HEAD + text


def make_clinkd_page() -> str:
    """Return the page of grounding recipes. Asserts that every key has a section."""
    defaults = config_vlm.GroundingRecipe(name="x", stages=("baseline",))
    text, placed = _tables(defaults, CLINKD_SECTIONS)
    assert defaults.teacher == defaults.student, "teacher and student have one table"
    twins = [key.replace("student.", "teacher.", 1) for key in placed if key.startswith("student.")]
    missing = {key for key, *_ in leaves(config_vlm.GroundingRecipe)} - {*placed, *twins}
    assert not missing, f"keys without a section: {sorted(missing)}"
    return CLINKD_HEAD + text


def _tables(defaults: BaseModel, sections: list[tuple[str, str, str]]) -> tuple[str, list[str]]:
    """Return the tables of the sections and their keys."""
    parts, placed = [], []
    for prefix, title, about in sections:
        model, values = _at(prefix, defaults)
        parts.append(f"\n## {title}\n\n{about}\n" if about else f"\n## {title}\n")
        parts.append("\n| key | type | default | meaning |\n|---|---|---|---|\n")
        for name, field in model.model_fields.items():
            if member_sections(field.annotation) or (
                prefix.startswith("method[") and name not in model.__annotations__
            ):
                continue
            key = f"{prefix.partition('[')[0]}.{name}" if prefix else name
            placed.append(key)
            required = field.is_required()
            default = "required" if required else shown(getattr(values, name))
            row = [f"`{key}`", kind(field.annotation, field.metadata), default, meaning(model, name, field)]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n")
    return "".join(parts), placed


def _at(prefix: str, defaults: BaseModel) -> tuple[type[BaseModel], BaseModel]:
    """Return the class of a section and its values in a default recipe."""
    if prefix in METHODS:
        return METHODS[prefix], METHODS[prefix]()
    values: BaseModel = defaults
    for name in filter(None, prefix.split(".")):
        values = getattr(values, name)
    return type(values), values


if __name__ == "__main__":
    PAGE.write_text(make_page(), "utf-8")
    LCKD_PAGE.write_text(make_lckd_page(), "utf-8")
    CLINKD_PAGE.write_text(make_clinkd_page(), "utf-8")

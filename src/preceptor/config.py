"""What every recipe has, whatever its task: sections, training settings, the run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from preceptor.errors import UserError
from preceptor.extension import Reference, load_object, reference_to
from preceptor.strict_yaml import Number

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _expand_folder(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    return os.path.expanduser(path)  # a shell does not expand the ~ of `key=~/folder`


Folder = Annotated[str, AfterValidator(_expand_folder)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_ambiguous(cls, values: Any) -> Any:
        """Let no text or truth value stand for a number: ``010``, ``1_000`` and ``1:30`` can be read in several ways.

        A number that stands for a text keeps its digits (``1.10``, ``1e5``).
        """
        if not isinstance(values, dict):
            return values
        checked = dict(values)
        for name in cls.model_fields.keys() & values.keys():
            types, value = _leaf_types(cls.model_fields[name].annotation), values[name]
            if isinstance(value, list | tuple):
                checked[name] = type(value)(_resolve(item, types) for item in value)
            else:
                checked[name] = _resolve(value, types)
        return checked

    def unused_setting(self) -> str:
        """Return which setting of this section has no effect and the fix, or "".

        It is not a validator: recipe.yaml of a run of an earlier version may contain such a setting, and the run is
        still evaluated, compared and resumed.
        """
        return ""


def require_used_settings(section: Section, place: str = "") -> None:
    """Raise UserError if a section, or one inside it, has a setting without an effect. `place`: its dotted key."""
    if sentence := section.unused_setting():
        raise UserError(f"{place}: {sentence}")
    for key, value in section:
        if isinstance(value, Section):
            require_used_settings(value, f"{place}.{key}".removeprefix("."))


class _Refused:
    """A value that no type accepts. The error shows it as it was given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _resolve(value: Any, types: set[Any]) -> Any:
    if isinstance(value, Number):
        return value.text if types == {str} else float(value)
    return _Refused(value) if isinstance(value, bool | str) and types and types <= {int, float} else value


def _leaf_types(annotation: Any) -> set[Any]:
    """Return the types in an annotation without containers, None and the metadata of `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _leaf_types(get_args(annotation)[0])
    if arguments := get_args(annotation):
        return set().union(*map(_leaf_types, arguments))
    return set() if annotation in (None, type(None), ...) else {annotation}


class PhantomConfig(Section):
    cases: Annotated[int, Field(ge=8)] = 100
    """Number of generated cases, each a three-dimensional head or torso."""
    images_per_case: Positive = 4
    """Images cut from each case."""
    questions_per_image: Positive = 5
    """Maximum number of questions about each image."""
    seed: Seed = 0
    """Seed of the generated data; separate from `seed`."""


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] = 20
    """Passes over the training rows; may be a fraction."""
    batch_size: Positive = 32
    """Samples per optimizer step, over all micro-batches and processes."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step and process."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`adamw`, or `sgd` with Nesterov momentum 0.99."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Highest learning rate, reached after the warm-up."""
    pretrained_lr_scale: Annotated[float, Field(ge=0)] = 0.1
    """Factor on the learning rate of pretrained weights; 0 freezes them."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    """Weight decay of matrices; biases, norms and other vectors do not decay."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """AdamW's decay of the squared gradients; the first decay is 0.9."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: Fraction = 0.1
    """Fraction of the steps over which the learning rate rises."""
    poly_power: Annotated[float, Field(gt=0)] = 0.9
    """Exponent of `schedule: poly`."""
    poly_restart: Fraction = 0.0
    """With `schedule: poly`, fraction of the training after which the rate has decayed to 0 a first time. It continues
    with the value that it has without a restart, as in the two phases of the published LCKD code."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Maximum norm of the gradient over all trained parameters; null: no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights; above 0, the average is validated and kept."""
    select: Literal["best", "last"] = "best"
    """Weights to keep: those of the best validation, or those of the last step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 if the processor supports it, else fp32."""
    evaluate_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between validations."""
    patience: Positive | None = None
    """Number of validations without improvement after which the training stops (with `select: best`)."""
    checkpoint_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between checkpoints of the training state."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints to keep."""
    log_every: Positive = 10
    """Steps between lines of `metrics.jsonl`."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = []
    """Trackers that receive metrics in addition to `metrics.jsonl`; each needs its own package."""

    @model_validator(mode="after")
    def _validate_patience(self) -> TrainConfig:
        if self.select == "last" and self.patience:
            raise ValueError(
                "select=last keeps the last step, so there is nothing for patience to wait for: set one of them"
            )
        return self


class TermConfig(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the term in the loss; 0 disables it."""
    start: Fraction = 0.0
    """Fraction of the training after which the term begins."""
    ramp: Fraction = 0.0
    """Further fraction of the training over which its weight rises linearly from 0."""
    end: Fraction = 1.0
    """Fraction of the training after which it ends."""


class OwnLossConfig(TermConfig):
    """A loss term of your own, added to those of the method."""

    loss: Reference
    """`module:Class`: a subclass of `preceptor.distill.LossTerm`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the class."""
    weight: Annotated[float, Field(ge=0)] = 1.0


class MethodConfig(Section):
    """The keys that all methods share."""

    name: str
    """The method, or `module:Class` of your own one."""
    losses: list[OwnLossConfig] = []
    """Loss terms of your own, added to those of the method in the stages that distil."""


def choose_method(
    value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo, *, default: str, base: type
) -> Any:
    """Validate the section `method` of a recipe: without a name it is `default`; ``module:Class`` is the user's own."""
    if isinstance(value, base) and ":" in getattr(value, "name", ""):
        return value
    if isinstance(value, dict):
        value = {"name": default, **value}
        name = value["name"]
        if isinstance(name, type):
            name = value["name"] = reference_to(name)
        if isinstance(name, str) and ":" in name:
            kind: Any = load_object(name, "method.name", base, (info.context or {}).get("folder"))
            try:
                return kind.model_validate(value, context=info.context)
            except ValidationError as error:
                details = [f"method.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
                raise ValueError("; ".join(details)) from error
    return handler(value)


class BaseRecipe(Section):
    """The keys that recipes of all tasks share. A task's recipe adds `task`, `data`, `method` and its models."""

    task: str
    """What is learned: vqa (questions about images), segmentation (volumes), grounding (dialogues with boxes)."""
    name: str
    """Name of the recipe. `output` may use it as `{name}`."""
    description: str = ""
    """One line. `preceptor recipes` and the report show it."""
    output: Folder = "runs/{name}"
    """Run folder. If it exists, training resumes."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the samples and all other random numbers of the training."""
    stages: tuple[str, ...]
    """The models to train, in this order."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: resume from the newest valid checkpoint. `never`: delete the earlier results of the stages first."""
    allow_downloads: bool = False
    """Allow models to be downloaded from a hub. Otherwise nothing is downloaded. This key has no effect on trackers
    with a server, `teach --endpoint`, `serve` and `preceptor.push_to_hub`, which use the network in any case."""
    data: Any
    """Which data are read, and how."""
    method: Any
    """What the student learns from. `method.name` chooses the method."""

    @property
    def output_folder(self) -> Path:
        return Path(self.output.replace("{name}", self.name))

    def require_teacher_cache(self) -> None:
        """Raise UserError if the recipe has no teacher whose output can be cached."""
        raise UserError(f"a {self.task} recipe with method {self.method.name} has no teacher cache")

    @model_validator(mode="after")
    def _stages_are_distinct(self) -> Self:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ValueError("stages must name at least one stage, each once")
        return self

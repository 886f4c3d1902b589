"""What every recipe has, whatever its task: sections, training settings, the run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Folder = Annotated[str, AfterValidator(os.path.expanduser)]  # a shell does not expand the ~ of `key=~/folder`


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )


class PhantomConfig(Section):
    cases: Annotated[int, Field(ge=8)] = 100
    images_per_case: Positive = 4
    questions_per_image: Positive = 5
    seed: Seed = 0


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] = 20
    batch_size: Positive = 32
    """Samples per optimiser step, over all micro-batches and processes."""
    accumulation: Positive = 1
    """Micro-batches per optimiser step and process."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    pretrained_scale: Annotated[float, Field(ge=0)] = 0.1
    """Factor on the learning rate of weights that came pretrained; 0 freezes them."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.98
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    warmup: Fraction = 0.1
    """Share of the steps over which the learning rate rises."""
    poly_power: Annotated[float, Field(gt=0)] = 0.9
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights; above 0 it is the average that is validated and kept."""
    select: Literal["best", "last"] = "best"
    """Which weights are kept: those of the best validation, or those of the last step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor computes in it, else fp32."""
    evaluate_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between validations."""
    patience: Positive | None = None
    """Validations without a better one before the run stops early (with `select: best`)."""
    checkpoint_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between checkpoints of the training state."""
    keep_checkpoints: Positive = 2
    log_every: Positive = 10
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = []

    @model_validator(mode="after")
    def _stops(self) -> TrainConfig:
        if self.select == "last" and self.patience:
            raise ValueError(
                "select=last keeps the last step, so there is nothing for patience to wait for: set one of them"
            )
        return self


class TermConfig(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    start: Fraction = 0.0
    """The term enters when this share of the training is done ..."""
    ramp: Fraction = 0.0
    """... and reaches its weight over this further share."""
    end: Fraction = 1.0


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
    """Seed of the initial weights, the order of the samples and everything else that is drawn at random."""
    stages: tuple[str, ...]
    """The models to train, in this order."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: resume from the newest valid checkpoint. `never`: delete the earlier results of the stages first."""
    allow_downloads: bool = False
    """Whether a model may be downloaded from a hub. Without it the network is never used."""
    data: Any
    """Which data are read, and how."""
    method: Any
    """What the student learns from. `method.name` chooses the method."""

    @property
    def output_folder(self) -> Path:
        return Path(self.output.replace("{name}", self.name))

    @model_validator(mode="after")
    def _stages_are_distinct(self) -> Self:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ValueError("stages must name at least one stage, each once")
        return self

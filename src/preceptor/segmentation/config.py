"""Recipes of segmentation: volumes whose modalities may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, WrapValidator, model_validator

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
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.readers import SegmentationName
from preceptor.data.segmentation.named_splits import check_split_name
from preceptor.errors import UserError
from preceptor.extension import Reference
from preceptor.segmentation.kd import KdConfig
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.metakd import MetaKdConfig
from preceptor.segmentation.method import SegmentationMethod
from preceptor.segmentation.specialists import SpecialistsConfig

Sides = tuple[Positive, Positive, Positive]


class PhantomCasesConfig(Section):
    """Generated heads with lesions, one NIfTI file per contrast."""

    train: Positive = 60
    """Number of training cases."""
    validation: Positive = 20
    """Number of validation cases, which select the model and vote in elections."""
    test: Positive = 40
    """Number of test cases."""
    size: Annotated[int, Field(ge=32, le=256)] = 48
    """Side of the volumes in voxels."""
    missing: Annotated[float, Field(ge=0, le=0.75)] = 0.0
    """Share of the images that are left out, as in examinations without all contrasts."""
    seed: Seed = 0
    """Seed of the generated volumes; separate from `seed`."""


class VolumeDataConfig(Section):
    name: SegmentationName = "phantom"
    """phantom: generated volumes. brats: BraTS 2018 to 2023 or the brain tumours of the Medical Segmentation
    Decathlon, with modalities and regions as released. volumes: a table of paths (`cases.csv` or `cases.jsonl` in the
    folder, or `root`), a `dataset.json`, BIDS, or files `{case}_{modality}.nii.gz`, with your own `modalities` and
    `regions`. Or your own reader as `module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own reader."""
    root: Folder | None = None
    """Folder of the cases, or a table of their files."""
    modalities: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")
    """Inputs of the network, in this order. A case may lack some of them."""
    regions: dict[str, tuple[int, ...]] | None = None
    """Regions to segment: label values by name. Default: those of `dataset.json`; et, tc and wt for BraTS in its four
    contrasts, with label 4 or 3 as found in the label maps; or one region for a single label 1."""
    mask: str | None = None
    """Label maps: the end of their file names, such as `lesion_mask` for `CASE_lesion_mask.nii.gz`, or a column of the
    table. Default: `seg` in file names, and the column `mask`."""
    split: Annotated[str, AfterValidator(check_split_name)] | None = None
    """Name of a shipped split, such as `brats2020-219-50-100` (see how-to/volumes)."""
    split_file: Folder | None = None
    """JSON with train, validation and test; CSV with case, split and perhaps modalities; a folder with train.txt,
    val.txt and test.txt; or, with `fold`, splits_final.json of nnU-Net."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Fold of `folds`, or of the list in `split_file`, that is the test split."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds that the patients are divided into."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of all cases, by patient, for validation if the splits do not define it."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of all cases, by patient, for testing if no split or fold defines it."""
    split_seed: Seed = 0
    """Seed of the validation and test splits; separate from `seed`."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training cases, by patient, whose masks are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """rest: also use the cases that `train_share` leaves out, without their masks, and training cases that have no
    mask. A trained teacher, such as that of `method.full`, segments them from all modalities, as masks for the student
    that sees a subset. Without it, `method.cross_modal` with `levels: all` learns from them: the elected modalities
    teach the other ones that these cases have. So does `kd` with the teacher `self` or `ema`, from its logits."""
    spacing: tuple[PositiveNumber, PositiveNumber, PositiveNumber] | None = None
    """Voxel size in mm (from feet to head, front to back, side to side) to which cases are resampled; default: their
    own. Predictions are written on the source's grid."""
    patch_size: Sides = (48, 48, 48)
    """Size in voxels of a training crop and of a window in inference."""
    intensity: Literal["zscore", "histogram", "percentile"] = "zscore"
    """zscore: within the foreground. histogram: first clipped at the last bin of 50 voxels, as in the published code.
    percentile: first clipped to the 0.5th and 99.5th percentile."""
    augment: Literal["none", "light", "full"] = "light"
    """none; light: flips, brightness and contrast; full: turns, scale, noise, blur and more, as the published code."""
    foreground_probability: Fraction = 0.5
    """Share of the crops centred on a voxel of a region."""
    broken: Literal["raise", "skip"] = "raise"
    """raise: a broken case ends the training with its name. skip: it is left out of the training and counted; in
    validation and test its Dice is 0, and it has no vote in elections."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest share of the training cases that may be skipped."""
    max_voxels: Positive = MAX_VOXELS
    """A larger volume is refused before it is decoded."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of processes that read ahead."""
    phantom: PhantomCasesConfig = PhantomCasesConfig()


class UNetConfig(Section):
    net: Literal["compact", "reference", "early"] | Reference = "compact"
    """compact: residual U-Net levels. reference: the published network (3-D ResNet-50 with ASPP, 43.66 M). early: one
    residual U-Net of the levels of `compact` with the modalities and their availability as channels; a baseline, to
    which `encoder`, `fill` and `method.cross_modal` do not apply.
    `module:Class`: your own network (see `preceptor.segmentation.model.MultimodalUNet`)."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own network."""
    encoder: Literal["shared", "separate"] = "shared"
    """One encoder for all modalities (published code), or a separate one for each (published figure)."""
    norm_per_modality: bool = False
    """With `net: compact` and `encoder: shared`: each modality has its own scales and shifts of the encoder's instance
    normalisations, and shares all convolutions."""
    channels: tuple[Positive, ...] = (16, 32, 64, 128)
    """For `compact` and `early`: channels of each level, three to five."""
    fill: Literal["all_levels", "bottleneck"] = "all_levels"
    """Features of a missing modality that are replaced by the mean of the others. bottleneck: only the deepest; the
    skip connections are those of a zero image (published code)."""
    init: Folder | None = None
    """Run or model folder with the initial weights, for example to adapt a network to the images of another hospital.
    The network and its modalities must be the same. Outputs are copied for the regions that both have."""


class NetworkTrainConfig(TrainConfig):
    pretrained_lr_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the learning rate of the weights that come from `model.init`, or from the teacher with
    `method.initialise_from_teacher`; 0 freezes them. The outputs of regions that `model.init` lacks are not among them;
    the layer that has them trains with `learning_rate`."""


Method = Annotated[
    LckdConfig | KdConfig | SpecialistsConfig | MetaKdConfig,
    Field(discriminator="name"),
    WrapValidator(partial(choose_method, default="lckd", base=SegmentationMethod)),
]


class EvaluationConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Overlap of neighbouring windows, as a fraction of their side, in tests and predictions."""
    mode: Literal["constant", "gaussian"] = "gaussian"
    """Weights of overlapping windows: constant, or larger in the middle of a window (gaussian)."""
    validation_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Overlap of windows in validation and elections."""
    minimum_component: Fraction = 0.1
    """Post-processing: remove components of the whole lesion (all regions together, 18 neighbours) that are smaller
    than this fraction of the largest one ..."""
    minimum_component_voxels: Annotated[int, Field(ge=0)] = 2000
    """... unless they have at least this many voxels."""
    lowest_slices: Annotated[int, Field(ge=0)] = 0
    """Post-processing: remove components that lie within this many slices from the feet. The published code: 26, for
    BraTS volumes of 155 slices."""
    et_minimum: Annotated[int, Field(ge=0)] = 500
    """Post-processing: an enhancing tumour with fewer voxels becomes tumour core."""


class Preparation(Section):
    """How cases are prepared for a network; the keys are those of `VolumeDataConfig`."""

    spacing: tuple[PositiveNumber, PositiveNumber, PositiveNumber] | None
    intensity: Literal["zscore", "histogram", "percentile"]
    patch_size: Sides
    max_voxels: Positive = MAX_VOXELS


class InferenceData(Section):
    """The data that a network was trained with."""

    name: str = ""
    variant: str = ""
    validation: Annotated[int, Field(ge=0)]


class InferenceConfig(Section):
    """What prediction needs beside the weights, as `segmentation.json` of a model folder stores it."""

    regions: dict[str, Annotated[tuple[Annotated[int, Field(ge=1, le=255)], ...], Field(min_length=1)]]
    preparation: Preparation
    inference: EvaluationConfig
    data: InferenceData
    validation: dict[str, dict[str, Fraction]]
    """Mean Dice on the validation cases by modalities and region."""


class SegmentationReport(Section):
    cases: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of worst cases shown in the report."""


SegmentationStage = Literal["teacher", "baseline", "distilled"]
STAGE_KEYS = {
    "teacher": ("data.", "model.", "train.", "evaluation.", "method.loss."),
    "baseline": ("data.", "model.", "train.", "evaluation.", "method.loss.", "method.modality_dropout."),
}
"""Keys of the recipe, by prefix, that the model of a stage depends on; other stages depend on all."""


class SegmentationRecipe(BaseRecipe):
    task: Literal["segmentation"] = "segmentation"
    stages: tuple[SegmentationStage, ...] = ("baseline", "distilled")
    """teacher: a network that sees all modalities. baseline: the student without distillation. distilled: the student
    with the method. The validation score that selects the weights and that `train.patience` waits for is the mean Dice
    over all combinations of modalities; that of `teacher` is the mean Dice from all modalities of each case."""
    data: VolumeDataConfig = VolumeDataConfig()
    method: SerializeAsAny[Method] = LckdConfig()
    model: UNetConfig = UNetConfig()
    train: NetworkTrainConfig = NetworkTrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: SegmentationReport = SegmentationReport()

    @model_validator(mode="after")
    def _validate_stages_and_data(self) -> SegmentationRecipe:
        if len(set(self.data.modalities)) != len(self.data.modalities) or not self.data.modalities:
            raise ValueError(f"data.modalities {self.data.modalities} must name at least one modality, each once")
        self.method.check_modalities(self.data.modalities)
        teaching = self.method.teaching_stage
        needs_teacher = any(self.method.needs_teacher(stage) for stage in self.stages)
        before = self.stages[: self.stages.index("distilled")] if needs_teacher else ()
        if needs_teacher and teaching not in before and not self.method.teacher_runs():
            raise ValueError(f"the teacher needs the stage '{teaching}' before 'distilled', or method.teaching_run=RUN")
        if self.data.unlabelled == "rest" and "distilled" in self.stages and not self.method.learns_without_masks:
            raise ValueError(
                "data.unlabelled=rest needs something that teaches without masks: a full-modality teacher, which "
                "segments these cases (method.full.weight above 0, or method.name=kd), or other modalities at every "
                "level (method.cross_modal.levels=all and method.teachers single or multi, or in metakd "
                "method.pairs.levels=all)"
            )
        return self

    def require_distillation(self, modalities: Sequence[str]) -> None:
        """Raise UserError before a training if the stage `distilled` would be trained as the stage `baseline` is.

        It is not a validator, because finished runs of earlier versions have such a recipe and are still evaluated.
        """
        method = self.method
        draws_masks = self.data.unlabelled == "rest" and method.needs_teacher("distilled")
        if "distilled" not in self.stages or method.losses or method.starts_from_teacher or draws_masks:
            return
        if why := method.without_distillation(modalities):
            raise UserError(
                f"{why}, so the stage distilled would be trained as the baseline is; correct it, or set "
                "stages=[baseline]"
            )

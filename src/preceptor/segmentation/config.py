"""The recipe of a segmentation: volumes with modalities that may be missing, and LCKD's switches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from preceptor.config import (
    BaseRecipe,
    Folder,
    Fraction,
    Positive,
    PositiveNumber,
    Section,
    Seed,
    TermConfig,
    TrainConfig,
)

Sides = tuple[Positive, Positive, Positive]


class PhantomCasesConfig(Section):
    """Generated heads with lesions, one NIfTI file per contrast."""

    train: Positive = 60
    """Cases to train on."""
    validation: Positive = 20
    """Cases that choose the network, and vote."""
    test: Positive = 40
    """Cases that it is scored on."""
    size: Annotated[int, Field(ge=24, le=256)] = 48
    """Side of the volumes in voxels."""
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images that no case file has: examinations that never had all contrasts."""
    seed: Seed = 0
    """The same seed gives the same volumes."""


class VolumeDataConfig(Section):
    name: Literal["phantom", "brats", "volumes"] = "phantom"
    """phantom: generated. brats: BraTS 2018 to 2023 or the Medical Segmentation Decathlon's brain tumours, modalities
    and regions as released. volumes: a table of paths, or `{case}_{modality}.nii.gz`, with `modalities` and `regions`
    of your own."""
    root: Folder | None = None
    """Folder of the cases, or a table of their files."""
    modalities: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")
    """The network's inputs, in this order. A case may lack some."""
    regions: dict[str, tuple[int, ...]] | None = None
    """What is segmented: label values by name. Default: et, tc and wt of BraTS, with label 4 or 3 as it is found."""
    split_file: Folder | None = None
    """JSON of train, validation and test; CSV of case and split; or a folder of train.txt, val.txt and test.txt."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """With `folds`: which fold is the test split."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Folds that the patients are divided into."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of all cases, by patient, where no split gives a validation split."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of all cases, by patient, where no split or fold gives a test split."""
    split_seed: Seed = 0
    """Which patients validate and test; apart from `seed`."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training cases, by patient, whose masks are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """rest: what `train_share` leaves out is there without its masks, and so are training cases that have none. What
    the teacher of `method.full` segments from all modalities stands in for them, for a network that sees a subset."""
    spacing: tuple[PositiveNumber, PositiveNumber, PositiveNumber] | None = None
    """Voxel size in mm (from feet to head, front to back, side to side) that cases are resampled to; default: their
    own. Predictions are written on the source's grid."""
    patch_size: Sides = (48, 48, 48)
    """Voxels of a training crop and of a window of inference."""
    intensity: Literal["zscore", "histogram", "percentile"] = "zscore"
    """zscore: inside the foreground. histogram: clipped at the last bin of 50 voxels first, as the published code does.
    percentile: clipped to the 0.5th and 99.5th percentile first."""
    augment: Literal["none", "light", "full"] = "light"
    """none; light: flips, brightness and contrast; full: turns, scale, noise, blur and more, as the published code."""
    foreground_probability: Fraction = 0.5
    """Share of the crops centred on a voxel of a region."""
    broken: Literal["raise", "skip"] = "raise"
    """raise: a broken case ends the training with its name. skip: it is left out and counted."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest share of the training cases that may be skipped."""
    max_voxels: Positive = 512**3
    """A larger volume is refused before it is decoded."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that read ahead."""
    phantom: PhantomCasesConfig = PhantomCasesConfig()


class UNetConfig(Section):
    net: Literal["compact", "reference"] = "compact"
    """compact: residual U-Net levels. reference: the published network (3-D ResNet-50 with ASPP, 43.66 M)."""
    encoder: Literal["shared", "separate"] = "shared"
    """One encoder for all modalities (published code), or one for each (published figure)."""
    channels: tuple[Positive, ...] = (16, 32, 64, 128)
    """Of `compact`: one per level, three to five."""
    fill: Literal["all_levels", "bottleneck"] = "all_levels"
    """Which features of a missing modality are the mean of the others'. bottleneck: the skips are those of a zero image
    (published)."""


class DroppingConfig(Section):
    """Which modalities a training sample shows of those it has."""

    kind: Literal["subsets", "published", "none"] = "subsets"
    """subsets: uniform over all combinations, per sample. published: one to three of them, one draw per batch, so that
    all are never shown together. none: all."""
    start: Fraction = 0.0
    """Share of the training before which nothing is dropped."""
    ramp: Fraction = 0.0
    """Over this further share the probability of dropping rises to 1."""


class ElectionConfig(Section):
    every: Annotated[float, Field(gt=0)] = 5.0
    """Epochs between elections; the first is before the first step."""
    cases: Positive | None = None
    """At most so many validation cases vote."""
    initial: str | None = None
    """Modality that teaches until the first election, which is then after one `every` (the published code: flair)."""


class CrossModalTerm(TermConfig):
    """Distance between features of an elected teacher modality, detached, and those of the others."""

    weight: Annotated[float, Field(ge=0)] = 0.1
    distance: Literal["l1", "mse", "cosine"] = "l1"
    """Mean over channels and voxels; cosine: over voxels, of 1 - cos across channels."""
    levels: Literal["bottleneck", "all"] = "bottleneck"
    """Which features are compared: the deepest (published), or those of every level."""
    students: Literal["others", "all"] = "others"
    """Who learns: the modalities that are not elected, or every available one, other teachers too (published)."""
    pairs: Literal["mean", "sum"] = "mean"
    """Over pairs of teacher and student: their mean, or their sum (published)."""
    normalise: bool = False
    """Compare features of zero mean and unit variance over channels: their scale is then no matter."""
    projector: bool = False
    """Compare each student through a linear map of its own, trained with it and left out of what is saved: it need not
    become its teacher, but hold what tells of it."""


class FullTeacherTerm(TermConfig):
    """What a network that saw all modalities teaches the one that sees a subset, as mmFormer's peers do."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both probabilities; the term is scaled by T squared."""
    features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance between both networks' fused bottleneck features, relative to the output's."""


class SegmentationLoss(Section):
    dice: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft Dice loss."""
    bce: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the binary cross-entropy."""
    bce_reduction: Literal["mean", "sum"] = "mean"
    """Over the regions."""


class LckdConfig(Section):
    """LCKD (Wang et al., MICCAI 2023): modalities that segment best on their own teach the others."""

    name: Literal["lckd"] = "lckd"
    """The method; this word makes a recipe one of segmentation."""
    teachers: Literal["single", "multi", "per_task"] = "multi"
    """single: the modality that is best over all regions (LCKD-s). multi: the best of each region, all of them teaching
    everywhere (LCKD-m). per_task: the best of each region, teaching where that region lies."""
    cross_modal: CrossModalTerm = CrossModalTerm()
    full: FullTeacherTerm = FullTeacherTerm()
    dropping: DroppingConfig = DroppingConfig()
    election: ElectionConfig = ElectionConfig()
    loss: SegmentationLoss = SegmentationLoss()
    teaching_run: Folder | None = None
    """A trained run that is the full-modality teacher, instead of this recipe's teacher stage."""


class EvaluationConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window's side that the next one repeats, in tests and predictions."""
    mode: Literal["constant", "gaussian"] = "gaussian"
    """How overlapping windows count: alike, or more in their middle."""
    validation_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The same in validation and elections."""
    minimum_component: Fraction = 0.1
    """Post-processing: components smaller than this share of the largest are dropped ..."""
    minimum_component_voxels: Annotated[int, Field(ge=0)] = 2000
    """... unless they have this many voxels."""
    et_minimum: Annotated[int, Field(ge=0)] = 500
    """Post-processing: an enhancing tumour of fewer voxels is none."""


class SegmentationReport(Section):
    cases: Annotated[int, Field(ge=0, le=20)] = 3
    """Worst cases that are drawn."""


SegmentationStage = Literal["teacher", "baseline", "distilled"]
STAGE_KEYS = {
    "teacher": ("data.", "model.", "train.", "evaluation.", "method.loss."),
    "baseline": ("data.", "model.", "train.", "evaluation.", "method.loss.", "method.dropping."),
}
"""Keys of the recipe, by prefix, that the model of a stage depends on; other stages depend on all."""


class SegmentationRecipe(BaseRecipe):
    task: Literal["segmentation"] = "segmentation"
    stages: tuple[SegmentationStage, ...] = ("baseline", "distilled")
    """teacher: all modalities, nothing dropped; for `method.full`. alone: no distillation. distilled: with it."""
    data: VolumeDataConfig = VolumeDataConfig()
    method: LckdConfig = LckdConfig()
    model: UNetConfig = UNetConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: SegmentationReport = SegmentationReport()

    @model_validator(mode="after")
    def _agree(self) -> SegmentationRecipe:
        if len(set(self.data.modalities)) != len(self.data.modalities) or not self.data.modalities:
            raise ValueError(f"data.modalities {self.data.modalities} must name at least one modality, each once")
        initial = self.method.election.initial
        if initial is not None and initial not in self.data.modalities:
            raise ValueError(f"method.election.initial {initial!r} is not among data.modalities {self.data.modalities}")
        needs = "distilled" in self.stages and "teacher" not in self.stages and self.method.full.weight > 0
        if needs and not self.method.teaching_run:
            raise ValueError("method.full needs the stage 'teacher' before 'distilled', or method.teaching_run=RUN")
        if self.data.unlabelled == "rest" and "distilled" in self.stages and self.method.full.weight == 0:
            raise ValueError("data.unlabelled=rest needs method.full.weight above 0: its teacher segments these cases")
        return self

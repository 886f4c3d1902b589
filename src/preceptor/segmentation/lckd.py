"""LCKD: learnable cross-modal knowledge distillation for missing modalities (Wang et al., MICCAI 2023).

Each training sample keeps a subset of its modalities. An election on validation cases finds the modality that segments
each region best on its own; the features of the elected modalities are targets for those of the others:

    dice, bce     Dice + BCE of the masks from the visible modalities                      section 2.3, eq. 4
    cross_modal   |stop(f_t) - f_s| of the bottlenecks, t elected and visible, s visible   section 2.2, eq. 2
    full/output   T^2 KL of each voxel's probability, from a network that sees everything   (as in mmFormer; not LCKD)
    full/features |stop(mean f of the teacher) - mean f of the student|                     (likewise)

Where the paper and the published code leave something open or differ, there is a setting (docs/paper_index.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from preceptor.config import Positive, Section, TermConfig
from preceptor.segmentation.method import SegmentationMethod

if TYPE_CHECKING:
    from torch import Tensor

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.model import MultimodalUNet


class ElectionConfig(Section):
    every: Annotated[float, Field(gt=0)] = 5.0
    """Epochs between elections. The first one is before the first step."""
    cases: Positive | None = None
    """Largest number of validation cases that vote; default: all."""
    initial: str | None = None
    """Modality that is the teacher until the first election, which then takes place after `every` epochs (the published
    code: flair)."""


class CrossModalTerm(TermConfig):
    """Distance between the features of an elected teacher modality, detached, and those of the other modalities."""

    weight: Annotated[float, Field(ge=0)] = 0.1
    distance: Literal["l1", "mse", "cosine"] = "l1"
    """l1 and mse: mean over channels and voxels. cosine: mean over voxels of 1 - cos across channels."""
    levels: Literal["bottleneck", "all"] = "bottleneck"
    """Which features are compared: the deepest (published), or those of every level."""
    students: Literal["others", "all"] = "others"
    """Which modalities learn: those that are not elected, or all available ones, other teachers included (published)."""
    pairs: Literal["mean", "sum"] = "mean"
    """Mean or sum (published) over the pairs of teacher and student."""
    normalise: bool = False
    """Normalise the features to zero mean and unit variance over channels first, so that their scale has no effect."""
    projector: bool = False
    """Project the features of each student modality with a learned linear layer first (FitNets). The projector is not
    exported."""


class FullTeacherTerm(TermConfig):
    """Distillation from a network that sees all modalities to the one that sees a subset."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both probabilities; the term is scaled by T squared."""
    features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance between the two networks' fused bottleneck features, relative to that of the output."""


class LckdConfig(SegmentationMethod):
    """LCKD (Wang et al., MICCAI 2023): the modalities that segment best on their own are the teachers of the others."""

    name: Literal["lckd"] = "lckd"
    teachers: Literal["single", "multi", "per_task"] = "multi"
    """single: the modality that is best over all regions (LCKD-s). multi: the best modality of each region; all of them
    are teachers everywhere (LCKD-m). per_task: the best modality of each region, as a teacher inside that region."""
    cross_modal: CrossModalTerm = CrossModalTerm()
    full: FullTeacherTerm = FullTeacherTerm()
    election: ElectionConfig = ElectionConfig()

    def loss_terms(
        self,
        student: MultimodalUNet,
        votes: Callable[[MultimodalUNet], Tensor] | None = None,
        steps_per_epoch: float = 1.0,
    ) -> list[LossTerm]:
        from preceptor.segmentation.cross_modal import CrossModalLoss
        from preceptor.segmentation.losses import FusedFeatureLoss, OutputLoss

        terms: list[LossTerm] = []
        if self.cross_modal.weight > 0:
            if votes is None:
                raise ValueError("LCKD needs the votes of validation cases")
            every = max(1, round(self.election.every * steps_per_epoch))
            terms.append(CrossModalLoss(student, self, votes=votes, every=every))
        if self.full.weight > 0:
            terms.append(OutputLoss("full/output", self.full, self.full.temperature))
            if self.full.features > 0:
                terms.append(FusedFeatureLoss("full/features", self.full, self.full.features))
        return terms

    def needs_teacher(self, stage: str) -> bool:
        return stage == "distilled" and self.full.weight > 0

    @property
    def compares_features(self) -> bool:
        return self.full.features > 0

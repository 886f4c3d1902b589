"""LCKD: learnable cross-modal knowledge distillation for missing modalities (Wang et al., MICCAI 2023).

Each training sample keeps a subset of its modalities. An election on validation cases finds the modality that segments
each region best on its own; the features of the elected modalities are targets for those of the others:

    dice, bce     Dice + BCE of the masks from the visible modalities                      section 2.3, eq. 4
    cross_modal   |stop(f_t) - f_s| of the bottlenecks, t elected and visible, s visible   section 2.2, eq. 2
    full/output   T^2 KL of each voxel's probability, from a network that sees everything  (Hinton 2015; not LCKD)
    full/features |stop(mean f of the teacher) - mean f of the student|                     (likewise)

Where the paper and the published code leave something open or differ, there is a setting (docs/paper_index.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from preceptor.data.segmentation.modalities import find_modality
from preceptor.segmentation.method import SegmentationMethod, of_one_modality, require_features
from preceptor.segmentation.settings import CrossModalTerm, ElectionConfig, FullTeacherTerm

if TYPE_CHECKING:
    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.method import Votes
    from preceptor.segmentation.model import MultimodalUNet


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
        self, student: MultimodalUNet, votes: Votes | None = None, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        from preceptor.segmentation.cross_modal import CrossModalLoss
        from preceptor.segmentation.losses import FusedFeatureLoss, OutputLoss

        terms: list[LossTerm] = []
        if self.cross_modal.weight > 0:
            require_features(student, "method.cross_modal")
            if votes is None:
                raise ValueError("LCKD needs the votes of validation cases")
            terms.append(
                CrossModalLoss(
                    student,
                    self.cross_modal,
                    self.teachers,
                    votes=votes,
                    every=max(1, round(self.election.every * steps_per_epoch)),
                    initial=self.election.initial,
                    first=self.election.first,
                )
            )
        if self.full.weight > 0:
            terms.append(OutputLoss("full/output", self.full, self.full.temperature))
            if self.full.features > 0:
                terms.append(FusedFeatureLoss("full/features", self.full, self.full.features))
        return terms

    def check_modalities(self, modalities: Sequence[str]) -> None:
        initial = self.election.initial
        if initial is not None and find_modality(initial, modalities) is None:
            raise ValueError(f"method.election.initial {initial!r} is not among data.modalities {modalities}")

    def needs_teacher(self, stage: str) -> bool:
        return stage == "distilled" and self.full.weight > 0

    def without_distillation(self, modalities: Sequence[str]) -> str:
        if self.full.weight > 0:
            return ""
        if self.cross_modal.weight > 0:
            return of_one_modality(modalities)
        return "method.cross_modal.weight and method.full.weight are 0"

    @property
    def without_teacher(self) -> tuple[str, str]:
        return "method.full.weight=0", "method.full.weight above 0"

    @property
    def learns_without_masks(self) -> bool:
        # The distance of features needs no mask, but `per_task` compares them inside the masks only. The bottleneck
        # alone is not enough: nothing would teach the skip connections of a modality that never has a mask.
        alone = self.cross_modal.weight > 0 and self.cross_modal.levels == "all" and self.teachers != "per_task"
        return alone or self.needs_teacher("distilled")

    @property
    def compares_features(self) -> bool:
        return self.full.features > 0

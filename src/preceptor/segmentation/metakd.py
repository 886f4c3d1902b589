"""MetaKD: the importance of each modality is learned on cases that the network does not train on.

MetaKD is the successor of LCKD by the same group. It has no election. A softmax over one learnable number per modality
gives the weights s. They are trained on held-out cases alone: the network sees all modalities of a case, each feature
is multiplied by the weight of its modality, and Dice and binary cross-entropy are minimised with respect to s. The
network is trained as usual, with the additional loss

    0.1 sum over i != j, both visible, of stop(s_i / s_j) |stop(f_i) - f_j|

so that an important modality teaches, and a less important one learns. The softmax, the loss of s, the pairs and the
weight 0.1 are those of the published code. Ours are Adam for s, its learning rate and how often it steps, the
multiplication of the features of every level, and that the held-out cases neither select the model nor train the
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from preceptor.segmentation.method import SegmentationMethod, of_one_modality, require_features
from preceptor.segmentation.settings import ImportanceConfig, WeightedPairsTerm

if TYPE_CHECKING:
    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.method import HeldOutBatch, Votes
    from preceptor.segmentation.model import MultimodalUNet


class MetaKdConfig(SegmentationMethod):
    """MetaKD: all modalities teach one another, weighted by an importance that is learned on held-out cases."""

    name: Literal["metakd"] = "metakd"
    pairs: WeightedPairsTerm = WeightedPairsTerm()
    importance: ImportanceConfig = ImportanceConfig()

    def loss_terms(
        self, student: MultimodalUNet, votes: Votes | None = None, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        return []

    def held_out_terms(
        self, student: MultimodalUNet, held_out: HeldOutBatch, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        from preceptor.segmentation.importance import WeightedPairsLoss

        if self.pairs.weight == 0:
            return []
        require_features(student, "method.pairs")
        record_every = max(1, round(steps_per_epoch))
        return [WeightedPairsLoss(student, self.pairs, self.importance, held_out, record_every)]

    @property
    def held_out_share(self) -> float:
        return self.importance.held_out if self.pairs.weight > 0 else 0.0

    def without_distillation(self, modalities: Sequence[str]) -> str:
        return of_one_modality(modalities) if self.pairs.weight > 0 else "method.pairs.weight is 0"

    def needs_teacher(self, stage: str) -> bool:
        return False

    @property
    def learns_without_masks(self) -> bool:
        # As in LCKD: the bottleneck alone would leave the skip connections of an unlabelled modality untrained.
        return self.pairs.weight > 0 and self.pairs.levels == "all"

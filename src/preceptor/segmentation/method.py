"""What every distillation method of segmentation has: the loss of the masks, modality dropping, a teacher, loss terms.

A method is a class like `LckdConfig` in `lckd.py` or `KdConfig` in `kd.py`: its settings, and `loss_terms`, which
returns the terms that it adds to the loss of the masks. Recipes are validated before torch is imported, so torch is
imported in functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from preceptor.config import Folder, MethodConfig, TermConfig
from preceptor.segmentation.settings import DroppingConfig, SegmentationLoss

if TYPE_CHECKING:
    from torch import Tensor

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.model import MultimodalUNet
    from preceptor.segmentation.task import SegmentationTask


class SegmentationMethod(MethodConfig):
    """Base class of the methods of segmentation."""

    loss: SegmentationLoss = SegmentationLoss()
    dropping: DroppingConfig = DroppingConfig()
    teaching_run: Folder | None = None
    """A trained run that is the full-modality teacher, instead of this recipe's teacher stage."""

    def loss_terms(
        self,
        student: MultimodalUNet,
        votes: Callable[[MultimodalUNet], Tensor] | None = None,
        steps_per_epoch: float = 1.0,
    ) -> list[LossTerm]:
        """Return the terms that the stage `distilled` adds to the loss of the masks, in the order of their sum.

        ``votes(student)`` returns the soft Dice (N, R) of each modality alone on validation cases.
        """
        raise NotImplementedError

    def needs_teacher(self, stage: str) -> bool:
        """Return whether a stage needs the full-modality teacher."""
        return stage == "distilled"

    @property
    def learns_without_masks(self) -> bool:
        """Whether the stage `distilled` can learn from cases without masks (`data.unlabelled`)."""
        return self.needs_teacher("distilled")

    @property
    def compares_features(self) -> bool:
        """Whether the features of the teacher are compared, so that both networks need the same layers."""
        return False

    def stage_settings(self, stage: str) -> dict[str, Any]:
        """Return the settings that a stage uses. They must not change when it is resumed."""
        if stage == "distilled":
            return self.model_dump(mode="json", exclude={"teaching_run"})
        settings = self.model_dump(mode="json", include={"loss", "dropping"})
        return settings | ({"dropping": "none"} if stage == "teacher" else {})

    def build_task(
        self,
        student: MultimodalUNet,
        *,
        stage: str,
        teacher: MultimodalUNet | None = None,
        votes: Callable[[MultimodalUNet], Tensor] | None = None,
        steps_per_epoch: float = 1.0,
    ) -> SegmentationTask:
        """Return the training task of a stage.

        The stages `teacher`, in which no modality is dropped, and `baseline` learn from the masks alone.

        Args:
            student: the network to train.
            teacher: the network that sees all modalities, if `needs_teacher(stage)`, on the device of the training.
            votes: returns the soft Dice (N, R) of each modality alone on validation cases; LCKD's election needs it.
            steps_per_epoch: optimiser steps per epoch.
        """
        from preceptor.distill.loss_term import own_losses
        from preceptor.segmentation.losses import BceLoss, DiceLoss
        from preceptor.segmentation.task import SegmentationTask

        terms: list[LossTerm] = [
            DiceLoss(TermConfig(weight=self.loss.dice)),
            BceLoss(TermConfig(weight=self.loss.bce), self.loss.bce_reduction),
        ]
        if stage == "distilled":
            terms += [*self.loss_terms(student, votes, steps_per_epoch), *own_losses(self.losses)]
        dropping = DroppingConfig(kind="none") if stage == "teacher" else self.dropping
        return SegmentationTask(student, terms, dropping=dropping, teacher=teacher if stage == "distilled" else None)

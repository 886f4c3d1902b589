"""Logit distillation from a teacher that sees all modalities to a student that sees some of them.

    loss = Dice(y, s) + BCE(y, s) + w T^2 KL(sigmoid(t/T) || sigmoid(s/T))

The last term is Hinton et al. (2015, section 2) for overlapping regions: each voxel holds one Bernoulli distribution
per region. It is the mean over regions and voxels. The logits t are those of

    stage    a network that was trained before, on all modalities                (Hinton et al. 2015)
    self     the student on all modalities of the same crop, without gradients   (self-distillation)
    ema      an exponential moving average of the student, on all modalities     (mean teacher, Tarvainen et al. 2017)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from preceptor.config import TermConfig
from preceptor.segmentation.method import SegmentationMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.model import MultimodalUNet
    from preceptor.task import Teacher


class OutputTerm(TermConfig):
    """KL divergence between the teacher's and the student's probability of every voxel and region."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both distributions; the term is scaled by T squared."""


class KdConfig(SegmentationMethod):
    """Plain knowledge distillation (Hinton et al. 2015) from a full-modality teacher's logits."""

    name: Literal["kd"] = "kd"
    teacher: Literal["stage", "self", "ema"] = "stage"
    """stage: the network of the stage `teacher`, or of `teaching_run`. self: the student's own prediction from all
    modalities. ema: the prediction of a moving average of the student from all modalities (mean teacher)."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Decay of the moving average of `teacher: ema` per step; smaller in the first steps."""
    output: OutputTerm = OutputTerm()

    @model_validator(mode="after")
    def _one_teacher(self) -> KdConfig:
        if self.teacher != "stage" and self.teaching_run:
            raise ValueError(
                f"method.teacher={self.teacher} has no other teacher, so method.teaching_run={self.teaching_run} is "
                "not used; remove it, or set method.teacher=stage"
            )
        return self

    def loss_terms(
        self,
        student: MultimodalUNet,
        votes: Callable[[MultimodalUNet], Tensor] | None = None,
        steps_per_epoch: float = 1.0,
    ) -> list[LossTerm]:
        from preceptor.segmentation.losses import OutputLoss

        return [OutputLoss("output", self.output, self.output.temperature)]

    def needs_teacher(self, stage: str) -> bool:
        return stage == "distilled" and self.teacher == "stage"

    @property
    def learns_without_masks(self) -> bool:
        return True  # the KL divergence needs no mask

    def make_teacher(self, student: nn.Module, network: nn.Module | None, paths: Sequence[str]) -> Teacher | None:
        from preceptor.segmentation.teachers import SelfTeacher, hooked_full_forward
        from preceptor.teachers.online import EmaTeacher

        if self.teacher == "self":
            return SelfTeacher(student, hooked_full_forward(paths))
        if self.teacher == "ema":
            return EmaTeacher(copy.deepcopy(student), hooked_full_forward(paths), self.ema_decay)
        return super().make_teacher(student, network, paths)

    def stage_settings(self, stage: str) -> dict[str, Any]:
        settings = super().stage_settings(stage)
        if self.teacher != "ema":
            settings.pop("ema_decay", None)
        return settings

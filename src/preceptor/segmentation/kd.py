"""Logit distillation from a teacher that sees all modalities to a student that sees some of them.

    loss = Dice(y, s) + BCE(y, s) + w T^2 KL(sigmoid(t/T) || sigmoid(s/T))

The last term is Hinton et al. (2015, section 2) for overlapping regions: each voxel holds one Bernoulli distribution
per region. It is the mean over regions and voxels. Optionally, `prototypes` adds

    w' mean_kv (cos(s_v, c_k) - cos(t_v, d_k))^2,    c_k and d_k the mean features of region k

of the last maps of both decoders, for samples with masks: the semantic-wise self-distillation of PASSION (Shi et al.,
ACM MM 2024; see prototypes.py). The logits t and the features are those of

    stage      a network that was trained before, on all modalities                (Hinton et al. 2015)
    baseline   the trained baseline on all modalities; for cases without masks     (self-training, Lee 2013)
    self       the student on all modalities of the same crop, without gradients   (self-distillation)
    ema        an exponential moving average of the student, on all modalities     (mean teacher, Tarvainen et al. 2017)

With `initialise_from_teacher` the student of the first two begins with the teacher's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from preceptor.config import TermConfig
from preceptor.errors import UserError
from preceptor.segmentation.method import SegmentationMethod

if TYPE_CHECKING:
    from torch import nn

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.method import Votes
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
    from preceptor.task import Teacher


class OutputTerm(TermConfig):
    """KL divergence between the teacher's and the student's probability of every voxel and region."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both distributions; the term is scaled by T squared."""


class PrototypeTerm(TermConfig):
    """Squared difference of the teacher's and the student's similarity of every voxel to every region's mean feature
    (PASSION, Shi et al. 2024; 0.1 in the published code). Needs masks, and works on the last map of the decoder."""


class KdConfig(SegmentationMethod):
    """Plain knowledge distillation (Hinton et al. 2015) from a full-modality teacher's logits."""

    name: Literal["kd"] = "kd"
    teacher: Literal["stage", "baseline", "self", "ema"] = "stage"
    """stage: the network of the stage `teacher`, or of `teaching_run`. baseline: that of the stage `baseline`, or of
    `teaching_run` (self-training). self: the student's own prediction from all modalities. ema: the prediction of a
    moving average of the student from all modalities (mean teacher)."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Decay of the moving average of `teacher: ema` per step; smaller in the first steps."""
    initialise_from_teacher: bool = False
    """Start the student from the teacher's weights, not from random ones. Both need the same network."""
    output: OutputTerm = OutputTerm()
    prototypes: PrototypeTerm = PrototypeTerm()

    @model_validator(mode="after")
    def _validate_start(self) -> KdConfig:
        if self.initialise_from_teacher and not self.needs_teacher("distilled"):
            raise ValueError(
                f"method.initialise_from_teacher=true needs a trained teacher, and method.teacher={self.teacher} has "
                "none; set method.teacher=baseline or stage, or initialise_from_teacher=false"
            )
        return self

    def loss_terms(
        self, student: MultimodalUNet, votes: Votes | None = None, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        from preceptor.segmentation.losses import OutputLoss
        from preceptor.segmentation.prototypes import PrototypeLoss

        terms: list[LossTerm] = []
        if self.output.weight > 0:
            terms.append(OutputLoss("output", self.output, self.output.temperature))
        if self.prototypes.weight > 0:
            _require_decoder("the student", student.config)
            terms.append(PrototypeLoss(self.prototypes))
        return terms

    def without_distillation(self, modalities: Sequence[str]) -> str:
        used = self.output.weight > 0 or self.prototypes.weight > 0
        return "" if used else "method.output.weight and method.prototypes.weight are 0"

    def needs_teacher(self, stage: str) -> bool:
        return stage == "distilled" and self.teacher in ("stage", "baseline")

    @property
    def without_teacher(self) -> tuple[str, str]:
        return f"method.teacher={self.teacher}", "method.teacher=stage"

    @property
    def teaching_stage(self) -> str:
        return "baseline" if self.teacher == "baseline" else super().teaching_stage

    @property
    def learns_without_masks(self) -> bool:
        # The KL divergence needs no mask, and a trained teacher draws masks.
        return super().learns_without_masks or self.output.weight > 0

    @property
    def starts_from_teacher(self) -> bool:
        return self.initialise_from_teacher

    def make_teacher(self, student: nn.Module, network: nn.Module | None, paths: Sequence[str]) -> Teacher | None:
        from preceptor.segmentation.teachers import SelfTeacher, hooked_full_forward
        from preceptor.teachers.online import EmaTeacher

        if self.teacher == "self":
            return SelfTeacher(student, hooked_full_forward(paths))
        if self.teacher == "ema":
            return EmaTeacher(copy.deepcopy(student), hooked_full_forward(paths), self.ema_decay)
        if self.prototypes.weight > 0 and network is not None:
            teacher, own = (cast("MultimodalUNet", n).config for n in (network, student))
            _require_decoder("the teacher", teacher, like=own)
        return super().make_teacher(student, network, paths)

    def stage_settings(self, stage: str) -> dict[str, Any]:
        settings = super().stage_settings(stage)
        if self.teacher != "ema":
            settings.pop("ema_decay", None)
        # A run that was begun before these settings existed can be resumed.
        if not self.initialise_from_teacher:
            settings.pop("initialise_from_teacher", None)
        if self.prototypes.weight == 0:
            settings.pop("prototypes", None)
        return settings


def _require_decoder(who: str, config: MultimodalUNetConfig, like: MultimodalUNetConfig | None = None) -> None:
    """Raise UserError if the term `prototypes` cannot read a network, or not compare it with the network `like`."""
    if config.is_own:
        raise UserError(
            f"method.prototypes reads the decoder's last map, and {who} is your own network {config.net}; set "
            "method.prototypes.weight=0"
        )
    if like is not None and (config.net == "reference") != (like.net == "reference"):
        raise UserError(
            f"method.prototypes compares maps of the same size, and {who} has model.net={config.net} and the student "
            f"{like.net}; use a teacher of the same net, or set method.prototypes.weight=0"
        )

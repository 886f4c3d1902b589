"""The training task of segmentation: a network that sees a subset of the modalities, its loss terms and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.distill.loss_term import LossTerm
from preceptor.segmentation.losses import TeacherLoss
from preceptor.segmentation.modality_dropout import drop_modalities
from preceptor.segmentation.settings import ModalityDropoutConfig
from preceptor.segmentation.teachers import segmentation_forward
from preceptor.task import Batch, LossTerms, Teacher, TeacherSignal
from preceptor.teachers.online import TaughtTask


class SegmentationTask(TaughtTask):
    """A network for any subset of modalities and its loss terms.

    The teacher, if there is one, gets the batch with the tensor `visible` (B, N) of the modalities that the student
    sees. With `teacher_masks`, the teacher's masks replace those of cases that have none. Otherwise such cases have no
    part in the losses of the masks.

    A trained teacher may see some samples only: `taught_by` returns which, (B,) bool, given the modalities (B, N) that
    they have. The tensor `taught` of a batch holds the result. The terms of the teacher (`TeacherLoss`) are then means
    over these samples, and the others get no masks from it.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[LossTerm],
        *,
        modality_dropout: ModalityDropoutConfig,
        teacher: Teacher | None = None,
        teacher_config: Any = None,
        teacher_masks: bool = False,
        taught_by: Callable[[Tensor], Tensor] | None = None,
        pretrained: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> None:
        super().__init__(
            student,
            losses,
            forward=segmentation_forward,
            teacher=teacher,
            teacher_config=teacher_config,
            pretrained=pretrained,
            seed=seed,
        )
        self.modality_dropout, self.teacher_masks, self.taught_by = modality_dropout, teacher_masks, taught_by
        if taught_by is not None:
            for term in losses:
                if isinstance(term, TeacherLoss):
                    term.unit = "taught"

    def forward(self, batch: Batch) -> LossTerms:
        visible = drop_modalities(batch["available"], self.modality_dropout, self.progress)
        batch = replace(batch, tensors={**batch.tensors, "visible": visible})
        if self.taught_by is not None:
            batch.tensors["taught"] = self.taught_by(batch["available"])
        return super().forward(batch)

    def prepare(self, batch: Batch, teacher: TeacherSignal | None) -> Batch:
        if teacher is None or not self.teacher_masks:
            return batch
        assert teacher.logits is not None
        masks, labelled = batch["masks"], batch["labelled"]
        from_teacher = (teacher.logits > 0).to(masks.dtype)
        masks = torch.where(labelled[:, None, None, None, None], masks, from_teacher)
        labelled = labelled | batch.tensors.get("taught", torch.ones_like(labelled))
        return replace(batch, tensors={**batch.tensors, "masks": masks, "labelled": labelled})

    def units(self, batch: Batch) -> dict[str, int]:
        if self.taught_by is None:
            labelled = len(batch) if self.teacher_masks else int(batch["labelled"].sum())
            return {"samples": len(batch), "labelled": labelled}
        taught = self.taught_by(batch["available"])
        labelled = int((batch["labelled"] | taught).sum())
        return {"samples": len(batch), "labelled": labelled, "taught": int(taught.sum())}

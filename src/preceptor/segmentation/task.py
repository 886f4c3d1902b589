"""The training task of segmentation: a network that sees a subset of the modalities, its loss terms and its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from preceptor.distill.loss_term import LossTerm
from preceptor.distill.task import DistillationTask, HookedForward, features_of
from preceptor.segmentation.modality_dropping import drop_modalities
from preceptor.segmentation.model import MultimodalUNet, Segmentation
from preceptor.segmentation.settings import DroppingConfig
from preceptor.task import Batch, TeacherSignal
from preceptor.teachers.online import OnlineTeacher


def segmentation_forward(model: nn.Module, batch: Batch) -> TeacherSignal:
    """Run a network on the `visible` modalities of a batch, or on all `available` ones if none were dropped.

    The signal holds the logits (B, R, D, H, W) and the features ``level.0``, ..., shallow to deep, each
    (B, N, C, d, h, w) and zero where a modality is missing. ``bottleneck`` is the deepest one.
    """
    visible = batch.tensors.get("visible", batch["available"])
    output: Segmentation = model(batch["images"], visible)
    levels = {f"level.{number}": features for number, features in enumerate(output.features)}
    if output.features:
        levels["bottleneck"] = output.features[-1]
    return TeacherSignal(output.logits, levels)


def full_modality_teacher(network: nn.Module, paths: Sequence[str] = ()) -> OnlineTeacher:
    """Return a frozen teacher that sees all available modalities of a batch.

    Its signal also holds the outputs of the modules at `paths`.
    """
    return OnlineTeacher(network, HookedForward(segmentation_forward, paths))


class SegmentationTask(DistillationTask):
    """A network for any subset of modalities and its loss terms.

    `teacher`, if there is one, is a network that sees all available modalities. Its masks replace those of cases that
    have none. Without a teacher, such cases have no part in the losses of the masks.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[LossTerm],
        *,
        dropping: DroppingConfig,
        teacher: MultimodalUNet | None = None,
    ) -> None:
        super().__init__(
            student,
            losses,
            forward=segmentation_forward,
            teacher=full_modality_teacher(teacher, features_of(losses, "teacher")) if teacher is not None else None,
            teacher_config=teacher.config if teacher is not None else None,
        )
        self.dropping = dropping

    def prepare(self, batch: Batch, teacher: TeacherSignal | None) -> Batch:
        tensors = {**batch.tensors, "visible": drop_modalities(batch["available"], self.dropping, self.progress)}
        if teacher is not None:
            assert teacher.logits is not None
            masks, labelled = batch["masks"], batch["labelled"]
            from_teacher = (teacher.logits > 0).to(masks.dtype)
            tensors["masks"] = torch.where(labelled[:, None, None, None, None], masks, from_teacher)
            tensors["labelled"] = torch.ones_like(labelled)
        return replace(batch, tensors=tensors)

    def units(self, batch: Batch) -> dict[str, int]:
        labelled = len(batch) if self.teacher is not None else int(batch["labelled"].sum())
        return {"samples": len(batch), "labelled": labelled}

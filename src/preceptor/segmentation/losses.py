"""Losses of segmentation with overlapping regions, one sigmoid per region: pure functions, then the loss terms.

A loss is the sum over the samples of the batch of a per-sample value, a scalar tensor. The loop divides by the number
of samples of the global batch. Half precision is computed in float32; float64 stays.

Shapes: B batch, N modalities, R regions, C channels, then any voxel axes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.config import TermConfig
from preceptor.distill.loss_term import LossTerm
from preceptor.task import Batch, TeacherSignal


def soft_dice(probabilities_BR: Tensor, targets_BR: Tensor) -> Tensor:
    """Return (B, R): ``2 sum(p y) / (sum p + sum y + 1)``, the sums over voxels, without a threshold.

    `probabilities_BR`, `targets_BR`: (B, R, D, H, W). The published LCKD code trains and elects teachers with it. The 1
    keeps it finite and makes it 0 if the region is empty, whatever is predicted. Use `segmentation.metrics.dice` for
    scores.
    """
    assert probabilities_BR.shape == targets_BR.shape, f"{probabilities_BR.shape} against {targets_BR.shape}"
    p, y = _wide(probabilities_BR).flatten(2), _wide(targets_BR).flatten(2)
    return 2 * (p * y).sum(-1) / (p.sum(-1) + y.sum(-1) + 1)


def dice_loss(logits_BR: Tensor, targets_BR: Tensor) -> Tensor:
    """Return ``sum_b (1 - mean_r soft_dice(sigmoid(x_br), y_br))``.

    MONAI's ``DiceLoss(sigmoid=True, smooth_nr=0, smooth_dr=1)`` times the batch size. A region that is empty in a
    sample costs 1 and has no gradient; only the binary cross-entropy has one there.
    """
    return (1 - soft_dice(_wide(logits_BR).sigmoid(), targets_BR)).mean(dim=1).sum()


def bce_loss(logits_BR: Tensor, targets_BR: Tensor, regions: Literal["mean", "sum"] = "mean") -> Tensor:
    """Return the binary cross-entropy with logits: mean over voxels, `regions` over regions, summed over samples.

    The published LCKD code sums over the three regions, which gives it three times the weight relative to Dice.
    """
    assert logits_BR.shape == targets_BR.shape, f"{logits_BR.shape} against {targets_BR.shape}"
    x, y = _wide(logits_BR), _wide(targets_BR)
    values_BR = F.binary_cross_entropy_with_logits(x, y.to(x.dtype), reduction="none").flatten(2).mean(-1)
    return values_BR.sum() if regions == "sum" else values_BR.mean(dim=1).sum()


def binary_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return (B,): T^2 KL(sigmoid(t/T) || sigmoid(s/T)), the mean over regions and voxels (Hinton et al. 2015).

    The regions overlap, so each voxel holds R distributions over two classes. `logits` (B, R, D, H, W).
    """
    s, t = logits.float() / temperature, teacher_logits.float() / temperature
    p = torch.sigmoid(t)
    kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * kl.flatten(1).mean(dim=1)


def mean_available(features: Tensor, available: Tensor) -> Tensor:
    """Return (B, C, d, h, w): the mean of features (B, N, C, d, h, w) over the `available` (B, N) modalities."""
    weight = available.to(torch.float32) / available.sum(dim=1, keepdim=True)
    return torch.einsum("bncdhw,bn->bcdhw", features.float(), weight)


class SegmentationLoss(LossTerm):
    """A term with the name and the schedule that a method gives it.

    A batch holds `masks`, `labelled` (B,), whether a sample has masks, `available`, and `visible` (B, N), the
    modalities that the student saw. A signal holds the logits (B, R, D, H, W) and the features ``level.0``, ... and
    ``bottleneck``, each (B, N, C, d, h, w).
    """

    def __init__(self, name: str, schedule: TermConfig) -> None:
        super().__init__()
        self.name, self.schedule = name, schedule


class DiceLoss(SegmentationLoss):
    """Soft Dice loss of the samples that have masks."""

    unit = "labelled"

    def __init__(self, schedule: TermConfig) -> None:
        super().__init__("dice", schedule)

    def forward(self, student: TeacherSignal, teacher: TeacherSignal | None, batch: Batch) -> Tensor:
        assert student.logits is not None
        return dice_loss(*_labelled(student.logits, batch))


class BceLoss(SegmentationLoss):
    """Binary cross-entropy of the samples that have masks."""

    unit = "labelled"

    def __init__(self, schedule: TermConfig, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__("bce", schedule)
        self.reduction: Literal["mean", "sum"] = reduction

    def forward(self, student: TeacherSignal, teacher: TeacherSignal | None, batch: Batch) -> Tensor:
        assert student.logits is not None
        return bce_loss(*_labelled(student.logits, batch), self.reduction)


def _labelled(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits and masks of the samples that have masks."""
    rows = batch["labelled"]
    return logits[rows], batch["masks"][rows]


class TeacherLoss(SegmentationLoss):
    """A term that compares the student with a teacher. If a teacher sees some samples only, a batch holds `taught`
    (B,), which samples these are; the others have no part in the term."""

    def total(self, values_B: Tensor, batch: Batch) -> Tensor:
        """Return the sum over the samples that the teacher sees."""
        taught_B = batch.tensors.get("taught")
        return (values_B if taught_B is None else torch.where(taught_B, values_B, values_B.new_zeros(()))).sum()


class OutputLoss(TeacherLoss):
    """T^2 KL(teacher || student) of the probability of every voxel and region (`binary_kl`)."""

    def __init__(self, name: str, schedule: TermConfig, temperature: float) -> None:
        super().__init__(name, schedule)
        self.temperature = temperature

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        assert student.logits is not None
        assert teacher.logits is not None
        return self.total(binary_kl(student.logits, teacher.logits, self.temperature), batch)


class FusedFeatureLoss(TeacherLoss):
    """L1 distance of the bottlenecks, each the mean over the modalities that the network saw.

    The weight is `relative` times that of the schedule.
    """

    def __init__(self, name: str, schedule: TermConfig, relative: float) -> None:
        super().__init__(name, schedule)
        self.relative = relative

    def weight_at(self, progress: float) -> float:
        return super().weight_at(progress) * self.relative

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        s = mean_available(student.features["bottleneck"], batch["visible"])
        t = mean_available(teacher.features["bottleneck"], batch["available"])
        return self.total((s - t).abs().flatten(1).mean(dim=1), batch)


def _wide(x: Tensor) -> Tensor:
    return x if x.is_floating_point() and x.itemsize > 2 else x.float()

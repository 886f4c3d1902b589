"""Loss terms of visual question answering. Each is the sum over the samples of a batch.

Student and teacher are `TeacherSignal`s: logits (B, C), features, and the mask (B, L) of the fused tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from preceptor.config import TermConfig
from preceptor.distill import losses
from preceptor.distill.loss_term import LossTerm
from preceptor.distill.projectors import projector
from preceptor.distill.schedule import scheduled_weight
from preceptor.errors import UserError
from preceptor.task import Batch, TeacherSignal


class VqaLoss(LossTerm):
    """A term with the name and the schedule that a method gives it. `divisor` divides its weight among siblings."""

    def __init__(self, name: str, schedule: TermConfig, divisor: int = 1) -> None:
        super().__init__()
        self.name, self.schedule, self.divisor = name, schedule, divisor

    def weight_at(self, progress: float) -> float:
        return scheduled_weight(self.schedule, progress) / self.divisor


class LabelLoss(VqaLoss):
    """Cross-entropy of the answers, or binary cross-entropy of all classes (``kind: bce``).

    In both, a row without an answer adds nothing. If no answer of a row is a class, the cross-entropy leaves the row
    out, and in the binary cross-entropy every class is wrong.
    """

    def __init__(self, schedule: TermConfig, kind: Literal["ce", "bce"] = "ce", label_smoothing: float = 0.0) -> None:
        super().__init__("label", schedule)
        self.kind, self.label_smoothing = kind, label_smoothing
        self.unit = "answered" if kind == "bce" else "labelled"

    def forward(self, student: TeacherSignal, teacher: TeacherSignal | None, batch: Batch) -> Tensor:
        assert student.logits is not None
        labels = batch["labels"]
        if self.kind == "ce":
            return losses.cross_entropy(student.logits, labels, self.label_smoothing)
        answered = batch["answered"]
        logits, labels = student.logits[answered], labels[answered]
        targets = torch.zeros_like(logits)
        known = labels >= 0
        targets[known, labels[known]] = 1.0
        return losses.binary_cross_entropy(logits, targets)


class OutputLoss(VqaLoss):
    """T^2 KL(teacher || student) of the answer probabilities at temperature T (Hinton et al. 2015)."""

    def __init__(self, schedule: TermConfig, temperature: float) -> None:
        super().__init__("output", schedule)
        self.temperature = temperature

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        assert student.logits is not None
        assert teacher.logits is not None
        return losses.kl_divergence(student.logits, teacher.logits, self.temperature)


class FeatureLoss(VqaLoss):
    """Distance of two layers' tokens, the student's through a learned linear projection (FitNets; TinyBERT eq. 8).

    `tokens` says which tokens the layers hold, and so which mask marks the padding: those of the image, of the
    question, or the fused ones. `kind` is ``mse``, of normalised tokens, or ``cosine``.
    """

    def __init__(
        self,
        name: str,
        schedule: TermConfig,
        student_path: str,
        teacher_path: str,
        *,
        kind: Literal["mse", "cosine"],
        tokens: str = "fused",
        divisor: int = 1,
    ) -> None:
        super().__init__(name, schedule, divisor)
        self.kind = kind
        self.tokens = tokens
        self.student_features, self.teacher_features = (student_path,), (teacher_path,)

    def prepare(self, student: nn.Module, teacher_config: Any, generator: torch.Generator) -> None:
        student_config: Any = student.config
        self.projector = projector(student_config.width, teacher_config.width, generator)

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        s, t = student.features[self.student_features[0]], teacher.features[self.teacher_features[0]]
        require_same_tokens(s, t, axis=1)
        mask = {"image": None, "question": batch["attention_mask"], "fused": student.mask}[self.tokens]
        projected = self.projector(s)
        if self.kind == "cosine":
            return losses.cosine(projected, t, mask)
        return losses.mse(projected, t, mask, normalise=True)


class AttentionLoss(VqaLoss):
    """Distance of the attention probabilities of two fusion layers (MiniLM eq. 1; TinyBERT eq. 7)."""

    def __init__(
        self,
        name: str,
        schedule: TermConfig,
        student_layer: int,
        teacher_layer: int,
        *,
        kind: Literal["kl", "mse"],
        divisor: int = 1,
    ) -> None:
        super().__init__(name, schedule, divisor)
        self.kind = kind
        self.student_features = (f"fusion.{student_layer}.attention.probabilities",)
        self.teacher_features = (f"fusion.{teacher_layer}.attention.probabilities",)

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        s, t = student.features[self.student_features[0]], teacher.features[self.teacher_features[0]]
        require_same_tokens(s, t, axis=2)
        return losses.attention(s, t, student.mask, kind=self.kind)


class RelationLoss(VqaLoss):
    """Difference of the similarities among the samples of a batch, by the last layer's first token."""

    def __init__(self, schedule: TermConfig, student_layer: int, teacher_layer: int) -> None:
        super().__init__("relation", schedule)
        self.student_features, self.teacher_features = (f"fusion.{student_layer}",), (f"fusion.{teacher_layer}",)

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        s, t = student.features[self.student_features[0]], teacher.features[self.teacher_features[0]]
        return losses.relation(s[:, 0], t[:, 0])


def require_same_tokens(student: Tensor, teacher: Tensor, axis: int) -> None:
    """Raise UserError if student and teacher differ in their number of tokens."""
    if student.shape[axis] != teacher.shape[axis]:
        raise UserError(
            f"the student has {student.shape[axis]} tokens and the teacher {teacher.shape[axis]}, so hidden, embedding "
            "and attention terms cannot compare them: give both models the same data.image_size and "
            "vision.conv.token_stages, or set those terms' weight to 0"
        )

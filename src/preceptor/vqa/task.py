"""The training task of visual question answering: a student, its loss terms and its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from preceptor.distill.loss_term import LossTerm
from preceptor.errors import UserError
from preceptor.task import Batch, Teacher, TeacherSignal
from preceptor.teachers.online import TaughtTask

TOKEN_AXES = {"embed_question": (1,), "fusion": (1,), "probabilities": (2, 3)}
"""Axes of features along which the length of the question counts."""


def token_axes(path: str) -> tuple[int, ...]:
    """Return the axes of a feature that grow with the batch's longest question."""
    kind = path.rsplit(".", 1)[-1] if path.endswith("probabilities") else path.split(".", 1)[0]
    return TOKEN_AXES.get(kind, ())


def vqa_forward(model: nn.Module, batch: Batch) -> TeacherSignal:
    """Run a `VqaTransformer` on a batch."""
    output = model(batch["pixels"], batch["input_ids"], batch["attention_mask"])
    return TeacherSignal(output.logits, {}, output.mask)


class VqaTask(TaughtTask):
    """A `VqaTransformer` and its loss terms.

    `teacher_config` is the `VqaTransformerConfig` of the teacher; of the first member of an ensemble. `seed` draws the
    initial weights of projectors. Raises UserError if the teacher has other answer classes than the student.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[LossTerm],
        *,
        teacher: Teacher | None = None,
        teacher_config: Any = None,
        pretrained: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> None:
        config: Any = student.config
        if teacher is not None and config.answers != teacher_config.answers:
            raise UserError(
                f"the teacher has {teacher_config.num_labels} answers and the student {config.num_labels}, or they "
                "differ in order; train both on the same data and split (data.name, data.variant, ...)"
            )
        super().__init__(
            student,
            losses,
            forward=vqa_forward,
            teacher=teacher,
            teacher_config=teacher_config,
            pretrained=pretrained,
            seed=seed,
        )

    def units(self, batch: Batch) -> dict[str, int]:
        labelled, answered = int((batch["labels"] >= 0).sum()), int(batch["answered"].sum())
        return {"samples": len(batch), "labelled": labelled, "answered": answered}

"""Plain logit distillation (Hinton, Vinyals and Dean 2015, section 2): the smallest method, and an example of one.

    loss = (1 - alpha) CE(y, s) + alpha T^2 KL(softmax(t/T) || softmax(s/T))

The paper's soft-target loss is a cross-entropy. It differs from the KL divergence by the teacher's entropy, which has
no gradient. The factor T^2 keeps the gradients' magnitude when T changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from preceptor.config import Fraction, TermConfig
from preceptor.vqa.method import VqaMethod

if TYPE_CHECKING:
    from preceptor.distill.loss_term import LossTerm


class KdConfig(VqaMethod):
    """Plain knowledge distillation (Hinton et al. 2015): the teacher's answer probabilities as soft targets."""

    name: Literal["kd"] = "kd"
    alpha: Fraction = 0.5
    """Weight of the teacher's term. The weight of the answers' term is `(1 - alpha) * label.weight`."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both distributions; the term is scaled by T squared."""

    def loss_terms(self, student_layers: int, teacher_layers: int) -> list[LossTerm]:
        from preceptor.vqa.losses import OutputLoss

        return [self.label_loss(1 - self.alpha), OutputLoss(TermConfig(weight=self.alpha), self.temperature)]

    def term_weights(self) -> dict[str, float]:
        return {**super().term_weights(), "label": (1 - self.alpha) * self.label.weight, "output": self.alpha}

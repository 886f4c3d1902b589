"""One term of a training loss as an object. A method is a list of such terms.

Write an own term as a class in your own file and name it in a recipe::

    # my_losses.py
    class LogitDistance(LossTerm):
        def forward(self, student, teacher, batch):
            return (student.logits - teacher.logits).square().mean(dim=1).sum()

    # recipe.yaml
    method:
      losses: [{loss: "my_losses:LogitDistance", weight: 0.5}]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.config import OwnLossConfig, TermConfig
from preceptor.distill.schedule import scheduled_weight
from preceptor.errors import UserError
from preceptor.extension import construct, load_object
from preceptor.task import Batch, TeacherSignal


class LossTerm(nn.Module):
    """One term of a loss: its name, unit, weight and features, and how it is computed.

    Subclasses implement `forward`. The other members have defaults:

    - `name`: key of the term in the log. Default: the name of the class.
    - `unit`: what `forward` sums over, ``samples`` or another key that the task's `units` counts (``labelled`` in VQA).
    - `schedule`: weight of the term and when it applies. A recipe sets it.
    - `student_features`, `teacher_features`: paths of the modules whose output the term needs, such as ``fusion.0``.
      They become keys of ``student.features`` and ``teacher.features``.
    """

    name: str = ""
    unit: str = "samples"
    schedule: TermConfig = TermConfig(weight=1.0)
    student_features: Sequence[str] = ()
    teacher_features: Sequence[str] = ()

    def weight_at(self, progress: float) -> float:
        """Return the term's weight at `progress`, the fraction of the training that is done."""
        return scheduled_weight(self.schedule, progress)

    def prepare(self, student: nn.Module, teacher_config: Any, generator: torch.Generator) -> None:
        """Create parameters that depend on the two networks, such as a projector.

        Called once before the training. Draw initial weights from `generator` only, so that they depend on the seed
        alone. The parameters are trained with the student and are not part of the saved model.
        """

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        """Return the term summed over its units, a scalar. Gradients flow to `student` only."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(student, teacher, batch)")

    def on_interval(self, progress: float) -> None:
        """Update the term's state. Called before every optimiser step with the fraction of the training done."""

    def after_step(self, step: int) -> None:
        """Update the term's state. Called after every optimiser step."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint must hold besides the parameters."""
        return {}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `extra_tensors`."""

    def results(self) -> dict[str, Any]:
        """Return what `results.json` records of the term after the training, by key."""
        return {}


def own_losses(configs: Sequence[OwnLossConfig]) -> list[LossTerm]:
    """Return the loss terms that a recipe names as ``module:Class``.

    Raises UserError if a class cannot be imported, is not a LossTerm, or does not accept its arguments.
    """
    terms = []
    for number, config in enumerate(configs):
        place = f"method.losses[{number}]"
        kind = load_object(config.loss, f"{place}.loss", LossTerm)
        term = construct(kind, config.arguments, f"{place}.arguments")
        term.name = term.name or kind.__name__
        term.schedule = config
        terms.append(term)
    names = [term.name for term in terms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"method.losses holds several terms named {repeated[0]!r}; give each class its own `name`")
    return terms

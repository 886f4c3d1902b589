"""The training task of every distillation method that is a sum of loss terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.distill.feature_hooks import FeatureHooks
from preceptor.distill.loss_term import LossTerm
from preceptor.errors import UserError
from preceptor.task import Batch, LossTerms, Task, Teacher, TeacherSignal

Forward = Callable[[nn.Module, Batch], TeacherSignal]


class HookedForward:
    """Run `forward(model, batch)` and add the outputs of the modules at `paths` to the signal's features.

    Raises UserError, with near names, for a path that the model does not have.
    """

    def __init__(self, forward: Forward, paths: Sequence[str]) -> None:
        self.forward, self.paths = forward, list(paths)
        self._hooks: dict[int, FeatureHooks] = {}

    def attach(self, model: nn.Module) -> FeatureHooks:
        """Return the hooks in `model`. The first call registers them."""
        if id(model) not in self._hooks:
            self._hooks[id(model)] = FeatureHooks(model, self.paths)
        return self._hooks[id(model)]

    def __call__(self, model: nn.Module, batch: Batch) -> TeacherSignal:
        if not self.paths:
            return self.forward(model, batch)
        with self.attach(model).capture() as features:
            signal = self.forward(model, batch)
            return replace(signal, features={**signal.features, **features})


class DistillationTask(Task):
    """A student that minimises a weighted sum of loss terms.

    Args:
        student: the model to train.
        losses: the terms, in the order of their sum.
        forward: ``forward(model, batch)`` runs the student.
        teacher: the teacher. Without one the terms receive None as its signal.
        teacher_config: configuration of the teacher's network, for the terms' parameters.
        pretrained: names of the student's parameters that did not start from scratch.
        seed: seed of the initial weights of the terms' parameters, such as projectors.

    Raises UserError if two terms have the same name, or the student lacks a module whose output a term uses.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[LossTerm],
        *,
        forward: Forward,
        teacher: Teacher | None = None,
        teacher_config: Any = None,
        pretrained: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.losses = nn.ModuleList(losses)
        self.pretrained_parameters = frozenset(f"student.{name}" for name in pretrained)
        self.progress = 0.0
        names = [term.name for term in losses]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two loss terms are named {repeated[0]!r}; give an own loss class another `name`")
        self._forward = HookedForward(forward, features_of(losses, "student"))
        if self._forward.paths:
            self._forward.attach(student)
        generator = torch.Generator().manual_seed(seed)
        for term in losses:
            term.prepare(student, teacher_config, generator)

    @property
    def terms(self) -> list[LossTerm]:
        """The loss terms in the order of their sum."""
        return list(self.losses)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> LossTerms:
        teacher = self.teacher.signal(batch) if self.teacher is not None else None
        batch = self.prepare(batch, teacher)
        student = self._forward(self.student, batch)
        loss = LossTerms()
        for term in self.terms:
            loss.add(term.name, term(student, teacher, batch), term.weight_at(self.progress), term.unit)
        return loss

    def prepare(self, batch: Batch, teacher: TeacherSignal | None) -> Batch:
        """Return the batch that the student and the loss terms see."""
        return batch

    def units(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch)}

    def on_interval(self, progress: float) -> None:
        self.progress = progress
        for term in self.terms:
            term.on_interval(progress)

    def after_step(self, step: int) -> None:
        for term in self.terms:
            term.after_step(step)

    def task_state(self) -> dict[str, Tensor]:
        states = {term.name: term.extra_tensors() for term in self.terms}
        return {f"losses.{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        for term in self.terms:
            prefix = f"losses.{term.name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if own:
                term.load_extra_tensors(own)

    def results(self) -> dict[str, Any]:
        return {key: value for term in self.terms for key, value in term.results().items()}


def features_of(losses: Sequence[LossTerm], side: str) -> list[str]:
    """Return the module paths whose outputs the terms use in the ``student`` or the ``teacher``, each once."""
    return list(dict.fromkeys(path for term in losses for path in getattr(term, f"{side}_features")))

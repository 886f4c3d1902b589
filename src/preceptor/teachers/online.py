"""Teachers that run on every batch: a frozen model, an ensemble, a moving average of the student.

Shapes: B batch, C answer classes, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from preceptor.distill.task import DistillationTask
from preceptor.errors import UserError
from preceptor.task import Batch, Teacher, TeacherSignal
from preceptor.training.average import WeightAverage

Forward = Callable[[nn.Module, Batch], TeacherSignal]
"""Computes a model's signal for a batch; the method supplies it."""


def weights_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state: sorted names, types, shapes and bytes of parameters and buffers.

    It is the same on every device. Settings without a tensor, such as dropout rates, are not included.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class OnlineTeacher:
    """A frozen model that is run on every batch.

    `model` is changed: its parameters no longer require gradients, and it is in eval mode for every signal, even after
    a call of `train()`. The teacher is not an `nn.Module`, so that a task that holds it neither trains nor saves its
    weights. `autocast` returns the context to compute in, for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.forward = forward
        self.autocast = autocast or nullcontext
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = weights_fingerprint(self.model)
        return self._fingerprint

    def signal(self, batch: Batch) -> TeacherSignal:
        self.model.eval()
        # Not inference_mode: the student's losses save the teacher's tensors for the backward pass.
        with torch.no_grad(), self.autocast():
            return self.forward(self.model, batch)

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self


class EmaTeacher(OnlineTeacher):
    """An exponential moving average of the student (mean teacher, Tarvainen and Valpola, NeurIPS 2017).

    `model` is a deep copy of the student. Its parameters are averaged in float32 (`WeightAverage`, updates t = 0, 1,
    ...), its buffers are copied. `decay` must be in (0, 1); 0.999 is usual.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        decay: float,
        warmup: bool = True,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> None:
        if not 0 < decay < 1:
            raise UserError(f"The decay of a moving-average teacher must be in (0, 1), not {decay}; 0.999 is usual.")
        super().__init__(model.float(), forward, autocast)
        self.decay, self.warmup, self.step = decay, warmup, 0

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards `student`, the bare module that `model` is a copy of. Call after every optimiser step."""
        assert student is not self.model, "a moving average needs its own copy of the student"
        averages, parameters = dict(self.model.named_parameters()), dict(student.named_parameters())
        assert averages.keys() == parameters.keys(), "the student is not the module that the average was copied from"
        WeightAverage(parameters, self.decay, warmup=self.warmup, values=averages).update(self.step)
        buffers = dict(student.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self.step += 1
        self._fingerprint = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, the buffers and the number of updates, for `Task.task_state`."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {"step": torch.tensor(self.step)} | {f"model.{name}": tensor.detach() for name, tensor in tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises UserError if it is the state of another network."""
        current = self.state_dict()
        wrong = sorted(current.keys() ^ state.keys()) or [n for n in current if current[n].shape != state[n].shape]
        if wrong:
            raise UserError(
                f"The saved moving-average teacher does not fit this student: {', '.join(wrong[:5])} differ "
                f"({len(wrong)} in all). Train with the recipe that it was saved with, or in a new output folder."
            )
        for name in current.keys() - {"step"}:
            current[name].copy_(state[name])
        self.step = int(state["step"])
        self._fingerprint = None


class TaughtTask(DistillationTask):
    """A distillation task whose teacher may be a moving average of the student.

    Such a teacher is updated after every step, and its state is part of the checkpoints.
    """

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if isinstance(self.teacher, EmaTeacher):
            self.teacher.update(self.student)

    def task_state(self) -> dict[str, Tensor]:
        state = super().task_state()
        if isinstance(self.teacher, EmaTeacher):
            state |= {f"teacher.{key}": value for key, value in self.teacher.state_dict().items()}
        return state

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        super().load_task_state(state)
        if isinstance(self.teacher, EmaTeacher):
            prefix = "teacher."
            self.teacher.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


class EnsembleTeacher:
    """Several classifiers with the same answer classes in the same order. The caller checks the order.

    `logits` are the logarithms of the members' mean probabilities, so that their softmax is the mean distribution. A
    temperature softens the mean distribution, not each member's. Features and mask are those of the first member,
    because features of different networks have no common coordinates.
    """

    def __init__(self, sources: Sequence[Teacher]) -> None:
        if not sources:
            raise UserError("An ensemble of teachers needs at least one; the list of teachers is empty.")
        self.sources = list(sources)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(source.fingerprint for source in self.sources).encode()).hexdigest()

    def signal(self, batch: Batch) -> TeacherSignal:
        signals = [source.signal(batch) for source in self.sources]
        members = [signal.logits for signal in signals if signal.logits is not None]
        assert len(members) == len(signals), "only classifiers form an ensemble"
        classes = [logits.shape[-1] for logits in members]
        if len(set(classes)) > 1:
            raise UserError(
                f"The teachers of an ensemble have {', '.join(map(str, classes))} answer classes; they must be trained "
                "with the same answer vocabulary."
            )
        log_probabilities = torch.stack([logits.float().log_softmax(-1) for logits in members])
        logits_BC = log_probabilities.logsumexp(0) - math.log(len(signals))
        return TeacherSignal(logits_BC, signals[0].features, signals[0].mask)

    def to(self, device: torch.device | str) -> Self:
        self.sources = [source.to(device) for source in self.sources]
        return self

from __future__ import annotations

import torch
from torch import Tensor, nn

from preceptor.distill.loss_term import LossTerm
from preceptor.distill.task import DistillationTask
from preceptor.task import TeacherSignal


class Counting(LossTerm):
    """A term with a state."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def after_step(self, step: int) -> None:
        self.count += step

    def extra_tensors(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        (count,) = tensors.values()
        self.count = int(count)


def task_of(*names: str) -> DistillationTask:
    return DistillationTask(nn.Linear(1, 1), [Counting(name) for name in names], forward=lambda *_: TeacherSignal())


def test_each_term_gets_its_own_state_back():
    task, again = task_of("hidden/0", "hidden/0-1"), task_of("hidden/0-1", "hidden/0")
    task.terms[1].after_step(3)
    again.load_task_state(task.task_state())
    assert [term.count for term in again.terms] == [3, 0]

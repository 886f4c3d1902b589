"""A moving average of the weights that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from preceptor.task import Task


class WeightAverage:
    """Exponential moving average of the weights that train (Polyak averaging), quicker at first: at step t the decay is
    ``min(decay, (1 + t) / (10 + t))``. With decay 0 there is none, and `applied` changes nothing."""

    def __init__(self, task: Task, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in task.named_parameters() if p.requires_grad} if decay else {}
        self.values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - decay)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(tensors[name])

    def to(self, device: torch.device) -> None:
        self.values = {name: value.to(device) for name, value in self.values.items()}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model, and the trained weights back afterwards."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.values[name])
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)

"""Exponential moving average of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of parameters (Polyak averaging), the only one in the package.

    Update number t sets ``average = d * average + (1 - d) * parameter`` with ``d = min(decay, (1 + t) / (10 + t))``,
    the warm-up of TensorFlow's ExponentialMovingAverage, which forgets the random weights of the start quickly; without
    `warmup`, d = decay. Averages keep their own type, so that float32 averages of bfloat16 parameters do not lose small
    steps. (`torch.optim.swa_utils.AveragedModel` has no warm-up, copies the whole model, and does not shard.)

    Args:
        parameters: the parameters to average, by name.
        decay: in [0, 1). With 0, nothing is averaged and `applied` changes nothing.
        values: the tensors to average into, by the same names; by default copies of the parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        *,
        warmup: bool = True,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.decay, self.warmup = decay, warmup
        self.parameters = dict(parameters) if decay else {}
        if values is None:
            values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.values = {name: values[name] for name in self.parameters}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters, as update number `step`."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
            latest = [self.parameters[name].detach().to(value.dtype) for name, value in self.values.items()]
            torch._foreach_lerp_(list(self.values.values()), latest, 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(tensors[name])

    def to(self, device: torch.device) -> None:
        self.values = {name: value.to(device) for name, value in self.values.items()}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model, and the trained weights back afterwards."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._copy(self.values)
            yield
        finally:
            self._copy(trained)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

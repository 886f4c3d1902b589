"""The nouns of training that every room shares: Batch, TeacherSignal, LossTerms, TeacherSource, Task.

Shape suffixes in names: B batch, C answer classes, L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from preceptor.data.types import Prediction


@dataclass
class Batch:
    """A micro-batch.

    `tensors` are what the task computes with (for VQA: `pixels` (B, 3, h, w) float, `input_ids` (B, L) int64,
    `attention_mask` (B, L) int64, `labels` (B,) int64 with -100 for an answer outside the classes; for volumes:
    `images` (B, N, D, H, W) float, zero where a modality is missing, `available` (B, N) bool, `masks` (B, R, D, H, W)
    float, one channel per region, `labelled` (B,) bool, False where the masks are unknown and 0). `ids` are data set
    ids, for error messages and predictions. `keys` are content keys, one per sample: a hash of the image file's bytes,
    the question and the augmentation view; a cached teacher is addressed by them, never by position. `skipped` are the
    ids of rows that were drawn and left out because their image is broken.
    """

    tensors: dict[str, Tensor]
    ids: list[str]
    keys: list[str]
    skipped: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device) -> Batch:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.ids, self.keys, self.skipped)

    def pin_memory(self) -> Batch:
        pinned = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return Batch(pinned, self.ids, self.keys, self.skipped)


@dataclass
class TeacherSignal:
    """What a teacher says about a batch, without gradients.

    `logits` is (B, C). `features` maps a tap name (a module path such as `fusion.layers.3`, matched by `distill.taps`)
    to that module's output, batch first. `mask` (B, L), where given, marks the tokens of the fused sequence that are
    not padding.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None


@dataclass
class LossTerms:
    """Named loss terms of one micro-batch.

    `sums[name]` is a scalar: the term summed over its units (samples, tokens). `units[name]` says which unit.
    The loop divides by the number of units in the whole global batch, over micro-batches and processes, so that
    gradient accumulation weighs every unit alike instead of averaging averages. `weights[name]` multiplies the term
    in the total. No value is synchronised to the host here.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, weight: float, unit: str = "samples") -> None:
        self.sums[name], self.weights[name], self.units[name] = total, weight, unit

    def total(self, counts: Mapping[str, Tensor | float]) -> Tensor:
        """Return the weighted sum of the terms' means, given the number of units of each kind."""
        parts = [self.weights[n] * self.sums[n] / counts[self.units[n]] for n in self.sums]
        return sum(parts[1:], parts[0])


class TeacherSource(Protocol):
    """Anything that can teach: online, ensemble, moving average, cached. All look the same to a task."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes whenever the teacher's weights do."""
        ...

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return what the teacher says about `batch`; no gradient flows and no module is left in training mode."""
        ...

    def to(self, device) -> TeacherSource: ...


class Task(nn.Module):
    """What the loop trains: a student, and what it learns from.

    `forward` and `units` make the loss, `predict` answers. The teacher is no submodule: its weights are neither moved
    by the optimiser nor saved with the student.
    """

    student: nn.Module

    def forward(self, batch: Batch) -> LossTerms:
        raise NotImplementedError

    def units(self, batch: Batch) -> dict[str, int]:
        """Return how many units of each kind the batch holds, for instance ``{"samples": 32, "labelled": 31}``."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> list[Prediction]:
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after every optimiser step, on every process: an EMA teacher moves here."""

    def on_interval(self, progress: float) -> None:
        """Called with the share of the training done, in [0, 1], before every optimiser step: schedules move here."""

    def task_state(self) -> dict[str, Tensor]:
        """Return what training needs beside the student's weights (projectors, EMA weights); never exported."""
        return {}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `task_state` returned."""

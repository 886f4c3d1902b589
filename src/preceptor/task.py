"""The types that all tasks share: Batch, TeacherSignal, Teacher, LossTerms, Task.

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


@dataclass(frozen=True)
class HiddenTeacher:
    """Logits over a large vocabulary as factors: hidden states (T, E) of T tokens and output weights (W, E).

    No gradient reaches either. If W differs from the student's vocabulary size V, both distributions are those of the
    first min(V, W) tokens, renormalised: the extra columns must be padding (`vocabulary.same_vocabulary` checks it).
    """

    hidden_TE: Tensor
    weight_WE: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """The K most likely vocabulary entries at each of T tokens.

    Log-probabilities (T, K), ids (T, K) and the logarithm of the probability of all other entries (T,), at the
    temperature of the loss: those of another temperature cannot be computed from them. The ids of a row differ and are
    below V.
    """

    log_probabilities_TK: Tensor
    ids_TK: Tensor
    log_tail_T: Tensor


@dataclass
class TeacherSignal:
    """A teacher's output for a batch, without gradients.

    A classifier or a segmentation network gives `logits`, (B, C) or (B, R, D, H, W). A language model gives `tokens`,
    its distribution over the vocabulary at each answer token of the batch, in the order of the batch's rows.
    `features` maps a name, usually a module path such as `fusion.3` (`distill.feature_hooks`), to a tensor with the
    batch first. `mask` (B, L), if given, is True for the tokens of the fused sequence that are not padding.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    tokens: HiddenTeacher | TopKTeacher | None = None


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


class Teacher(Protocol):
    """A source of teacher signals: a frozen model, an ensemble, a moving average or a cache. A task sees no difference.

    A teacher is not a submodule of the task: its weights are neither trained nor saved with the student.
    """

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes whenever the teacher's weights do."""
        ...

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the teacher's output for `batch`, on the batch's device, without gradients and in eval mode."""
        ...

    def to(self, device) -> Teacher: ...


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

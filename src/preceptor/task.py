"""The types that all tasks share: Batch, TeacherSignal, Teacher, LossTerms, Task.

Shape suffixes in names: B batch, C answer classes, L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from torch import Tensor, nn


@dataclass
class Batch:
    """A micro-batch of B samples.

    Attributes:
        tensors: the inputs and targets of the task, by name. VQA: `pixels` (B, 3, h, w) float, `input_ids` and
            `attention_mask` (B, L) int64, `labels` (B,) int64, -100 for an answer outside the classes, `answered` (B,)
            bool, False if no answer is known. Segmentation: `images` (B, N, D, H, W) float, zero where a modality is
            missing, `available` (B, N) bool, `masks` (B, R, D, H, W) float, one channel per region, `labelled` (B,)
            bool, False if the masks are unknown and 0.
        ids: ids in the data set, for error messages and predictions.
        keys: content keys, one per sample: a hash of the image file, the question and the augmentation view. A teacher
            cache is addressed by these keys, never by position.
        skipped: ids of rows that were drawn and left out because their image is broken.
    """

    tensors: dict[str, Tensor]
    ids: list[str]
    keys: list[str]
    skipped: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device) -> Self:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)

    def pin_memory(self) -> Self:
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def narrow(self, start: int, length: int) -> Self:
        """Return the batch of `length` samples from `start` on. Padding stays.

        A task whose tensors do not all have one row per sample overrides this in a subclass.
        """
        rows = slice(start, start + length)
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, ids=self.ids[rows], keys=self.keys[rows], skipped=[])


@dataclass(frozen=True)
class HiddenTeacher:
    """Logits over a large vocabulary as factors: hidden states (T, E) of T tokens and output weights (W, E).

    No gradient reaches either. If W differs from the student's vocabulary size V, both distributions are those of the
    first min(V, W) tokens, renormalised: the extra columns must be padding (see
    `vocabulary.require_same_vocabulary`).
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

    `sums[name]` is a scalar: the term summed over its units, such as samples or tokens. `units[name]` names the unit.
    The loop divides by the number of units in the global batch, over all micro-batches and processes, so that every
    unit has the same weight under gradient accumulation. `weights[name]` multiplies the term in the total. No value is
    synchronised to the host.
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
    """A student and its loss: what the training loop needs to know.

    A teacher is not a submodule: the optimiser does not change its weights, and they are not saved with the student.
    """

    student: nn.Module
    teacher: Teacher | None = None
    pretrained_parameters: frozenset[str] = frozenset()
    """Names of parameters that did not start from scratch; they train with `train.pretrained_lr_scale`."""
    learning_rates: Mapping[str, float] = {}
    """Learning rates of single parameters by name, instead of `train.learning_rate`. The schedule is the same."""

    def forward(self, batch: Batch) -> LossTerms:
        """Return the loss terms of a micro-batch, each summed over its units."""
        raise NotImplementedError

    def units(self, batch: Batch) -> dict[str, int]:
        """Return the number of units of each kind in the batch, for instance ``{"samples": 32, "labelled": 31}``."""
        raise NotImplementedError

    def on_interval(self, progress: float) -> None:
        """Update schedules. Called before every optimiser step with the fraction of the training done, in [0, 1]."""

    def after_step(self, step: int) -> None:
        """Update state that follows the student, such as an EMA teacher. Called after every optimiser step."""

    def task_state(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint must hold besides the parameters. It is never exported."""
        return {}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `task_state`."""

    def results(self) -> dict[str, Any]:
        """Return what `results.json` records of the method, by key, after the training."""
        return {}

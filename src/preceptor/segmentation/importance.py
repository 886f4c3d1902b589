"""MetaKD's distances between modalities, and the importance of modalities that weighs them.

Shapes: B batch, N modalities, C channels, d h w voxels of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preceptor.distill.loss_term import LossTerm
from preceptor.distributed import broadcast_from_main
from preceptor.errors import UserError
from preceptor.segmentation.losses import bce_loss, dice_loss
from preceptor.segmentation.settings import ImportanceConfig, WeightedPairsTerm
from preceptor.task import Batch, TeacherSignal

if TYPE_CHECKING:
    from preceptor.segmentation.model import MultimodalUNet


def weighted_pairs(features_BNCdhw: Tensor, available_BN: Tensor, importance_N: Tensor) -> Tensor:
    """Return (B,): ``sum over i != j, both available, of stop(s_i / s_j) |stop(f_i) - f_j|``, mean over channels and
    voxels.

    Features of absent modalities are ignored. A sample with one modality has loss 0. Half precision is computed in
    float32.
    """
    s = importance_N.detach().to(features_BNCdhw.device)
    # Mask before any arithmetic: 0 times the gradient of an infinite value is not 0.
    f = torch.where(available_BN[:, :, None, None, None, None], features_BNCdhw, features_BNCdhw.new_zeros(()))
    f = (f if f.dtype == torch.float64 else f.float()).flatten(2)
    losses = f.new_zeros(len(f))
    for i in range(f.shape[1]):
        distance_BN = (f[:, i : i + 1].detach() - f).abs().mean(dim=2)
        pairs_BN = available_BN & available_BN[:, i : i + 1]
        pairs_BN[:, i] = False
        losses = losses + torch.where(pairs_BN, distance_BN * (s[i] / s), distance_BN.new_zeros(())).sum(dim=1)
    return losses


class WeightedPairsLoss(LossTerm):
    """`weighted_pairs` of one or all levels. The importance takes a step of Adam after every few optimiser steps.

    ``held_out(n)`` returns batch number n of the held-out cases. The importance is recorded every `record_every` steps.
    """

    name = "pairs"

    def __init__(
        self,
        student: MultimodalUNet,
        term: WeightedPairsTerm,
        config: ImportanceConfig,
        held_out: Callable[[int], Batch],
        record_every: int = 1,
    ) -> None:
        super().__init__()
        self.schedule, self.config, self.record_every = term, config, record_every
        self.modalities, levels = student.config.modalities, len(student.config.widths)
        self.levels = list(range(levels)) if term.levels == "all" else [levels - 1]
        # Not a parameter of the task, whose optimiser must not train it.
        self.scores_N = torch.zeros(len(self.modalities), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.scores_N], lr=config.learning_rate)
        self.updates = 0
        self.history: list[tuple[int, list[float]]] = []
        # A closure, because an attribute would make the student a submodule of the term.
        self._loss: Callable[[Batch], Tensor] = lambda batch: held_out_loss(student, batch, self.importance())
        self._held_out = held_out

    def importance(self) -> Tensor:
        """Return (N,): positive weights of the modalities, whose sum is 1."""
        return self.scores_N.softmax(dim=0)

    def forward(self, student: TeacherSignal, teacher: TeacherSignal | None, batch: Batch) -> Tensor:
        importance = self.importance()
        levels = [weighted_pairs(student.features[f"level.{n}"], batch["visible"], importance) for n in self.levels]
        return torch.stack(levels).mean(dim=0).sum()

    def after_step(self, step: int) -> None:
        if step % self.config.every == 0:
            batch = self._held_out(self.updates)
            self.updates += 1
            if len(batch):
                self.optimizer.zero_grad()
                # The gradient of the network's weights is not needed, and must not be added to that of the next step.
                (gradient_N,) = torch.autograd.grad(self._loss(batch), [self.scores_N])
                if not bool(torch.isfinite(gradient_N).all()):
                    raise UserError(
                        f"the loss of the held-out cases {', '.join(batch.ids)} is not finite at step {step}; check "
                        "their images, or lower train.learning_rate"
                    )
                self.scores_N.grad = gradient_N
                self.optimizer.step()
                with torch.no_grad():
                    self.scores_N.copy_(broadcast_from_main(self.scores_N.detach()))
        if step % self.record_every == 0:
            self.history.append((step, self.importance().tolist()))

    def extra_tensors(self) -> dict[str, Tensor]:
        n = len(self.modalities)
        return {
            "scores": self.scores_N.detach().clone(),
            "updates": torch.tensor(self.updates),
            "steps": torch.tensor([step for step, _ in self.history], dtype=torch.int64),
            "history": torch.tensor([row for _, row in self.history], dtype=torch.float64).reshape(-1, n),
            **{f"adam.{name}": value for name, value in self.optimizer.state[self.scores_N].items()},
        }

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.scores_N.copy_(tensors["scores"])
        self.updates = int(tensors["updates"])
        self.history = list(zip(tensors["steps"].tolist(), tensors["history"].tolist(), strict=True))
        if moments := {k.removeprefix("adam."): v.clone() for k, v in tensors.items() if k.startswith("adam.")}:
            self.optimizer.state[self.scores_N] = moments

    def results(self) -> dict[str, Any]:
        history = [{"step": step, **dict(zip(self.modalities, row, strict=True))} for step, row in self.history]
        return {"importance": history}


def held_out_loss(student: MultimodalUNet, batch: Batch, importance_N: Tensor) -> Tensor:
    """Return Dice + BCE of a batch from all available modalities, each feature times the importance of its modality.

    The mean over samples, in eval mode. The student's features are computed without gradients, because the importance
    has no effect on them.
    """
    training, device = student.training, next(student.parameters()).device
    batch = batch.to(device)
    student.eval()
    try:
        with torch.no_grad():
            features = student.encode_available(batch["images"], batch["available"])
        weights = importance_N.to(device)[None, :, None, None, None, None]
        depth, height, width = batch["images"].shape[2:]
        logits = student.decode([f * weights for f in features], batch["available"], (depth, height, width))
    finally:
        student.train(training)
    return (dice_loss(logits, batch["masks"]) + bce_loss(logits, batch["masks"])) / len(batch)

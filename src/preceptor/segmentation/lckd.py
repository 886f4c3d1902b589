"""LCKD: learnable cross-modal knowledge distillation for missing modalities (Wang et al., MICCAI 2023).

Each sample shows a subset of its modalities. A vote on validation cases finds which modality, alone, segments each
region best; their features teach those of the other modalities:

    segmentation  Dice + BCE of the masks from the modalities shown                        section 2.3, eq. 4
    cross_modal   |stop(f_t) - f_s| of the bottlenecks, t elected and shown, s shown        section 2.2, eq. 2
    full/output   T^2 KL of each voxel's probability, from a network that sees everything   (mmFormer's peers; not LCKD)
    full/features |stop(mean f of the teacher) - mean f of the student|                     (likewise)

What paper and published code leave open or do differently is a setting (docs/paper_index.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.distill.projectors import Projectors
from preceptor.segmentation.config import LckdConfig
from preceptor.segmentation.cross_modal import cross_modal
from preceptor.segmentation.election import Election
from preceptor.segmentation.losses import bce_loss, dice_loss
from preceptor.segmentation.modality_dropping import drop_modalities
from preceptor.segmentation.model import MultimodalUNet, Segmentation
from preceptor.task import Batch, LossTerms, Task, Teacher, TeacherSignal
from preceptor.teachers.online import OnlineTeacher
from preceptor.vqa.mhkd import schedule


class LckdTask(Task):
    """A network for any subset of modalities, and what it learns from beside the masks."""

    student: MultimodalUNet

    def __init__(
        self,
        student: MultimodalUNet,
        config: LckdConfig,
        *,
        distil: bool = True,
        votes: Callable[[MultimodalUNet], Tensor] | None = None,
        vote_every: int = 0,
        teacher: Teacher | None = None,
    ) -> None:
        """`votes(network)` returns the soft Dice (N, R) of every modality alone on validation cases; it is asked before
        the first step and after every `vote_every` steps. `teacher` sees all modalities (`full_modality_teacher`).
        Without `distil` the network learns from the masks alone, at the same dropping.
        """
        super().__init__()
        self.student, self.config = student, config
        self.distil = distil
        self.progress, self.step = 0.0, 0
        own = student.config
        self.election: Election | None = None
        if distil and config.cross_modal.weight > 0:
            if votes is None or vote_every < 1:
                raise ValueError("the election needs votes, and a number of steps between them")
            self.votes, self.vote_every = votes, vote_every
            self.election = Election(own.modalities, own.regions)
            if config.election.initial is not None:
                self.election.appoint(config.election.initial)
            if config.cross_modal.projector:
                levels = range(len(own.widths)) if config.cross_modal.levels == "all" else [len(own.widths) - 1]
                widths = {f"{level} {m}": (own.widths[level],) * 2 for level in levels for m in own.modalities}
                self.projectors = Projectors(widths)
        self.teacher = teacher

    def forward(self, batch: Batch) -> LossTerms:
        c = self.config
        shown = drop_modalities(batch["available"], c.dropping, self.progress)
        found = self.student(batch["images"], shown)
        loss = LossTerms()
        masks, signal = batch["masks"], None
        if self.teacher is not None:
            signal = self.teacher.signal(batch)
            assert signal.logits is not None
            # The teacher's masks replace those of cases that have none.
            labelled = batch["labelled"][:, None, None, None, None]
            masks = torch.where(labelled, masks, (signal.logits > 0).to(masks.dtype))
        loss.add("dice", dice_loss(found.logits, masks), c.loss.dice)
        loss.add("bce", bce_loss(found.logits, masks, c.loss.bce_reduction), c.loss.bce)
        if self.election is not None:
            loss.add(
                "cross_modal", self._cross_modal(found, shown, masks).sum(), schedule(c.cross_modal, self.progress)
            )
        if signal is not None:
            self._from_full(loss, batch, found, shown, signal)
        return loss

    def _cross_modal(self, found: Segmentation, shown: Tensor, masks: Tensor) -> Tensor:
        """Return (B,): mean over the levels that are compared, summed over regions that teach apart."""
        assert self.election is not None
        term = self.config.cross_modal
        levels = range(len(found.features)) if term.levels == "all" else [len(found.features) - 1]
        teachers = self.election.teachers(self.config.teachers)
        # Per task, each region's teacher speaks where that region lies.
        groups: list[tuple[list[int], Tensor | None]] = [(teachers, None)]
        if self.config.teachers == "per_task":
            groups = [([teacher], masks[:, region]) for region, teacher in enumerate(teachers)]
        total = found.logits.new_zeros(len(shown), dtype=torch.float32)
        for level in levels:
            features = found.features[level]
            projected = self._projected(level, features) if term.projector else None
            for group, region in groups:
                where = None if region is None else _on_grid(region, features.shape[-3:])
                distance, _ = cross_modal(
                    features,
                    shown,
                    group,
                    students=term.students,
                    distance=term.distance,
                    pairs=term.pairs,
                    normalise=term.normalise,
                    where_Bdhw=where,
                    projected_BNCdhw=projected,
                )
                total = total + distance / len(groups)
        return total / len(levels)

    def _projected(self, level: int, features_BNCdhw: Tensor) -> Tensor:
        last = features_BNCdhw.movedim(2, -1)
        names = self.student.config.modalities
        found = [self.projectors(f"{level} {name}", last[:, i]) for i, name in enumerate(names)]
        return torch.stack(found, dim=1).movedim(-1, 2)

    def _from_full(
        self, loss: LossTerms, batch: Batch, found: Segmentation, shown: Tensor, signal: TeacherSignal
    ) -> None:
        assert signal.logits is not None
        term, weight = self.config.full, schedule(self.config.full, self.progress)
        loss.add("full/output", binary_kl(found.logits, signal.logits, term.temperature).sum(), weight)
        if term.features > 0:
            mine = mean_available(found.features[-1], shown)
            target = mean_available(signal.features["bottleneck"], batch["available"])
            distance = (mine - target).abs().flatten(1).mean(dim=1)
            loss.add("full/features", distance.sum(), weight * term.features)

    def units(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch)}

    def on_interval(self, progress: float) -> None:
        self.progress = progress
        if self.election is not None and self.election.overall < 0:
            self._vote(0)

    def after_step(self, step: int) -> None:
        if self.election is not None and step % self.vote_every == 0:
            self._vote(step)

    def _vote(self, step: int) -> None:
        assert self.election is not None
        training = self.student.training
        self.student.eval()
        with torch.inference_mode():
            scores = self.votes(self.student)
        self.student.train(training)
        self.election.vote(step, scores.clone())

    def task_state(self) -> dict[str, Tensor]:
        return {} if self.election is None else {f"election.{k}": v for k, v in self.election.state().items()}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        if self.election is not None:
            self.election.load({key.removeprefix("election."): value for key, value in state.items()})

    def history(self) -> list[dict[str, Any]]:
        """Return the votes so far, as `Election.history`."""
        return [] if self.election is None else self.election.history()


def full_modality_teacher(network: MultimodalUNet) -> OnlineTeacher:
    """Return a frozen teacher that sees all available modalities of a batch.

    Its signal holds the logits (B, R, D, H, W) and the feature `bottleneck` (B, N, C, d, h, w).
    """

    def forward(model: torch.nn.Module, batch: Batch) -> TeacherSignal:
        output: Segmentation = model(batch["images"], batch["available"])
        return TeacherSignal(output.logits, {"bottleneck": output.features[-1]})

    return OnlineTeacher(network, forward)


def binary_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return (B,): T^2 KL(sigmoid(t/T) || sigmoid(s/T)), the mean over regions and voxels (Hinton et al. 2015).

    The regions overlap, so each voxel holds R distributions over two classes. `logits` (B, R, D, H, W).
    """
    s, t = logits.float() / temperature, teacher_logits.float() / temperature
    p = torch.sigmoid(t)
    kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * kl.flatten(1).mean(dim=1)


def mean_available(features: Tensor, available: Tensor) -> Tensor:
    """Return (B, C, d, h, w): the mean of features (B, N, C, d, h, w) over the `available` (B, N) modalities."""
    weight = available.to(torch.float32) / available.sum(dim=1, keepdim=True)
    return torch.einsum("bncdhw,bn->bcdhw", features.float(), weight)


def _on_grid(region: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return (B, d, h, w): 1 where a cell of the feature grid holds any voxel of the region (B, D, H, W)."""
    return F.adaptive_max_pool3d(region[:, None].float(), size)[:, 0]

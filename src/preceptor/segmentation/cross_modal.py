"""LCKD's distillation between the modalities of a sample (Wang et al., MICCAI 2023): elected ones teach the others.

Shapes: B batch, N modalities, C channels, d h w voxels of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preceptor.distill.loss_term import LossTerm
from preceptor.distill.projectors import projector
from preceptor.segmentation.election import Election
from preceptor.segmentation.settings import CrossModalTerm
from preceptor.task import Batch, TeacherSignal

if TYPE_CHECKING:
    from preceptor.segmentation.model import MultimodalUNet

Distance = Literal["l1", "mse", "cosine"]


def cross_modal(
    features_BNCdhw: Tensor,
    available_BN: Tensor,
    teachers: Sequence[int],
    *,
    students: Literal["others", "all"] = "others",
    distance: Distance = "l1",
    normalise: bool = False,
    pairs: Literal["sum", "mean"] = "sum",
    where_Bdhw: Tensor | None = None,
    projected_BNCdhw: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (losses (B,), number of pairs (B,)): per sample the distances of available students to available teachers.

    ``loss_b = sum over elected t, over students s != t, both available in b, of distance(stop_gradient(f_t), f_s)``,
    divided by the number of such pairs with `pairs="mean"`. A sample with one modality, or with no teacher, or with
    teachers only and students ``others``, has no pair and loss 0.

    `features_BNCdhw`: the encoder's features before the fill-in. Those of an absent modality are ignored.
    `teachers`: indices of the elected modalities; duplicates count once. `students`: ``others`` are the modalities that
    are not elected; with ``all`` teachers also learn from one another, as in the published code (which also adds a
    teacher's distance to itself, 0).

    `distance` of a pair: ``l1`` (published) and ``mse`` are means over channels and voxels, ``cosine`` is the mean over
    voxels of 1 - cos across channels. `normalise` first brings every voxel to mean 0 and variance 1 across channels, so
    that small features do not give a small distance; the published code does not.
    `projected_BNCdhw`, if given, replaces the students' features: each modality's through its own projector (FitNets,
    Romero et al. 2015).
    `where_Bdhw`, weights of at least 0, weighs the means over voxels. A sample without any positive weight has no pair.
    Half precision is computed in float32; float64 stays.
    """
    n = features_BNCdhw.shape[1]
    elected = sorted(set(teachers))
    assert all(0 <= t < n for t in elected), f"teachers {list(teachers)} of {n} modalities"

    def prepared(features: Tensor) -> Tensor:
        # Mask before any arithmetic: 0 times the gradient of an infinite value is not 0.
        available = available_BN[:, :, None, None, None, None]
        x = torch.where(available, features, features.new_zeros(())).flatten(3).movedim(2, -1)
        x = x if x.dtype == torch.float64 else x.float()
        return F.layer_norm(x, x.shape[-1:]) if normalise else x

    f = prepared(features_BNCdhw)
    student = f if projected_BNCdhw is None else prepared(projected_BNCdhw)
    is_student = torch.ones(n, dtype=torch.bool, device=f.device)
    if students == "others":
        is_student[elected] = False
    weight_BV = None if where_Bdhw is None else where_Bdhw.flatten(1).to(f.dtype)
    can_teach = available_BN if weight_BV is None else available_BN & (weight_BV.sum(dim=1, keepdim=True) > 0)
    losses, counts = f.new_zeros(len(f)), torch.zeros(len(f), dtype=torch.long, device=f.device)
    for t in elected:
        eligible = is_student.clone()
        eligible[t] = False
        pairs_BN = available_BN & can_teach[:, t : t + 1] & eligible
        values_BN = _mean(_distance(student, f[:, t : t + 1].detach(), distance), weight_BV)
        losses = losses + torch.where(pairs_BN, values_BN, values_BN.new_zeros(())).sum(dim=1)
        counts = counts + pairs_BN.sum(dim=1)
    if pairs == "mean":
        losses = losses / counts.clamp(min=1)
    return losses, counts


def _distance(f_BNVC: Tensor, teacher_B1VC: Tensor, distance: Distance) -> Tensor:
    """Return (B, N, V): the distance in each voxel."""
    if distance == "cosine":
        return 1 - F.cosine_similarity(f_BNVC, teacher_B1VC, dim=-1, eps=1e-8)
    difference = f_BNVC - teacher_B1VC
    return (difference.abs() if distance == "l1" else difference.square()).mean(dim=-1)


def _mean(values_BNV: Tensor, weight_BV: Tensor | None) -> Tensor:
    """Return (B, N): the mean over voxels, weighted; 0 if all weights are 0."""
    if weight_BV is None:
        return values_BNV.mean(dim=-1)
    total_B1 = weight_BV.sum(dim=1, keepdim=True)
    return torch.einsum("bnv,bv->bn", values_BNV, weight_BV) / total_B1.clamp(min=torch.finfo(total_B1.dtype).tiny)


class CrossModalLoss(LossTerm):
    """The `cross_modal` distance of one or all levels, between the elected modalities and the others.

    ``votes(student)`` returns the soft Dice (N, R) of each modality alone on validation cases. It is called after
    `first` steps and then every `every` steps. By default `first` is 0, before the first step, or `every` if `initial`
    names the first teacher modality.
    """

    name = "cross_modal"

    def __init__(
        self,
        student: MultimodalUNet,
        config: CrossModalTerm,
        teachers: Literal["single", "multi", "per_task"],
        *,
        votes: Callable[[MultimodalUNet], Tensor],
        every: int,
        initial: str | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.config, self.teachers, self.every = config, config, teachers, every
        self.first = first if first is not None else 0 if initial is None else every
        self.modalities, levels = student.config.modalities, len(student.config.widths)
        self.levels = list(range(levels)) if self.config.levels == "all" else [levels - 1]
        self.election = Election(student.config.modalities, student.config.regions)
        if initial is not None:
            self.election.appoint(initial)
        # A closure, because an attribute would make the student a submodule of the term.
        self._vote: Callable[[int], None] = lambda step: self.election.vote(step, _evaluated(student, votes))

    def prepare(self, student: nn.Module, teacher_config: Any, generator: torch.Generator) -> None:
        if self.config.projector:
            widths = cast("MultimodalUNet", student).config.widths
            self.projectors = nn.ModuleDict(
                {
                    f"{level} {name}": projector(widths[level], widths[level], generator)
                    for level in self.levels
                    for name in self.modalities
                }
            )

    def forward(self, student: TeacherSignal, teacher: TeacherSignal | None, batch: Batch) -> Tensor:
        assert student.logits is not None
        visible = batch["visible"]
        teachers = self.election.teachers(self.teachers)
        # With `per_task` the teacher of a region teaches inside that region only.
        groups: list[tuple[list[int], Tensor | None]] = [(teachers, None)]
        if self.teachers == "per_task":
            groups = [([t] if t >= 0 else [], batch["masks"][:, region]) for region, t in enumerate(teachers)]
        total = student.logits.new_zeros(len(visible), dtype=torch.float32)
        for level in self.levels:
            features = student.features[f"level.{level}"]
            projected = self._project(level, features) if self.config.projector else None
            for group, region in groups:
                distance, _ = cross_modal(
                    features,
                    visible,
                    group,
                    students=self.config.students,
                    distance=self.config.distance,
                    pairs=self.config.pairs,
                    normalise=self.config.normalise,
                    where_Bdhw=None if region is None else _on_grid(region, features.shape[-3:]),
                    projected_BNCdhw=projected,
                )
                total = total + distance / len(groups)
        return (total / len(self.levels)).sum()

    def _project(self, level: int, features_BNCdhw: Tensor) -> Tensor:
        last = features_BNCdhw.movedim(2, -1)
        projected = [self.projectors[f"{level} {name}"](last[:, i]) for i, name in enumerate(self.modalities)]
        return torch.stack(projected, dim=1).movedim(-1, 2)

    def on_interval(self, progress: float) -> None:
        if self.election.overall < 0:
            self._vote(0)

    def after_step(self, step: int) -> None:
        if step >= self.first and (step - self.first) % self.every == 0:
            self._vote(step)

    def extra_tensors(self) -> dict[str, Tensor]:
        return self.election.state()

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.election.load(tensors)

    def results(self) -> dict[str, Any]:
        return {"elections": self.election.history()}


def _evaluated(student: MultimodalUNet, votes: Callable[[MultimodalUNet], Tensor]) -> Tensor:
    """Return ``votes(student)`` with the student in eval mode."""
    training = student.training
    student.eval()
    with torch.inference_mode():
        scores = votes(student)
    student.train(training)
    return scores.clone()


def _on_grid(region: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return (B, d, h, w): 1 where a cell of the feature grid holds any voxel of the region (B, D, H, W)."""
    return F.adaptive_max_pool3d(region[:, None].float(), size)[:, 0]

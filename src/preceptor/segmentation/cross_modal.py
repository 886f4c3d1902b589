"""LCKD's distillation between modalities of one sample (Wang et al., MICCAI 2023): elected ones teach the others.

Shapes: B batch, N modalities, C channels, d h w voxels of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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

    `features_BNCdhw`: the encoder's, before fill-in; what stands where a modality is absent is not looked at.
    `teachers`: indices of the elected modalities; one that is named twice counts once. `students`: ``others`` are the
    modalities that are not elected; ``all`` lets teachers learn from one another, as the published code does (where a
    teacher's distance to itself, 0, is added too).

    `distance` per pair: ``l1`` (published) and ``mse`` are means over channels and voxels, ``cosine`` is the mean over
    voxels of 1 - cos across channels. `normalise` first brings every voxel to mean 0 and variance 1 across channels, so
    that making all features small is no way to a small distance; the published code does not.
    `projected_BNCdhw`, where given, are the features that students are compared by: each modality's through a map of
    its own (FitNets, Romero et al. 2015). A student then need not look like its teacher, but hold what tells of it.
    `where_Bdhw`, weights of at least 0, takes the means over voxels where it says; a sample without any such voxel has
    no pair.
    Half precisions are computed in float32; float64 stays.
    """
    n = features_BNCdhw.shape[1]
    elected = sorted(set(teachers))
    assert all(0 <= t < n for t in elected), f"teachers {list(teachers)} of {n} modalities"

    def prepared(features: Tensor) -> Tensor:
        # Before any arithmetic: 0 times the gradient of something infinite is not 0.
        there = available_BN[:, :, None, None, None, None]
        x = torch.where(there, features, features.new_zeros(())).flatten(3).movedim(2, -1)
        x = x if x.dtype == torch.float64 else x.float()
        return F.layer_norm(x, x.shape[-1:]) if normalise else x

    f = prepared(features_BNCdhw)
    learning = f if projected_BNCdhw is None else prepared(projected_BNCdhw)
    learns = torch.ones(n, dtype=torch.bool, device=f.device)
    if students == "others":
        learns[elected] = False
    weight_BV = None if where_Bdhw is None else where_Bdhw.flatten(1).to(f.dtype)
    speaks = available_BN if weight_BV is None else available_BN & (weight_BV.sum(dim=1, keepdim=True) > 0)
    losses, counts = f.new_zeros(len(f)), torch.zeros(len(f), dtype=torch.long, device=f.device)
    for t in elected:
        eligible = learns.clone()
        eligible[t] = False
        pairs_BN = available_BN & speaks[:, t : t + 1] & eligible
        values_BN = _mean(_distance(learning, f[:, t : t + 1].detach(), distance), weight_BV)
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
    """Return (B, N): the mean over voxels, weighted; 0 where all weights are."""
    if weight_BV is None:
        return values_BNV.mean(dim=-1)
    total_B1 = weight_BV.sum(dim=1, keepdim=True)
    return torch.einsum("bnv,bv->bn", values_BNV, weight_BV) / total_B1.clamp(min=torch.finfo(total_B1.dtype).tiny)

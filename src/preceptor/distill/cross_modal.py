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
    Half precisions are computed in float32; float64 stays.
    """
    n = features_BNCdhw.shape[1]
    elected = sorted(set(teachers))
    assert all(0 <= t < n for t in elected), f"teachers {list(teachers)} of {n} modalities"
    there = available_BN[:, :, None, None, None, None]
    # Before any arithmetic: 0 times the gradient of something infinite is not 0.
    f = torch.where(there, features_BNCdhw, features_BNCdhw.new_zeros(()))
    f = f.flatten(3).movedim(2, -1)
    f = f if f.dtype == torch.float64 else f.float()
    if normalise:
        f = F.layer_norm(f, f.shape[-1:])
    learns = torch.ones(n, dtype=torch.bool, device=f.device)
    if students == "others":
        learns[elected] = False
    losses, counts = f.new_zeros(len(f)), torch.zeros(len(f), dtype=torch.long, device=f.device)
    for t in elected:
        eligible = learns.clone()
        eligible[t] = False
        pairs_BN = available_BN & available_BN[:, t : t + 1] & eligible
        values_BN = _distance(f, f[:, t : t + 1].detach(), distance)
        losses = losses + torch.where(pairs_BN, values_BN, values_BN.new_zeros(())).sum(dim=1)
        counts = counts + pairs_BN.sum(dim=1)
    if pairs == "mean":
        losses = losses / counts.clamp(min=1)
    return losses, counts


def _distance(f_BNVC: Tensor, teacher_B1VC: Tensor, distance: Distance) -> Tensor:
    if distance == "cosine":
        return (1 - F.cosine_similarity(f_BNVC, teacher_B1VC, dim=-1, eps=1e-8)).mean(dim=-1)
    difference = f_BNVC - teacher_B1VC
    return (difference.abs() if distance == "l1" else difference.square()).mean(dim=(-2, -1))

"""Losses of segmentation with overlapping regions: soft Dice and binary cross-entropy, one sigmoid per region.

As in `distill.terms`, a loss is the sum over the samples of the batch of a per-sample value, a scalar tensor; the loop
divides by the number of samples of the whole global batch. Half precisions are computed in float32; float64 stays.

Shapes: B batch, R regions, then any voxel axes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def soft_dice(probabilities_BR: Tensor, targets_BR: Tensor) -> Tensor:
    """Return (B, R): ``2 sum(p y) / (sum p + sum y + 1)``, the sums over voxels, without a threshold.

    `probabilities_BR`, `targets_BR`: (B, R, D, H, W). As the published LCKD code trains and elects teachers. The 1
    keeps it finite and makes it 0 where the region is empty, whatever is predicted. Use `evaluate.segmentation.dice`
    for scores.
    """
    assert probabilities_BR.shape == targets_BR.shape, f"{probabilities_BR.shape} against {targets_BR.shape}"
    p, y = _wide(probabilities_BR).flatten(2), _wide(targets_BR).flatten(2)
    return 2 * (p * y).sum(-1) / (p.sum(-1) + y.sum(-1) + 1)


def dice_loss(logits_BR: Tensor, targets_BR: Tensor) -> Tensor:
    """Return ``sum_b (1 - mean_r soft_dice(sigmoid(x_br), y_br))``.

    MONAI's ``DiceLoss(sigmoid=True, smooth_nr=0, smooth_dr=1)`` times the batch size. A region that is empty in a
    sample costs 1 and has no gradient: there, binary cross-entropy teaches.
    """
    return (1 - soft_dice(_wide(logits_BR).sigmoid(), targets_BR)).mean(dim=1).sum()


def bce_loss(logits_BR: Tensor, targets_BR: Tensor, regions: Literal["mean", "sum"] = "mean") -> Tensor:
    """Return the binary cross-entropy with logits: mean over voxels, `regions` over regions, summed over samples.

    The published LCKD code sums over the three regions, which weighs it threefold against Dice.
    """
    assert logits_BR.shape == targets_BR.shape, f"{logits_BR.shape} against {targets_BR.shape}"
    x, y = _wide(logits_BR), _wide(targets_BR)
    values_BR = F.binary_cross_entropy_with_logits(x, y.to(x.dtype), reduction="none").flatten(2).mean(-1)
    return values_BR.sum() if regions == "sum" else values_BR.mean(dim=1).sum()


def _wide(x: Tensor) -> Tensor:
    return x if x.is_floating_point() and x.itemsize > 2 else x.float()

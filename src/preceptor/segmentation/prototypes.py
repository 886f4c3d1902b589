"""Region prototypes: how similar every voxel is to the mean feature of every region.

For a region k with the weights w_kv of the voxels v, features f_v of a network have the prototype and the similarities

    c_k = sum_v w_kv f_v / sum_v w_kv,        S_kv = cos(f_v, c_k)

The similarities of the student, which sees some modalities, are pulled to those of the teacher, which sees all:

    loss = mean over k and v of (S_kv(student) - stop S_kv(teacher))^2

Each network has prototypes of its own, so that the two need no common coordinates and no common width: what is taught
is which voxels are alike, and not the values of features, which a distance could make small. This is the semantic-wise
self-distillation of PASSION (Shi et al., ACM MM 2024, arXiv 2407.14796). Its published code has exclusive labels, one
student for each single modality, and teaches those that are further from the teacher than their mean. Here the classes
are the regions of the data, which may overlap, and the voxels outside all of them, and the student is the network on
the subset that it sees.

Shapes: B batch, R regions, K = R + 1 classes, C channels, V voxels of a feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.config import TermConfig
from preceptor.segmentation.losses import TeacherLoss
from preceptor.task import Batch, TeacherSignal

FEATURES = "decoder.features"
"""Path of the last map of a decoder (`Decoder.features`), possibly inside another module."""
_EPSILON = 1e-6


def class_weights(masks_BR: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return (B, K, V): the share of each cell of a grid of `size` that a region takes; the last class is the rest.

    `masks_BR` (B, R, D, H, W) is 0 or 1. With the size of the masks, the shares are the masks.
    """
    rest = 1 - masks_BR.amax(dim=1, keepdim=True)
    return F.adaptive_avg_pool3d(torch.cat([masks_BR, rest], dim=1).float(), size).flatten(2)


def similarities(features_BC: Tensor, weights_BKV: Tensor) -> Tensor:
    """Return (B, K, V): the cosine of every voxel's feature and the prototype of every class; 0 for an empty class.

    `features_BC` (B, C, d, h, w). Half precision is computed in float32; float64 stays.
    """
    f = features_BC.flatten(2)
    f = f if f.dtype == torch.float64 else f.float()
    w = weights_BKV.to(f.dtype)
    with torch.autocast(f.device.type, enabled=False):  # it would round the products to half precision
        prototypes_BKC = w @ f.transpose(1, 2) / w.sum(dim=2, keepdim=True).clamp(min=_EPSILON)
        return F.normalize(prototypes_BKC, dim=2, eps=_EPSILON) @ F.normalize(f, dim=1, eps=_EPSILON)


def prototype_loss(student_BC: Tensor, teacher_BC: Tensor, masks_BR: Tensor) -> Tensor:
    """Return (B,): the mean squared difference of the `similarities`, over voxels and the classes that are not empty.

    `student_BC` and `teacher_BC` (B, C, d, h, w) may differ in C. Gradients flow to the student alone, through its
    features and its prototypes.
    """
    depth, height, width = student_BC.shape[2:]
    weights_BKV = class_weights(masks_BR, (depth, height, width))
    target = similarities(teacher_BC.detach(), weights_BKV)
    squared_BK = (similarities(student_BC, weights_BKV) - target).square().mean(dim=2)
    present_BK = weights_BKV.sum(dim=2) > 0  # at least one, because the last class is the rest of them
    return torch.where(present_BK, squared_BK, squared_BK.new_zeros(())).sum(dim=1) / present_BK.sum(dim=1)


class PrototypeLoss(TeacherLoss):
    """`prototype_loss` of the last maps of the decoders, for the samples that have masks and that the teacher sees."""

    unit = "labelled"
    student_features = teacher_features = (f"*{FEATURES}",)

    def __init__(self, schedule: TermConfig) -> None:
        super().__init__("prototypes", schedule)

    def forward(self, student: TeacherSignal, teacher: TeacherSignal, batch: Batch) -> Tensor:
        rows = batch["labelled"] & batch.tensors.get("taught", batch["labelled"])
        s, t = (_decoded(signal)[rows] for signal in (student, teacher))
        return prototype_loss(s, t, batch["masks"][rows]).sum()


def _decoded(signal: TeacherSignal) -> Tensor:
    (path,) = (path for path in signal.features if path.endswith(FEATURES))
    return signal.features[path]

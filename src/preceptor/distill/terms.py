"""Distillation terms: pure functions of student and teacher tensors.

Every term returns the sum over the samples of the batch of a per-sample value, a scalar tensor; the loop divides by the
number of samples of the whole global batch (`types.LossTerms`). Teacher tensors are detached here. Half precisions are
computed in float32; float64 stays.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_over_tokens(values: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Return the sum over samples of the mean over valid tokens; `values` is (B,) or (B, L)."""
    if values.dim() == 1:
        return values.sum()
    if mask_BL is None:
        return values.mean(dim=1).sum()
    valid = mask_BL.to(torch.bool)
    # `where` and not a product: what stands in padding may be infinite, and 0 * inf is NaN.
    total = torch.where(valid, values, values.new_zeros(())).sum(dim=1)
    return (total / valid.sum(dim=1).clamp(min=1)).sum()


def kl_divergence(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float = 1.0, scale: bool = True
) -> Tensor:
    """Return ``T^2 * sum_b KL(softmax(t_b / T) || softmax(s_b / T))`` (Hinton et al. 2015, section 2.1).

    `student_logits_BC`, `teacher_logits_BC`: (B, C). With `scale` off the factor T^2, which keeps gradients of one size
    over temperatures, is left out. The sum over classes is not divided by their number, as a plain mean would do. A
    logit of -inf is a class that cannot be; where the teacher has none, it adds nothing.
    """
    log_s = F.log_softmax(_wide(student_logits_BC) / temperature, dim=-1)
    log_t = F.log_softmax(_wide(teacher_logits_BC.detach()) / temperature, dim=-1)
    p_t = log_t.exp()
    # A class with no teacher mass must not make 0 * inf.
    parts = torch.where(p_t > 0, p_t * (log_t - log_s), p_t.new_zeros(()))
    return parts.sum() * (temperature**2 if scale else 1.0)


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-sum_b log softmax(logits_b)[label_b]`` over the labelled samples; a label of -100 is no label."""
    return F.cross_entropy(
        _wide(logits_BC), labels_B, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing
    )


def binary_cross_entropy(logits_BC: Tensor, scores_BC: Tensor) -> Tensor:
    """Return the binary cross-entropy to soft scores in [0, 1], summed over classes and samples.

    Use instead of `cross_entropy` where several answers are right to a degree (VQA v2 soft scores; Teney et al. 2018).
    """
    return F.binary_cross_entropy_with_logits(_wide(logits_BC), scores_BC.to(_wide(logits_BC).dtype), reduction="sum")


def mse(student: Tensor, teacher: Tensor, mask_BL: Tensor | None = None, normalise: bool = False) -> Tensor:
    """Return the squared distance, its mean over width and valid tokens, summed over samples (FitNets; TinyBERT eq. 8).

    `student`, `teacher`: (B, L, D) or (B, D), of one width (see `align.Projectors`). `normalise` first brings every
    token of both to mean 0 and variance 1 over the width, so that the term does not depend on the teacher's scale.
    """
    s, t = _wide(student), _wide(teacher.detach())
    if normalise:
        s, t = F.layer_norm(s, s.shape[-1:]), F.layer_norm(t, t.shape[-1:])
    return _mean_over_tokens((s - t).square().mean(dim=-1), mask_BL)


def cosine(student: Tensor, teacher: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Return ``1 - cos(s, t)`` per token, its mean over valid tokens, summed over samples. Shapes as in `mse`."""
    distance = 1 - F.cosine_similarity(_wide(student), _wide(teacher.detach()), dim=-1, eps=1e-8)
    return _mean_over_tokens(distance, mask_BL)


def attention(
    student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor | None = None, kind: Literal["kl", "mse"] = "kl"
) -> Tensor:
    """Return the distance of attention maps, its mean over heads and valid queries, summed over samples.

    `student_BHLL`, `teacher_BHLL`: probabilities over keys (last axis). Where the numbers of heads differ, both are
    averaged over heads. `mask_BL` marks the tokens that are not padding, as queries and as keys. ``kl``: KL(teacher ||
    student) per query row (MiniLM, Wang et al. 2020, eq. 1). ``mse``: mean over valid keys (TinyBERT, Jiao et al. 2020,
    eq. 7).
    """
    s, t = _wide(student_BHLL), _wide(teacher_BHLL.detach())
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(dim=1, keepdim=True), t.mean(dim=1, keepdim=True)
    valid = None if mask_BL is None else mask_BL.to(torch.bool)
    if kind == "kl":
        tiny = torch.finfo(s.dtype).tiny
        parts = torch.where(t > 0, t * (t.clamp(min=tiny).log() - s.clamp(min=tiny).log()), s.new_zeros(()))
    else:
        parts = (s - t).square()
    if valid is not None:
        parts = torch.where(valid[:, None, None, :], parts, parts.new_zeros(()))
    rows_BL = parts.sum(dim=-1).mean(dim=1)
    if kind == "mse":
        keys = parts.shape[-1] if valid is None else valid.sum(dim=1, keepdim=True).clamp(min=1)
        rows_BL = rows_BL / keys
    return _mean_over_tokens(rows_BL, valid)


def relation(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return ``B * mean_ij (cos(s_i, s_j) - cos(t_i, t_j))^2``: who is like whom (Tung and Mori 2019).

    The widths may differ. Defined by the batch: over micro-batches it compares only samples of the same one, so unlike
    the other terms it does not add up to that of the whole batch.
    """
    s, t = F.normalize(_wide(student_BD), dim=-1), F.normalize(_wide(teacher_BD.detach()), dim=-1)
    return (s @ s.T - t @ t.T).square().mean() * len(s)

"""Distillation losses: pure functions of student and teacher tensors.

Every function returns the sum over the samples of the batch of a per-sample value, a scalar tensor. The loop divides by
the number of samples of the global batch (`task.LossTerms`). Teacher tensors are detached here. Half precision is
computed in float32; float64 stays.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.errors import UserError


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32 or float64, the teacher detached. Raises UserError if the shapes differ."""
    if student.shape != teacher.shape:
        raise UserError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; use a projector to "
            "bring them to one width (preceptor.distill.projectors.projector), and the same tokens or answer classes"
        )
    return _wide(student), _wide(teacher.detach())


def _zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """Set invalid entries to 0. Done before any arithmetic: the gradient of a masked infinity is 0 * inf = NaN."""
    return x if valid is None else torch.where(valid, x, x.new_zeros(()))


def _mean_over_tokens(values: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Return the sum over samples of the mean over valid tokens; `values` is (B,) or (B, L)."""
    if values.dim() == 1:
        return values.sum()
    if mask_BL is None:
        return values.mean(dim=1).sum()
    valid = mask_BL.to(torch.bool)
    total = _zero_invalid(values, valid).sum(dim=1)
    return (total / valid.sum(dim=1).clamp(min=1)).sum()


def kl_divergence(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float = 1.0, scale: bool = True
) -> Tensor:
    """Return ``T^2 * sum_b KL(softmax(t_b / T) || softmax(s_b / T))`` (Hinton et al. 2015, section 2.1).

    `student_logits_BC`, `teacher_logits_BC`: (B, C). Without `scale` the factor T^2, which keeps the gradients'
    magnitude when T changes, is left out. The sum over classes is not divided by their number. A logit of -inf marks an
    impossible class: it adds nothing if the teacher has it, and makes the divergence infinite if only the student has
    it. Raises UserError if the shapes differ.
    """
    s, t = _pair(student_logits_BC, teacher_logits_BC)
    log_s, log_t = F.log_softmax(s / temperature, dim=-1), F.log_softmax(t / temperature, dim=-1)
    p_t = log_t.exp()
    # A class to which the teacher gives probability 0 must not give 0 * inf.
    parts = torch.where(p_t > 0, p_t * (log_t - log_s), p_t.new_zeros(()))
    return parts.sum() * (temperature**2 if scale else 1.0)


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-sum_b log softmax(logits_b)[label_b]`` over the labelled samples. A label of -100 means unlabelled."""
    return F.cross_entropy(
        _wide(logits_BC), labels_B, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing
    )


def binary_cross_entropy(logits_BC: Tensor, scores_BC: Tensor) -> Tensor:
    """Return the binary cross-entropy to soft scores in [0, 1], summed over classes and samples.

    Use it instead of `cross_entropy` if several answers are partly correct (VQA v2 soft scores; Teney et al. 2018).
    A logit of -inf with score 0 adds nothing. Raises UserError if the shapes differ.
    """
    x, y = _pair(logits_BC, scores_BC)
    # torch's own binary_cross_entropy_with_logits is NaN (inf - inf) at -inf.
    right = torch.where(y > 0, y * F.logsigmoid(x), x.new_zeros(()))
    wrong = torch.where(y < 1, (1 - y) * F.logsigmoid(-x), x.new_zeros(()))
    return -(right + wrong).sum()


def _tokens(mask_BL: Tensor | None) -> Tensor | None:
    return None if mask_BL is None else mask_BL.to(torch.bool)[..., None]


def mse(student: Tensor, teacher: Tensor, mask_BL: Tensor | None = None, normalise: bool = False) -> Tensor:
    """Return the squared distance, its mean over width and valid tokens, summed over samples (FitNets; TinyBERT eq. 8).

    `student`, `teacher`: (B, L, D) or (B, D), of the same width (see `projectors.projector`). `normalise` first brings
    every token of both to mean 0 and variance 1 over the width, so that the teacher's scale has no effect.
    Raises UserError if the shapes differ.
    """
    s, t = (_zero_invalid(x, _tokens(mask_BL)) for x in _pair(student, teacher))
    if normalise:
        s, t = F.layer_norm(s, s.shape[-1:]), F.layer_norm(t, t.shape[-1:])
    return _mean_over_tokens((s - t).square().mean(dim=-1), mask_BL)


def cosine(student: Tensor, teacher: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Return ``1 - cos(s, t)`` per token, its mean over valid tokens, summed over samples. Shapes as in `mse`."""
    s, t = (_zero_invalid(x, _tokens(mask_BL)) for x in _pair(student, teacher))
    distance = 1 - F.cosine_similarity(s, t, dim=-1, eps=1e-8)
    return _mean_over_tokens(distance, mask_BL)


def attention(
    student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor | None = None, kind: Literal["kl", "mse"] = "kl"
) -> Tensor:
    """Return the distance of attention maps, its mean over heads and valid queries, summed over samples.

    `student_BHLL`, `teacher_BHLL`: probabilities over keys (last axis). If the numbers of heads differ, both are
    averaged over heads. `mask_BL` marks the tokens that are not padding, as queries and as keys. ``kl``: KL(teacher ||
    student) per query row (MiniLM, Wang et al. 2020, eq. 1). ``mse``: mean over valid keys (TinyBERT, Jiao et al. 2020,
    eq. 7). Rows are not renormalised: padding keys must have probability 0. Raises UserError if the shapes differ
    in more than heads.
    """
    s, t = student_BHLL, teacher_BHLL
    if s.shape[1] != t.shape[1]:
        s, t = _wide(s).mean(dim=1, keepdim=True), _wide(t).mean(dim=1, keepdim=True)
    valid = None if mask_BL is None else mask_BL.to(torch.bool)
    both = None if valid is None else valid[:, None, None, :] & valid[:, None, :, None]
    s, t = (_zero_invalid(x, both) for x in _pair(s, t))
    if kind == "kl":
        tiny = torch.finfo(s.dtype).tiny
        parts = torch.where(t > 0, t * (t.clamp(min=tiny).log() - s.clamp(min=tiny).log()), s.new_zeros(()))
    else:
        parts = (s - t).square()
    rows_BL = parts.sum(dim=-1).mean(dim=1)
    if kind == "mse":
        keys = parts.shape[-1] if valid is None else valid.sum(dim=1, keepdim=True).clamp(min=1)
        rows_BL = rows_BL / keys
    return _mean_over_tokens(rows_BL, valid)


def relation(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return ``B * mean_ij (cos(s_i, s_j) - cos(t_i, t_j))^2``, the difference of the similarities among samples.

    Similarity-preserving distillation (Tung and Mori 2019) on cosines; the paper normalises the rows of the Gram matrix
    instead. `student_BD`, `teacher_BD`: (B, D), the widths may differ. Only samples of the same micro-batch are
    compared, so unlike the other losses it does not add up to that of the whole batch.
    """
    s, t = F.normalize(_wide(student_BD), dim=-1), F.normalize(_wide(teacher_BD.detach()), dim=-1)
    # Autocast would compute these products in half precision, too coarse for their differences.
    with torch.autocast(s.device.type, enabled=False):
        return (s @ s.T - t @ t.T).square().mean() * len(s)

"""Cross-entropy and KL over a large vocabulary, computed from hidden states in chunks of tokens.

The logits of T tokens over V vocabulary entries are T x V numbers. The standard computation holds about ten such
matrices: logits, log-probabilities and gradients of two models. Here the logits of `chunk` tokens are computed, their
loss and its gradients with respect to hidden states and output weights are accumulated in the forward pass, and the
logits are freed. The backward pass only scales the accumulated gradients. The idea is that of Liger Kernel (Hsu et al.
2024); the values equal those of the standard computation.

Every loss is a weighted sum over tokens, ``sum_t w_t loss_t``. Weights 1 / (tokens of the dialogue) give a mean within
a dialogue. Matrix products run in the precision of their inputs; softmax, losses and the accumulated gradient of the
output weights are float32, float64 stays. Second derivatives are not available.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from preceptor.errors import UserError
from preceptor.task import HiddenTeacher, TopKTeacher

CHUNK = 128
"""Tokens per chunk: with 151,936 vocabulary entries 78 MB for each float32 matrix, of which four are held."""

HELD = 8
"""Chunks whose half-precision gradients are held and multiplied together."""

# (float32 logits (C, V), which may be overwritten, and their rows) -> (KL sum, cross-entropy sum, loss gradient).
_Slope = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]


class DistillationLoss(NamedTuple):
    """`loss` is differentiable, ``(alpha kl + cross_entropy) / (1 + alpha)``; the two parts are for logging only."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor


def distillation_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    teacher: HiddenTeacher | TopKTeacher,
    *,
    alpha: float = 0.5,
    temperature: float = 0.5,
    t_squared: bool = False,
    weights_T: Tensor | None = None,
    chunk: int = CHUNK,
) -> DistillationLoss:
    """Return ``(alpha KL(teacher || student) + CE) / (1 + alpha)``, both sums over tokens, in one pass.

    Formula and defaults are those of the code published with ClinKD (README; Ge et al. 2025): forward KL at temperature
    0.5 without the factor T^2 of Hinton et al. 2015 (`t_squared`), cross-entropy to the labels at temperature 1. That
    code hands labels that are not shifted by one token to a function whose body is not published. Here both terms are
    sums over the tokens that predict an answer token.

    Args:
        hidden_TD, weight_VD: the student's last hidden states and output weights; logits are hidden @ weight.T.
        targets_T: ids of the target tokens.
        teacher: hidden states of an online teacher, or its cached most probable tokens.
        weights_T: weight of every token; default 1.
        chunk: tokens per chunk.

    Raises:
        UserError: shapes do not fit one another, or alpha, temperature or chunk are out of range.
    """
    _check(hidden_TD, weight_VD, temperature, chunk, alpha=alpha, T=(targets_T, weights_T))
    shares = (alpha / (1 + alpha), 1 / (1 + alpha))
    slope = _slope(teacher, targets_T, weights_T, shares, temperature, t_squared, hidden_TD, weight_VD)
    return DistillationLoss(*_by_chunks(hidden_TD, weight_VD, slope, shares, chunk))


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, weights_T: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """Return ``-sum_t w_t log softmax(hidden_t @ weight.T)[target_t]``; equal to `distillation_loss` with alpha 0."""
    _check(hidden_TD, weight_VD, 1.0, chunk, T=(targets_T, weights_T))
    slope = _slope(None, targets_T, weights_T, (0.0, 1.0), 1.0, False, hidden_TD, weight_VD)
    return _by_chunks(hidden_TD, weight_VD, slope, (0.0, 1.0), chunk)[0]


def chunked_kl(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_WE: Tensor,
    *,
    temperature: float = 0.5,
    t_squared: bool = False,
    weights_T: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Return ``sum_t w_t KL(softmax(teacher_t / T) || softmax(student_t / T))``, without labels.

    Arguments and errors as in `distillation_loss`, the teacher's as in `HiddenTeacher`.
    """
    _check(hidden_TD, weight_VD, temperature, chunk, T=(weights_T,))
    teacher = HiddenTeacher(teacher_hidden_TE, teacher_weight_WE)
    slope = _slope(teacher, None, weights_T, (1.0, 0.0), temperature, t_squared, hidden_TD, weight_VD)
    return _by_chunks(hidden_TD, weight_VD, slope, (1.0, 0.0), chunk)[0]


def topk_kl(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    log_probabilities_TK: Tensor,
    ids_TK: Tensor,
    log_tail_T: Tensor,
    *,
    temperature: float = 0.5,
    t_squared: bool = False,
    weights_T: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Return ``sum_t w_t [sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)]``: KL with all other entries as one.

    Merging vocabulary entries never increases a KL divergence (data-processing inequality), so this is at most the
    divergence over the whole vocabulary, and equal to it at K = V. p are the teacher's probabilities and q the
    student's at `temperature`. Arguments and errors as in `distillation_loss`, the teacher's as in `TopKTeacher`.
    """
    _check(hidden_TD, weight_VD, temperature, chunk, T=(weights_T,))
    teacher = TopKTeacher(log_probabilities_TK, ids_TK, log_tail_T)
    slope = _slope(teacher, None, weights_T, (1.0, 0.0), temperature, t_squared, hidden_TD, weight_VD)
    return _by_chunks(hidden_TD, weight_VD, slope, (1.0, 0.0), chunk)[0]


def _check(
    hidden: Tensor, weight: Tensor, temperature: float, chunk: int, *, alpha: float = 0.0, T: tuple[Tensor | None, ...]
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"hidden states {tuple(hidden.shape)} and output weights {tuple(weight.shape)} do not fit; "
            "give (T, D) and (V, D)"
        )
    for one in T:
        if one is not None and one.shape != hidden.shape[:1]:
            raise UserError(f"there are {hidden.shape[0]} tokens, but {tuple(one.shape)} targets or weights; give (T,)")
    if temperature <= 0 or alpha < 0 or chunk < 1:
        raise UserError(f"temperature {temperature} must be above 0, alpha {alpha} at least 0, chunk {chunk} above 0")


def _slope(
    teacher: HiddenTeacher | TopKTeacher | None,
    targets_T: Tensor | None,
    weights_T: Tensor | None,
    shares: tuple[float, float],
    temperature: float,
    t_squared: bool,
    hidden_TD: Tensor,
    weight_VD: Tensor,
) -> _Slope:
    """Return the loss of a chunk of logits and its gradient; `shares` are the weights of KL and cross-entropy."""
    divergence = _divergence(teacher, temperature, hidden_TD.shape[0], weight_VD.shape[0])
    factor = temperature**2 if t_squared else 1.0

    def slope(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        ones = logits_CV.new_ones(logits_CV.shape[0])
        weights_C = ones if weights_T is None else weights_T[rows].to(logits_CV).detach()
        kl = entropy = logits_CV.new_zeros(())
        learnt = None
        if targets_T is not None:
            picked_C1 = targets_T[rows].unsqueeze(1)
            learnt = logits_CV.log_softmax(dim=-1)
            entropy = -(weights_C * learnt.gather(1, picked_C1).squeeze(1)).sum()
            learnt.exp_().scatter_add_(1, picked_C1, -ones.unsqueeze(1))
            learnt.mul_((shares[1] * weights_C).unsqueeze(1))
        if divergence is None:
            assert learnt is not None
            return kl, entropy, learnt
        kl_C, slope_CV = divergence(logits_CV, rows)
        kl = factor * (weights_C * kl_C).sum()
        slope_CV.mul_((shares[0] * factor * weights_C).unsqueeze(1))
        return kl, entropy, slope_CV if learnt is None else learnt.add_(slope_CV)

    return slope


def _divergence(
    teacher: HiddenTeacher | TopKTeacher | None, temperature: float, tokens: int, words: int
) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]] | None:
    """Return (KL of each token, its gradient to the logits) as a function of the logits, which are overwritten."""
    if teacher is None:
        return None
    if isinstance(teacher, HiddenTeacher):
        hidden_TE, weight_WE = _same_type(teacher.hidden_TE.detach(), teacher.weight_WE.detach())
        if hidden_TE.dim() != 2 or hidden_TE.shape[0] != tokens or hidden_TE.shape[1:] != weight_WE.shape[1:]:
            raise UserError(
                f"the teacher's hidden states {tuple(hidden_TE.shape)} and weights "
                f"{tuple(weight_WE.shape)} do not fit {tokens} tokens; give (T, E) and (W, E)"
            )
        shared = min(words, weight_WE.shape[0])

        def dense(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            # In place on a view: entries beyond the teacher's vocabulary get no gradient.
            student_CV = logits_CV[:, :shared].div_(temperature)
            student_CV -= student_CV.logsumexp(dim=-1, keepdim=True)
            teacher_CV = (hidden_TE[rows] @ weight_WE[:shared].T).to(logits_CV.dtype).div_(temperature)
            teacher_CV -= teacher_CV.logsumexp(dim=-1, keepdim=True)
            p_CV = teacher_CV.exp()
            # Not a matrix product, which would sum 150,000 numbers sequentially.
            kl_C = teacher_CV.sub_(student_CV).mul_(p_CV).sum(dim=-1)
            student_CV.exp_().sub_(p_CV).div_(temperature)
            logits_CV[:, shared:] = 0
            return kl_C, logits_CV

        return dense
    log_p_TK, ids_TK, log_tail_T = teacher.log_probabilities_TK.detach(), teacher.ids_TK, teacher.log_tail_T.detach()
    if log_p_TK.shape != ids_TK.shape or log_p_TK.shape[:1] != (tokens,) or log_tail_T.shape != (tokens,):
        shapes = [tuple(one.shape) for one in (log_p_TK, ids_TK, log_tail_T)]
        raise UserError(
            f"cached log-probabilities {shapes[0]}, ids {shapes[1]} and tails {shapes[2]} do not match {tokens} "
            "tokens; give (T, K), (T, K) and (T,)"
        )

    def cached(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids_CK, log_p_CK, log_tail_C = ids_TK[rows].long(), log_p_TK[rows].to(logits_CV), log_tail_T[rows].to(logits_CV)
        student_CV = logits_CV.div_(temperature)
        student_CV -= student_CV.logsumexp(dim=-1, keepdim=True)
        log_q_CK = student_CV.gather(1, ids_CK)
        # 1 minus the sum of the others would lose a small remainder to rounding.
        log_left_C = student_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(dim=-1)
        p_CK, rest_C = log_p_CK.exp(), log_tail_C.exp()
        zero = rest_C.new_zeros(())
        kl_C = torch.where(p_CK > 0, p_CK * (log_p_CK - log_q_CK), zero).sum(dim=1)
        kl_C += torch.where(rest_C > 0, rest_C * (log_tail_C - log_left_C), zero)
        # The gradient of the remainder is distributed in proportion to the student's probabilities within it:
        # q_j / q_rest (q_rest - p_rest). The ratio is computed from logarithms, because q_rest underflows if the
        # student is sure. With K = V there is no remainder, and scatter replaces every entry.
        student_CV -= log_left_C.unsqueeze(1)
        student_CV.exp_().mul_((log_left_C.exp() - rest_C).unsqueeze(1))
        slope_CV = student_CV.scatter_(1, ids_CK, log_q_CK.exp() - p_CK)
        return kl_C, slope_CV.div_(temperature)

    return cached


def _same_type(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype that autocast multiplies in, else in that of the weights."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def _by_chunks(
    hidden_TD: Tensor, weight_VD: Tensor, slope: _Slope, shares: tuple[float, float], chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_TD, weight_VD = _same_type(hidden_TD, weight_VD)
    return _ByChunks.apply(hidden_TD, weight_VD, slope, shares, chunk, torch.is_grad_enabled())


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        slope: _Slope,
        shares: tuple[float, float],
        chunk: int,
        learning: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = tuple(learning and needed for needed in ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden_TD, weight_VD)
        ctx.again = lambda hidden, weight: _accumulate(hidden, weight, slope, chunk, wanted)[2]
        kl, entropy, ctx.slopes = _accumulate(hidden_TD, weight_VD, slope, chunk, wanted)
        ctx.mark_non_differentiable(kl, entropy)
        return shares[0] * kl + shares[1] * entropy, kl, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # The accumulated gradient is scaled in place, because a copy would be as large as the output weights. A second
        # backward pass computes it again.
        slopes = ctx.again(*ctx.saved_tensors) if ctx.slopes is None else ctx.slopes
        ctx.slopes = None
        return (*(None if one is None else one.mul_(grad) for one in slopes), None, None, None, None)


def _accumulate(
    hidden_TD: Tensor, weight_VD: Tensor, slope: _Slope, chunk: int, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the sums of KL and of cross-entropy, and the requested gradients."""
    tokens, words, dtype = hidden_TD.shape[0], weight_VD.shape[0], weight_VD.dtype
    wide, kind = torch.float64 if dtype == torch.float64 else torch.float32, hidden_TD.device.type
    grad_hidden = torch.zeros_like(hidden_TD) if wanted[0] else None
    grad_weight = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
    # A half-precision product needs its own matrix before it is added to the float32 one. Doing so for several chunks
    # together is cheaper, so their gradients are held.
    half = dtype != wide
    held_HV = weight_VD.new_empty(min(HELD * chunk, tokens), words) if half and any(wanted) else None
    held = 0
    sums = torch.zeros(2, dtype=wide, device=hidden_TD.device)
    off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    with off:
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            kl, entropy, slope_CV = slope((hidden_TD[rows] @ weight_VD.T).to(wide), rows)
            sums += torch.stack([kl, entropy])
            if held_HV is not None:
                slope_CV = held_HV[held : held + len(slope_CV)].copy_(slope_CV)
            if grad_hidden is not None:
                torch.mm(slope_CV, weight_VD, out=grad_hidden[rows])
            if grad_weight is None:
                continue
            if held_HV is None:
                grad_weight.addmm_(slope_CV.T, hidden_TD[rows])
                continue
            held += len(slope_CV)
            if held == len(held_HV) or rows.stop == tokens:
                _add_product(grad_weight, held_HV[:held], hidden_TD[rows.stop - held : rows.stop])
                held = 0
    kl, entropy = sums.unbind()
    return kl.clone(), entropy.clone(), [grad_hidden, None if grad_weight is None else grad_weight.to(dtype)]


def _add_product(total_VD: Tensor, slope_HV: Tensor, hidden_HD: Tensor, words: int = 16384) -> None:
    """Add ``slope.T @ hidden``, in half precision, to a float32 `total`, one block of the vocabulary at a time."""
    for start in range(0, total_VD.shape[0], words):
        total_VD[start : start + words] += slope_HV[:, start : start + words].T @ hidden_HD

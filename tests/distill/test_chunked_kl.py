"""Chunked losses against plain PyTorch, closed forms, finite differences; the bound of truncated teachers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from preceptor.distill.chunked_kl import (
    HiddenTeacher,
    TopKTeacher,
    chunked_cross_entropy,
    chunked_kl,
    distillation_loss,
    topk_kl,
)
from preceptor.errors import UserError

T, V, D, E = 11, 37, 6, 9


def case(seed: int = 0, dtype: torch.dtype = torch.float64, words: int = V) -> dict[str, Tensor]:
    """A student of V words and a teacher of `words`; some tokens weigh more than others, one nothing."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(T, D).requires_grad_(),
        "weight": draw(V, D).requires_grad_(),
        "teacher_hidden": draw(T, E),
        "teacher_weight": draw(words, E),
        "targets": torch.randint(0, V, (T,), generator=g),
        "weights": torch.rand(T, generator=g, dtype=torch.float64).to(dtype) * (torch.arange(T) != 3),
    }


def plain(x: dict[str, Tensor], alpha: float, temperature: float, t_squared: bool) -> dict[str, Tensor]:
    """The loss as the published code has it, on whole tables of logits: log_softmax, softmax, kl_div."""
    student, teacher = x["hidden"] @ x["weight"].T, x["teacher_hidden"] @ x["teacher_weight"].T
    shared = min(student.shape[1], teacher.shape[1])
    kl_TV = F.kl_div(
        F.log_softmax(student[:, :shared] / temperature, -1),
        F.softmax(teacher[:, :shared] / temperature, -1),
        reduction="none",
    )
    kl = (x["weights"] * kl_TV.sum(-1)).sum() * (temperature**2 if t_squared else 1)
    entropy = (x["weights"] * F.cross_entropy(student, x["targets"], reduction="none")).sum()
    return {"loss": (alpha * kl + entropy) / (1 + alpha), "kl": kl, "cross_entropy": entropy}


def slopes(loss: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (x["hidden"], x["weight"]))


def topk(logits_TV: Tensor, k: int, temperature: float) -> TopKTeacher:
    """A teacher's cache, as defined: probabilities at the temperature, and the mass of the words that are left out."""
    log_p = (logits_TV / temperature).log_softmax(-1)
    order = log_p.argsort(dim=-1, descending=True)
    kept, left = order[:, :k], order[:, k:]
    rest = log_p.gather(1, left).logsumexp(-1) if k < logits_TV.shape[1] else log_p.new_full(log_p.shape[:1], -math.inf)
    return TopKTeacher(log_p.gather(1, kept), kept, rest)


@pytest.mark.parametrize("chunk", [1, 4, T, 100])
@pytest.mark.parametrize("words", [V, V + 5, V - 5])
@pytest.mark.parametrize(
    ("alpha", "temperature", "t_squared"), [(0.5, 0.5, False), (2.0, 3.0, True), (0.0, 1.0, False)]
)
def test_values_and_gradients_are_those_of_the_plain_loss(
    chunk: int, words: int, alpha: float, temperature: float, t_squared: bool
):
    """Also where the teacher's vocabulary is wider or narrower: the shared words, renormalised."""
    x = case(words=words)
    want = plain(x, alpha, temperature, t_squared)
    teacher = HiddenTeacher(x["teacher_hidden"], x["teacher_weight"])
    options: dict[str, Any] = {"temperature": temperature, "t_squared": t_squared, "chunk": chunk}
    got = distillation_loss(
        x["hidden"], x["weight"], x["targets"], teacher, alpha=alpha, weights_T=x["weights"], **options
    )
    for name, value in want.items():
        assert getattr(got, name).item() == pytest.approx(value.item(), rel=1e-12), name
    for a, b in zip(slopes(got.loss, x), slopes(want["loss"], x), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    options["weights_T"] = x["weights"]
    kl = chunked_kl(x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], **options)
    assert kl.item() == pytest.approx(want["kl"].item(), rel=1e-12)
    for a, b in zip(slopes(kl, x), slopes(plain(x, alpha, temperature, t_squared)["kl"], x), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    entropy = chunked_cross_entropy(x["hidden"], x["weight"], x["targets"], weights_T=x["weights"], chunk=chunk)
    assert entropy.item() == pytest.approx(want["cross_entropy"].item(), rel=1e-12)
    for a, b in zip(slopes(entropy, x), slopes(plain(x, 0.0, 1.0, False)["loss"], x), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_float32_agrees_to_1e_4_at_a_real_width():
    g = torch.Generator().manual_seed(0)
    x = {
        "hidden": torch.randn(64, 96, generator=g).requires_grad_(),
        "weight": (torch.randn(5000, 96, generator=g) * 0.2).requires_grad_(),
        "teacher_hidden": torch.randn(64, 128, generator=g),
        "teacher_weight": torch.randn(5000, 128, generator=g) * 0.2,
        "targets": torch.randint(0, 5000, (64,), generator=g),
        "weights": torch.full((64,), 1 / 64),
    }
    want = plain(x, 0.5, 0.5, False)
    teacher = HiddenTeacher(x["teacher_hidden"], x["teacher_weight"])
    got = distillation_loss(x["hidden"], x["weight"], x["targets"], teacher, weights_T=x["weights"], chunk=10)
    assert got.loss.item() == pytest.approx(want["loss"].item(), rel=1e-5)
    for a, b in zip(slopes(got.loss, x), slopes(want["loss"], x), strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_bfloat16_is_as_near_to_float64_as_the_plain_way(autocast: bool, chunk: int):
    """With chunks of 1 the gradients of eight are held, and three are left over."""
    exact = case(1)
    want = slopes(plain(exact, 0.5, 0.5, False)["loss"], exact)
    dtype = torch.float32 if autocast else torch.bfloat16
    x = {n: v.detach().to(dtype) if v.is_floating_point() else v for n, v in exact.items()}
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_()
    teacher = HiddenTeacher(x["teacher_hidden"], x["teacher_weight"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        more: dict[str, Any] = {"weights_T": x["weights"], "chunk": chunk}
        loss = distillation_loss(x["hidden"], x["weight"], x["targets"], teacher, **more).loss
        theirs = plain(x, 0.5, 0.5, False)["loss"]
    assert loss.dtype == torch.float32
    for mine, other, true in zip(slopes(loss, x), slopes(theirs, x), want, strict=True):
        assert mine.dtype == dtype
        error, limit = (mine.double() - true).norm(), (other.double() - true).norm()
        assert error < 0.05 * true.norm()
        assert error < 1.2 * limit + 1e-3 * true.norm()


@pytest.mark.parametrize("loss", ["ce", "kl", "topk", "both", "both_topk"])
def test_gradcheck(loss: str):
    x = case(2)
    logits = x["teacher_hidden"] @ x["teacher_weight"].T
    cached = topk(logits, 5, 0.7)
    dense = HiddenTeacher(x["teacher_hidden"], x["teacher_weight"])
    more: dict[str, Any] = {"weights_T": x["weights"], "chunk": 4}
    function: Callable[[Tensor, Tensor], Tensor] = {
        "ce": lambda h, w: chunked_cross_entropy(h, w, x["targets"], **more),
        "kl": lambda h, w: chunked_kl(h, w, dense.hidden_TE, dense.weight_WE, temperature=0.7, t_squared=True, **more),
        "topk": lambda h, w: topk_kl(h, w, *vars(cached).values(), temperature=0.7, **more),
        "both": lambda h, w: distillation_loss(h, w, x["targets"], dense, temperature=0.7, **more).loss,
        "both_topk": lambda h, w: distillation_loss(h, w, x["targets"], cached, temperature=0.7, **more).loss,
    }[loss]
    assert torch.autograd.gradcheck(function, (x["hidden"], x["weight"]))


@given(st.integers(0, 10_000), st.integers(1, V), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_truncated_divergence_is_a_lower_bound(seed: int, k: int, temperature: float):
    """Data-processing inequality, token by token; and the more words are kept, the nearer it is."""
    x = case(seed)
    logits = x["teacher_hidden"] @ x["teacher_weight"].T
    for t in range(T):
        h, w = x["hidden"][t : t + 1].detach(), x["weight"].detach()
        full = chunked_kl(h, w, x["teacher_hidden"][t : t + 1], x["teacher_weight"], temperature=temperature).item()
        found = [
            topk_kl(h, w, *vars(topk(logits[t : t + 1], n, temperature)).values(), temperature=temperature).item()
            for n in (k, min(k + 1, V), V)
        ]
        assert -1e-10 <= found[0] <= found[1] + 1e-10
        assert found[1] <= full + 1e-10
        assert found[2] == pytest.approx(full, rel=1e-9, abs=1e-10)


def test_all_words_cached_is_the_full_divergence_with_its_gradient():
    x = case(4)
    cached = topk(x["teacher_hidden"] @ x["teacher_weight"].T, V, 0.5)
    full = chunked_kl(x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"])
    got = topk_kl(x["hidden"], x["weight"], *vars(cached).values())
    for a, b in zip(slopes(got, x), slopes(full, x), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_two_words_by_hand():
    """p = (3/4, 1/4) against q = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; a student that is its teacher: 0."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert chunked_kl(hidden, weight, hidden, teacher, temperature=1).item() == pytest.approx(want, rel=1e-12)
    assert chunked_kl(hidden, teacher, hidden, teacher, temperature=1).item() == pytest.approx(0, abs=1e-15)
    assert chunked_cross_entropy(hidden, teacher, torch.tensor([1])).item() == pytest.approx(math.log(4), rel=1e-12)


def test_far_logits_stay_finite():
    hidden = torch.tensor([[300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    teacher = HiddenTeacher(torch.tensor([[-300.0]]), weight.detach())
    for kind in (teacher, topk(teacher.hidden_TE @ teacher.weight_WE.T, 1, 0.5)):
        found = distillation_loss(hidden, weight, torch.tensor([1]), kind)
        assert found.kl.item() == pytest.approx(1200, rel=1e-5)  # 600 apart, at temperature 0.5
        assert found.cross_entropy.item() == pytest.approx(600, rel=1e-5)
        assert all(one.isfinite().all() for one in torch.autograd.grad(found.loss, (hidden, weight)))


@pytest.mark.parametrize("gap", [20.0, 60.0, 300.0, 3000.0])
@pytest.mark.parametrize("sure", [0, 9])
def test_a_cached_teacher_and_a_sure_student_give_the_gradients_of_float64_autograd(gap: float, sure: int):
    """The logit of one entry is `gap` above all others, inside and outside of the teacher's top k, at T 0.5."""
    g = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(4, 12, generator=g)
    logits_TV[:, sure] += gap
    teacher_TV = torch.randn(4, 12, generator=g, dtype=torch.float64)
    teacher_TV[:, :5] += 6
    cached = topk(teacher_TV, 5, 0.5)
    assert (cached.ids_TK.sort(dim=1).values == torch.arange(5)).all()

    exact = logits_TV.double().requires_grad_()
    log_q = (exact / 0.5).log_softmax(-1)
    rest_T = log_q[:, 5:].logsumexp(-1)
    kl_T = (cached.log_probabilities_TK.exp() * (cached.log_probabilities_TK - log_q.gather(1, cached.ids_TK))).sum(1)
    want = (kl_T + cached.log_tail_T.exp() * (cached.log_tail_T - rest_T)).sum()
    (slope_TV,) = torch.autograd.grad(want, exact)

    hidden = logits_TV.clone().requires_grad_()  # the output weights are the identity, so that logits = hidden
    got = topk_kl(hidden, torch.eye(12), cached.log_probabilities_TK.float(), cached.ids_TK, cached.log_tail_T.float())
    (found_TV,) = torch.autograd.grad(got, hidden)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(found_TV.double(), slope_TV, atol=1e-5)


def test_backward_twice_and_scaled():
    x = case(5)
    loss = chunked_cross_entropy(x["hidden"], x["weight"], x["targets"])
    first = torch.autograd.grad(loss, (x["hidden"], x["weight"]), retain_graph=True)
    kept = [one.clone() for one in first]
    second = torch.autograd.grad(3 * loss, (x["hidden"], x["weight"]))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(3 * a, c, atol=1e-14)


def test_only_what_learns_gets_a_gradient():
    x = case(6)
    frozen = x["weight"].detach()
    loss = chunked_cross_entropy(x["hidden"], frozen, x["targets"])
    loss.backward()
    assert x["hidden"].grad is not None
    with torch.no_grad():
        assert not chunked_cross_entropy(x["hidden"], x["weight"], x["targets"]).requires_grad
    teacher = x["teacher_weight"].requires_grad_()
    chunked_kl(x["hidden"], x["weight"], x["teacher_hidden"], teacher).backward()
    assert teacher.grad is None


def test_no_tokens_are_a_loss_of_0():
    x = case(7)
    loss = distillation_loss(
        x["hidden"][:0], x["weight"], x["targets"][:0], HiddenTeacher(x["teacher_hidden"][:0], x["teacher_weight"])
    ).loss
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, x["weight"])[0], torch.zeros(V, D, dtype=torch.float64))


def test_no_table_of_all_tokens_and_words_is_ever_made():
    """Counted by the dispatcher: the largest tensor that any operation returns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, Tensor):
                    largest = max(largest, one.numel())
            return out

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 4, generator=g).requires_grad_()
    weight = torch.randn(1000, 4, generator=g).requires_grad_()
    teacher = HiddenTeacher(hidden.detach(), weight.detach() + 1)
    with Watch():
        distillation_loss(hidden, weight, torch.zeros(256, dtype=torch.long), teacher, chunk=8).loss.backward()
    assert largest == 8 * 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: chunked_cross_entropy(x["hidden"], x["weight"].T, x["targets"]), r"weights \(6, 37\) do not fit"),
        (lambda x: chunked_cross_entropy(x["hidden"], x["weight"], x["targets"][1:]), r"11 tokens, but \(10,\)"),
        (lambda x: chunked_cross_entropy(x["hidden"], x["weight"], x["targets"], chunk=0), "chunk 0 above 0"),
        (lambda x: chunked_kl(x["hidden"], x["weight"], x["teacher_hidden"][1:], x["teacher_weight"]), "fit 11 tokens"),
        (lambda x: chunked_kl(*[x["hidden"], x["weight"]] * 2, temperature=0), "temperature 0 must be above 0"),
        (
            lambda x: topk_kl(x["hidden"], x["weight"], x["hidden"], x["targets"][:, None], x["targets"]),
            r"cached log-probabilities \(11, 6\), ids \(11, 1\)",
        ),
    ],
)
def test_mistakes_are_named(call: Callable, message: str):
    with pytest.raises(UserError, match=message):
        call(case())

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.distill import losses as terms

GOLDEN = Path(__file__).parents[1] / "golden" / "distill_terms.json"
B, L, D, H, C = 3, 5, 4, 2, 6


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def maps(seed: int, heads: int = H) -> torch.Tensor:
    return draw(B, heads, L, L, seed=seed).softmax(-1)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LABELS = torch.tensor([2, -100, 5])
SCORES = draw(B, C, seed=7).sigmoid()

CALLS = {
    "kl": lambda s: terms.kl_divergence(s, draw(B, C, seed=1), 3.0),
    "kl_unscaled": lambda s: terms.kl_divergence(s, draw(B, C, seed=1), 3.0, scale=False),
    "cross_entropy": lambda s: terms.cross_entropy(s, LABELS),
    "cross_entropy_smooth": lambda s: terms.cross_entropy(s, LABELS, 0.1),
    "bce": lambda s: terms.binary_cross_entropy(s, SCORES),
    "mse": lambda s: terms.mse(s, draw(B, L, D, seed=2), MASK),
    "mse_normalised": lambda s: terms.mse(s, draw(B, L, D, seed=2), MASK, normalise=True),
    "cosine": lambda s: terms.cosine(s, draw(B, L, D, seed=2), MASK),
    "attention_kl": lambda s: terms.attention(s.softmax(-1), maps(3), MASK),
    "attention_mse": lambda s: terms.attention(s.softmax(-1), maps(3), MASK, kind="mse"),
    "attention_heads": lambda s: terms.attention(s.softmax(-1), maps(3, heads=4), MASK),
    "relation": lambda s: terms.relation(s, draw(B, 7, seed=4)),
}


def student(name: str) -> torch.Tensor:
    if name.startswith(("kl", "cross", "bce")):
        return draw(B, C, seed=10)
    if name.startswith("attention"):
        return draw(B, H, L, L, seed=11)
    return draw(B, D, seed=12) if name == "relation" else draw(B, L, D, seed=13)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_in_double_precision(name: str):
    assert gradcheck(CALLS[name], (student(name).requires_grad_(),))


@pytest.mark.parametrize("name", CALLS)
def test_golden_value(name: str):
    """Held since they were first computed and checked against the oracles below."""
    assert CALLS[name](student(name)).item() == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-9)


def test_kl_oracle():
    s, t, T = student("kl"), draw(B, C, seed=1), 3.0
    want = 0.0
    for b in range(B):
        zs, zt = sum(math.exp(v / T) for v in s[b]), sum(math.exp(v / T) for v in t[b])
        for c in range(C):
            p, q = math.exp(t[b, c] / T) / zt, math.exp(s[b, c] / T) / zs
            want += T * T * p * math.log(p / q)
    assert CALLS["kl"](s).item() == pytest.approx(want)
    peer = torch.nn.functional.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean") * B * T * T
    assert CALLS["kl"](s).item() == pytest.approx(peer.item())
    assert CALLS["kl"](s).item() == pytest.approx(9 * CALLS["kl_unscaled"](s).item())


def test_kl_of_confident_distributions_is_that_of_torch():
    """Most classes have a probability below 1e-3, and those of the student are far smaller."""
    s, t = 60 * student("kl"), 12 * draw(B, C, seed=1)
    rare = t.softmax(-1) < 1e-3
    assert rare.sum() > B
    peer = torch.nn.functional.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True)
    assert terms.kl_divergence(s, t).item() == pytest.approx(peer.item(), rel=1e-9)


def test_cross_entropy_oracle():
    s = student("cross_entropy")
    want = -sum(math.log(math.exp(s[b, c]) / sum(math.exp(v) for v in s[b])) for b, c in ((0, 2), (2, 5)))
    assert CALLS["cross_entropy"](s).item() == pytest.approx(want)


def test_bce_oracle():
    s = student("bce")
    want = 0.0
    for b in range(B):
        for c in range(C):
            p, y = 1 / (1 + math.exp(-s[b, c])), float(SCORES[b, c])
            want -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert CALLS["bce"](s).item() == pytest.approx(want)


@pytest.mark.parametrize("kind", ["mse", "mse_normalised", "cosine"])
def test_hidden_oracle(kind: str):
    s, t = student(kind), draw(B, L, D, seed=2)
    want = 0.0
    for b in range(B):
        rows = [i for i in range(L) if MASK[b, i]]
        for i in rows:
            x, y = s[b, i].tolist(), t[b, i].tolist()
            if kind == "mse_normalised":
                x, y = standard(x), standard(y)
            if kind == "cosine":
                dot = sum(p * q for p, q in zip(x, y, strict=True))
                value = 1 - dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
            else:
                value = sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / D
            want += value / len(rows)
    assert CALLS[kind](s).item() == pytest.approx(want, rel=1e-6)


def standard(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) / deviation for v in x]


@pytest.mark.parametrize("name", ["attention_kl", "attention_mse", "attention_heads"])
def test_attention_oracle(name: str):
    s, t = student(name).softmax(-1), maps(3, heads=4 if name == "attention_heads" else H)
    if name == "attention_heads":
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    want = 0.0
    for b in range(B):
        rows = [i for i in range(L) if MASK[b, i]]
        for h in range(s.shape[1]):
            for i in rows:
                pairs = [(float(s[b, h, i, j]), float(t[b, h, i, j])) for j in rows]
                if name == "attention_mse":
                    value = sum((p - q) ** 2 for p, q in pairs) / len(rows)
                else:
                    value = sum(q * math.log(q / p) for p, q in pairs)
                want += value / len(rows) / s.shape[1]
    assert CALLS[name](student(name)).item() == pytest.approx(want)


def test_relation_oracle():
    s, t = student("relation"), draw(B, 7, seed=4)

    def cos(x, y):
        return float(x @ y / (x.norm() * y.norm()))

    want = sum((cos(s[i], s[j]) - cos(t[i], t[j])) ** 2 for i in range(B) for j in range(B)) / B**2 * B
    assert CALLS["relation"](s).item() == pytest.approx(want)


@pytest.mark.parametrize("name", ["kl", "cross_entropy", "bce", "mse", "cosine"])
def test_halves_add_up(name: str):
    s = student(name)
    other = {"kl": draw(B, C, seed=1), "cross_entropy": LABELS, "bce": SCORES}.get(name, draw(B, L, D, seed=2))
    function = {
        "kl": terms.kl_divergence,
        "cross_entropy": terms.cross_entropy,
        "bce": terms.binary_cross_entropy,
        "mse": terms.mse,
        "cosine": terms.cosine,
    }[name]
    assert torch.allclose(function(s, other), function(s[:1], other[:1]) + function(s[1:], other[1:]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1e4, 1e4))
def test_padding_has_no_influence(seed: int, noise: float):
    s, t = draw(B, L, D, seed=seed), draw(B, L, D, seed=seed + 1)
    dirty = torch.where(MASK.bool()[..., None], s, torch.full_like(s, noise))
    for function in (terms.mse, terms.cosine):
        assert torch.equal(function(s, t, MASK), function(dirty, t, MASK))
    a, b = draw(B, H, L, L, seed=seed).softmax(-1), draw(B, H, L, L, seed=seed + 1).softmax(-1)
    keys = MASK.bool()[:, None, None, :] & MASK.bool()[:, None, :, None]
    for kind in ("kl", "mse"):
        # A cached teacher gives zeros where it was never asked.
        assert torch.allclose(
            terms.attention(a, b, MASK, kind), terms.attention(a, torch.where(keys, b, 0.0), MASK, kind)
        )


def test_a_fully_masked_row_is_silent():
    mask = MASK.clone()
    mask[2] = 0
    for function, shape in ((terms.mse, (B, L, D)), (terms.cosine, (B, L, D)), (terms.attention, (B, H, L, L))):
        s = draw(*shape, seed=3).softmax(-1).requires_grad_()
        value = function(s, draw(*shape, seed=4).softmax(-1), mask)
        value.backward()
        assert torch.isfinite(value)
        assert s.grad is not None
        assert s.grad[2].abs().sum() == 0
        assert torch.isfinite(s.grad).all()


def test_extreme_logits_are_finite():
    s = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float32, requires_grad=True)
    t = torch.tensor([[-torch.inf, 1e4, 0.0]])
    value = terms.kl_divergence(s, t, 2.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()
    assert value.item() == pytest.approx(4 * 1e4, rel=1e-5)


def test_half_precision_is_computed_in_full():
    s, t = student("mse").bfloat16(), draw(B, L, D, seed=2)
    assert terms.mse(s, t.bfloat16()).dtype == torch.float32
    assert terms.kl_divergence(student("kl").half(), draw(B, C, seed=1).half()).dtype == torch.float32


def test_no_gradient_reaches_the_teacher():
    logits, hidden, vectors = (draw(*shape, seed=9).requires_grad_() for shape in ((B, C), (B, L, D), (B, 7)))
    attention = maps(9).requires_grad_()
    total = terms.kl_divergence(student("kl").requires_grad_(), logits) + terms.mse(
        student("mse").requires_grad_(), hidden
    )
    total = total + terms.cosine(student("mse").requires_grad_(), hidden)
    total = total + terms.relation(student("relation").requires_grad_(), vectors)
    (total + terms.attention(maps(1).requires_grad_(), attention, MASK)).backward()
    assert [t.grad for t in (logits, hidden, vectors, attention)] == [None] * 4


def test_equal_is_zero():
    logits, hidden = student("kl"), student("mse")
    assert terms.kl_divergence(logits, logits, 4.0).abs() < 1e-12
    assert terms.mse(hidden, hidden, MASK) == 0
    assert terms.cosine(hidden, 3 * hidden, MASK).abs() < 1e-9
    assert terms.attention(maps(1), maps(1), MASK) == 0
    assert terms.relation(student("relation"), 2 * student("relation")).abs() < 1e-12

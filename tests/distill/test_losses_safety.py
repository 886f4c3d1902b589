"""What padding, impossible classes, autocast and wrong shapes must not do to a term."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preceptor.distill import losses as terms
from preceptor.errors import UserError

B, L, D, H, C = 3, 5, 4, 2, 6
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
PAIRS = MASK[:, None, :, None] & MASK[:, None, None, :]

TOKEN_TERMS = {
    "mse": lambda s, t: terms.mse(s, t, MASK),
    "mse_normalised": lambda s, t: terms.mse(s, t, MASK, normalise=True),
    "cosine": lambda s, t: terms.cosine(s, t, MASK),
    "attention_kl": lambda s, t: terms.attention(s, t, MASK),
    "attention_mse": lambda s, t: terms.attention(s, t, MASK, kind="mse"),
    "attention_heads": lambda s, t: terms.attention(s, t[:, :1], MASK),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return student, teacher and what counts of them; attention maps hold no probability on padding keys."""
    if not name.startswith("attention"):
        return draw(B, L, D, seed=seed), draw(B, L, D, seed=seed + 1), MASK[..., None]
    keys = MASK[:, None, None, :]
    s, t = (draw(B, H, L, L, seed=seed + i).masked_fill(~keys, -1e9).softmax(-1) for i in (0, 1))
    return s, t, PAIRS


@pytest.mark.parametrize("name", TOKEN_TERMS)
@pytest.mark.parametrize("noise", [float("inf"), float("nan"), 1e300])
def test_padding_changes_neither_value_nor_gradient(name: str, noise: float):
    function, (s, t, counts) = TOKEN_TERMS[name], inputs(name, 3)
    values, gradients = [], []
    for content in (None, noise):
        mine, theirs = (x if content is None else torch.where(counts, x, content) for x in (s, t))
        mine = mine.clone().requires_grad_()
        value = function(mine, theirs)
        value.backward()
        values.append(value.detach())
        gradients.append(mine.grad)
    assert torch.isfinite(values[0])
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert torch.equal(gradients[1] * ~counts, torch.zeros_like(gradients[1]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(TOKEN_TERMS)), st.integers(0, B))
def test_sums_over_parts_of_the_batch_equal_the_whole(seed: int, name: str, cut: int):
    s, t, _ = inputs(name, seed)

    def part(rows: slice) -> Tensor:
        if name.startswith("attention"):
            kind = "mse" if name == "attention_mse" else "kl"
            theirs = t[rows, :1] if name == "attention_heads" else t[rows]
            return terms.attention(s[rows], theirs, MASK[rows], kind=kind)
        if name == "cosine":
            return terms.cosine(s[rows], t[rows], MASK[rows])
        return terms.mse(s[rows], t[rows], MASK[rows], normalise=name == "mse_normalised")

    assert torch.allclose(part(slice(None)), part(slice(0, cut)) + part(slice(cut, None)))


def test_smoothed_labels_add_up_over_parts_of_the_batch():
    logits, labels = draw(4, C, seed=1), torch.tensor([2, -100, 5, 0])
    halves = sum(terms.cross_entropy(logits[rows], labels[rows], 0.1) for rows in (slice(0, 2), slice(2, 4)))
    assert torch.allclose(terms.cross_entropy(logits, labels, 0.1), halves)


def test_a_batch_without_labels_is_silent():
    logits = draw(2, C, seed=1).requires_grad_()
    value = terms.cross_entropy(logits, torch.tensor([-100, -100]))
    value.backward()
    assert value == 0
    assert logits.grad.abs().sum() == 0


def test_vectors_need_no_mask():
    s, t = draw(B, D, seed=1), draw(B, D, seed=2)
    want = sum(float(((s[b] - t[b]) ** 2).sum()) / D for b in range(B))
    assert terms.mse(s, t).item() == pytest.approx(want)
    want = sum(1 - float(s[b] @ t[b] / (s[b].norm() * t[b].norm())) for b in range(B))
    assert terms.cosine(s, t).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_neither_allows_is_as_if_it_were_not_there(dtype: torch.dtype):
    s, t = draw(B, C, seed=1).to(dtype), draw(B, C, seed=2).to(dtype)
    without = terms.kl_divergence(s[:, 1:], t[:, 1:], 2.0)
    s, t = (torch.cat([torch.full((B, 1), -torch.inf, dtype=dtype), x[:, 1:]], dim=1) for x in (s, t))
    s.requires_grad_()
    value = terms.kl_divergence(s, t, 2.0)
    value.backward()
    assert torch.allclose(value, without)
    assert torch.isfinite(s.grad).all()
    assert (s.grad[:, 0] == 0).all()


def test_a_class_that_the_student_alone_forbids_is_infinite_and_not_nan():
    assert terms.kl_divergence(torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1, 2)) == torch.inf


def test_binary_cross_entropy_of_an_impossible_class():
    """-log(1 - sigmoid(-inf)) = 0; the class beside it costs -log sigmoid(1) = 0.31326..."""
    logits = torch.tensor([[-torch.inf, 1.0]], requires_grad=True)
    value = terms.binary_cross_entropy(logits, torch.tensor([[0.0, 1.0]]))
    value.backward()
    assert value.item() == pytest.approx(0.3132616875)
    assert torch.isfinite(logits.grad).all()
    assert terms.binary_cross_entropy(logits, torch.tensor([[1.0, 1.0]])) == torch.inf


@pytest.mark.parametrize("size", [1e4, 3e4])
def test_binary_cross_entropy_at_extreme_logits_equals_torch(size: float):
    logits, scores = torch.tensor([[size, -size, size, 0.0]]), torch.tensor([[0.3, 0.3, 1.0, 0.5]])
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
    assert terms.binary_cross_entropy(logits, scores).item() == pytest.approx(want.item())


def test_attention_maps_with_exact_zeros_have_finite_gradients():
    s = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], requires_grad=True)
    value = terms.attention(s, torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda s: terms.kl_divergence(s[:, 0], s[:, 1]),
        lambda s: terms.mse(s, s + 1, MASK),
        lambda s: terms.cosine(s, s + 1, MASK),
        lambda s: terms.relation(s[:, 0], s[:, 1]),
        lambda s: terms.binary_cross_entropy(s[:, 0], s[:, 1].sigmoid()),
    ],
    ids=["kl", "mse", "cosine", "relation", "bce"],
)
def test_autocast_does_not_lower_the_precision(call):
    s = draw(B, L, D, seed=5).float()
    plain = call(s)
    with torch.autocast("cpu", torch.bfloat16):
        value = call(s)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda: terms.kl_divergence(torch.zeros(3, 4), torch.zeros(3, 1)),
        lambda: terms.binary_cross_entropy(torch.zeros(3, 4), torch.zeros(1, 4)),
        lambda: terms.mse(torch.zeros(3, 5, 4), torch.zeros(3, 1, 4)),
        lambda: terms.cosine(torch.zeros(3, 5, 4), torch.zeros(1, 5, 4)),
        lambda: terms.attention(torch.zeros(3, 2, 5, 5), torch.zeros(3, 2, 5, 1)),
        lambda: terms.attention(torch.zeros(3, 2, 5, 5), torch.zeros(3, 4, 1, 5), MASK),
    ],
    ids=["kl", "bce", "mse", "cosine", "attention", "attention_heads"],
)
def test_shapes_that_would_only_broadcast_are_refused(call):
    with pytest.raises(UserError, match=r"\(3, .* differ in shape"):
        call()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 8))
def test_divergences_are_not_negative(seed: int, temperature: float):
    assert terms.kl_divergence(draw(B, C, seed=seed), draw(B, C, seed=seed + 1), temperature) >= 0
    s, t, _ = inputs("attention_kl", seed)
    assert terms.attention(s, t, MASK) >= 0


def test_relation_of_vectors_without_direction_is_finite():
    s = torch.zeros(B, D, requires_grad=True)
    value = terms.relation(s, draw(B, 7, seed=1).float())
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.segmentation.cross_modal import _on_grid, cross_modal

B, N, C = 4, 4, 3
AVAILABLE = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()
OPTIONS = list(itertools.product(("others", "all"), ("l1", "mse", "cosine"), (False, True), ("sum", "mean")))


def draw(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, N, C, 2, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(f, available, teachers, students, distance, normalise, pairs):
    losses, counts = [], []
    for b in range(len(f)):
        values = []
        for t in set(teachers):
            for s in range(N):
                if s == t or not (available[b, t] and available[b, s]) or (students == "others" and s in teachers):
                    continue
                voxels = []
                for i in itertools.product(*map(range, f.shape[3:])):
                    p, q = f[b, s, :, *i], f[b, t, :, *i].detach()
                    if normalise:
                        p = (p - p.mean()) / (p.var(unbiased=False) + 1e-5).sqrt()
                        q = (q - q.mean()) / (q.var(unbiased=False) + 1e-5).sqrt()
                    if distance == "cosine":
                        voxels.append(1 - (p * q).sum() / (p.norm() * q.norm()))
                    else:
                        voxels.append((p - q).abs().mean() if distance == "l1" else (p - q).pow(2).mean())
                values.append(sum(voxels) / len(voxels))
        total = sum(values) if values else f.new_zeros(())
        losses.append(total / max(1, len(values)) if pairs == "mean" else total)
        counts.append(len(values))
    return torch.stack(losses), counts


@pytest.mark.parametrize("teachers", [[0], [1, 3], [3, 1, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize(("students", "distance", "normalise", "pairs"), OPTIONS)
def test_oracle(teachers, students, distance, normalise, pairs):
    f, g = draw().requires_grad_(), draw().requires_grad_()
    got, counts = cross_modal(
        f, AVAILABLE, teachers, students=students, distance=distance, normalise=normalise, pairs=pairs
    )
    want, want_counts = brute_force(g, AVAILABLE, teachers, students, distance, normalise, pairs)
    assert counts.tolist() == want_counts
    assert torch.allclose(got, want)
    if sum(want_counts):
        a, b = torch.autograd.grad(got.sum(), f)[0], torch.autograd.grad(want.sum(), g)[0]
        assert torch.allclose(a, b)
        assert (a[~AVAILABLE] == 0).all()


@pytest.mark.parametrize(("students", "distance", "normalise", "pairs"), OPTIONS)
def test_gradient_of_the_students(students, distance, normalise, pairs):
    """With modality 1 as the only teacher, held constant: finite differences would see through its stopped gradient."""
    teacher = draw(1)[:, 1:2]

    def loss(s):
        f = torch.cat([s[:, :1], teacher, s[:, 1:]], dim=1)
        return cross_modal(f, AVAILABLE, [1], students=students, distance=distance, normalise=normalise, pairs=pairs)[0]

    assert gradcheck(loss, (draw()[:, [0, 2, 3]].requires_grad_(),))


def test_nothing_flows_into_the_teacher():
    f = draw().requires_grad_()
    cross_modal(f, AVAILABLE, [1])[0].sum().backward()
    assert (f.grad[:, 1] == 0).all()
    assert f.grad[0, 0].abs().max() > 0


@given(st.lists(st.integers(0, 15), min_size=B, max_size=B), st.sets(st.integers(0, 3)), st.integers(0, 9))
@settings(max_examples=30)
def test_absent_features_are_not_looked_at(rows, teachers, seed):
    available = torch.tensor([[bool(row >> m & 1) for m in range(N)] for row in rows])
    f = draw(seed)
    bad = torch.where(available[..., None, None, None, None], f, torch.tensor(float("inf"))).requires_grad_()
    for distance in ("l1", "cosine"):
        losses, counts = cross_modal(bad, available, sorted(teachers), distance=distance)
        assert torch.equal(losses, cross_modal(f, available, sorted(teachers), distance=distance)[0])
        assert losses[counts == 0].abs().sum() == 0
        assert losses.isfinite().all()
        if losses.requires_grad:
            assert torch.autograd.grad(losses.sum(), bad)[0].isfinite().all()
    assert counts.tolist() == [
        sum(row >> t & 1 for t in teachers) * sum(row >> s & 1 for s in range(N) if s not in teachers) for row in rows
    ]


@pytest.mark.parametrize("distance", ["l1", "mse", "cosine"])
def test_where_a_region_lies(distance):
    f = draw()
    options = {"students": "all", "distance": distance, "pairs": "sum"}
    plain, plain_counts = cross_modal(f, AVAILABLE, [1], **options)
    ones, counts = cross_modal(f, AVAILABLE, [1], **options, where_Bdhw=torch.ones(B, 2, 3, 2))
    assert torch.allclose(plain, ones)
    assert counts.tolist() == plain_counts.tolist()
    where = torch.zeros(B, 2, 3, 2)
    where[0, 1, 2, 0] = where[1, 0, 0, 1] = 1  # one voxel each; none in the others
    got, counts = cross_modal(f, AVAILABLE, [1], **options, where_Bdhw=where)
    single = f[:1, :, :, 1:2, 2:3, 0:1]
    assert torch.allclose(got[:1], cross_modal(single, AVAILABLE[:1], [1], **options)[0])
    single = f[1:2, :, :, 0:1, 0:1, 1:2]
    assert torch.allclose(got[1:2], cross_modal(single, AVAILABLE[1:2], [1], **options)[0])
    assert got[2:].tolist() == [0, 0]
    assert counts.tolist() == [3, 1, 0, 0]


def test_gradients_with_a_region():
    f = draw()[:2]
    where = torch.rand(2, 2, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    students = f[:, [0, 2, 3]].clone().requires_grad_()  # the teacher's features are constants
    # A smooth distance: the absolute value has no derivative at 0.
    assert gradcheck(
        lambda x: cross_modal(
            torch.cat([x[:, :1], f[:, 1:2], x[:, 1:]], dim=1), AVAILABLE[:2], [1], distance="mse", where_Bdhw=where
        )[0],
        students,
    )


def test_a_cell_is_in_a_region_if_any_of_its_voxels_is():
    region, expected = torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 2, 2)
    region[0, 0, 1, 0], region[0, 2:, 2:, 2:] = 1, 1
    expected[0, 0, 0, 0] = expected[0, 1, 1, 1] = 1
    assert torch.equal(_on_grid(region, (2, 2, 2)), expected)

from __future__ import annotations

from collections import Counter
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.segmentation.modality_dropout import drop_modalities
from preceptor.segmentation.settings import ModalityDropoutConfig

rows = st.lists(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), min_size=1, max_size=6).map(torch.tensor)


@given(rows, st.sampled_from(["subsets", "sizes", "published", "none"]), st.floats(0, 1), st.integers(0, 99))
def test_shows_some_of_what_is_there(has, kind, progress, seed):
    torch.manual_seed(seed)
    shown = drop_modalities(has, ModalityDropoutConfig(kind=kind, start=0.3, ramp=0.2), progress)
    assert bool(shown.any(dim=1).all())
    assert not bool((shown & ~has).any())
    if kind == "none" or progress < 0.3:
        assert torch.equal(shown, has)
    torch.manual_seed(seed)
    assert torch.equal(shown, drop_modalities(has, ModalityDropoutConfig(kind=kind, start=0.3, ramp=0.2), progress))


def test_subsets_are_equally_likely():
    torch.manual_seed(0)
    shown = drop_modalities(torch.ones(30_000, 4, dtype=torch.bool), ModalityDropoutConfig(), 1.0)
    counts = Counter(tuple(row) for row in shown.tolist())
    assert len(counts) == 15
    # chi-squared with 14 degrees of freedom: 36.1 is its 99.9th percentile
    assert sum((n - 2000) ** 2 / 2000 for n in counts.values()) < 36.1


def test_sizes_are_equally_likely_and_so_are_the_subsets_of_a_size():
    torch.manual_seed(0)
    present = torch.tensor([True, True, False, True])
    shown = drop_modalities(present.expand(30_000, 4), ModalityDropoutConfig(kind="sizes"), 1.0)
    counts = Counter(tuple(row) for row in shown.tolist())
    expected = {subset: 10_000 / comb(3, sum(subset)) for subset in counts}
    assert len(counts) == 7
    # chi-squared with 6 degrees of freedom: 22.5 is its 99.9th percentile
    assert sum((n - expected[subset]) ** 2 / expected[subset] for subset, n in counts.items()) < 22.5


def test_published_draws_one_subset_per_batch_and_never_all():
    torch.manual_seed(0)
    sizes = Counter()
    for _ in range(3000):
        shown = drop_modalities(torch.ones(3, 4, dtype=torch.bool), ModalityDropoutConfig(kind="published"), 0.5)
        assert len({tuple(row) for row in shown.tolist()}) == 1
        sizes[int(shown[0].sum())] += 1
    assert set(sizes) == {1, 2, 3}
    assert all(abs(n - 1000) < 110 for n in sizes.values())  # four standard deviations
    # A case without the drawn modality shows one of its own.
    lacking = torch.tensor([[True, False, False, False]]).repeat(50, 1)
    assert torch.equal(drop_modalities(lacking, ModalityDropoutConfig(kind="published"), 0.5), lacking)


def test_the_ramp_raises_the_share_of_samples_that_drop():
    torch.manual_seed(0)
    has = torch.ones(20_000, 4, dtype=torch.bool)
    whole = drop_modalities(has, ModalityDropoutConfig(start=0.2, ramp=0.4), 0.4).all(dim=1).float().mean()
    assert abs(float(whole) - (0.5 + 0.5 / 15)) < 0.015


def test_a_case_without_any_modality_is_a_bug():
    with pytest.raises(ValueError, match="no modality"):
        drop_modalities(torch.zeros(1, 4, dtype=torch.bool), ModalityDropoutConfig(), 0.0)

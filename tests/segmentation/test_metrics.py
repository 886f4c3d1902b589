from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from preceptor.segmentation.metrics import EMPTY_HD95, dice, hd95, remove_small_components, table

masks = arrays(bool, (4, 5, 3), elements=st.booleans())


@given(masks, masks)
def test_dice(p, t):
    both, sizes = int((p & t).sum()), int(p.sum() + t.sum())
    assert dice(p, t) == pytest.approx(2 * both / sizes if sizes else 1.0, abs=1e-7)
    assert dice(p, t) == dice(t, p)
    assert dice(p, p) == pytest.approx(1)


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a neighbour (6) outside it, the border counting as outside."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)
    return np.argwhere((padded & ~inner)[1:-1, 1:-1, 1:-1])


def brute(p: np.ndarray, t: np.ndarray, spacing) -> float:
    a, b = surface(p) * np.array(spacing), surface(t) * np.array(spacing)
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return max(float(np.percentile(distances.min(1), 95)), float(np.percentile(distances.min(0), 95)))


@settings(max_examples=40)
@given(masks.filter(np.any), masks.filter(np.any), st.sampled_from([(1, 1, 1), (2.5, 1, 0.5)]))
def test_hd95_against_all_pairs_of_surface_voxels(p, t, spacing):
    assert hd95(p, t, spacing) == pytest.approx(brute(p, t, spacing), rel=1e-5, abs=1e-5)


def test_hd95_of_boxes_and_of_nothing():
    p, t = np.zeros((2, 20, 20, 20), bool)
    p[5:10, 5:10, 5:10] = True
    t[5:10, 5:10, 8:13] = True
    assert hd95(p, t, (1, 1, 2)) == pytest.approx(6)
    nothing = np.zeros_like(p)
    assert (hd95(nothing, nothing, (1, 1, 1)), hd95(p, nothing, (1, 1, 1))) == (0, EMPTY_HD95)


def test_small_components_go():
    m = np.zeros((2, 20, 20, 20), bool)
    m[0, 2:6, 2:6, 2:6] = True  # 64 voxels, the largest
    m[0, 10, 10, 10:16] = True  # 6 voxels: under 10 % of 64
    m[0, 15, 15, 8:15] = True  # 7 voxels: over it
    m[1, :3, :3, :3] = True
    got = remove_small_components(m, ["tc", "et"], share=0.1, voxels=2000, et_minimum=27)
    assert int(got[0].sum()) == 71
    assert np.array_equal(got[1], m[1])
    small = remove_small_components(m, ["tc", "et"], et_minimum=28)
    assert not small[1].any()
    assert np.array_equal(small[0], got[0] | m[1])  # it is core now
    # A small component stays where it has `voxels` of them.
    assert np.array_equal(remove_small_components(m, ["tc", "wt"], voxels=6), m)
    assert int(remove_small_components(m, ["tc", "wt"], share=1.0, voxels=10_000)[0].sum()) == 64


def test_diagonal_neighbours_are_one_component():
    m = np.zeros((1, 4, 4, 4), bool)
    m[0, 0, 0, 0] = m[0, 1, 1, 1] = True
    assert np.array_equal(remove_small_components(m, ["wt"], share=1.0), m)


@given(masks, st.floats(0, 1), st.integers(0, 50), st.integers(0, 50))
def test_cleaning_only_takes_away_and_once(m, share, voxels, least):
    once = remove_small_components(m[None], ["et"], share=share, voxels=voxels, et_minimum=least)
    assert not (once & ~m[None]).any()
    assert np.array_equal(remove_small_components(once, ["et"], share=share, voxels=voxels, et_minimum=least), once)


def test_means_are_over_cases_then_over_subsets():
    rows = []
    for subset, region, case, value in [
        ("a", "et", "1", 0.2),
        ("a", "et", "2", 0.4),
        ("a", "wt", "1", 1.0),
        ("a", "wt", "2", 0.0),
        ("a+b", "et", "1", 0.9),
        ("a+b", "wt", "1", 0.7),  # case 2 lacks b
    ]:
        rows.append({"id": case, "subset": subset, "region": region, "dice": value, "hd95": 10 * value})
    got = table(rows)
    assert got["subsets"]["a"]["dice"] == pytest.approx({"et": 0.3, "wt": 0.5})
    assert got["regions"] == pytest.approx({"et": 0.6, "wt": 0.6})
    assert got["hd95"] == pytest.approx({"et": 6, "wt": 6})
    assert (got["dice"], got["n"]) == (pytest.approx(0.6), 2)

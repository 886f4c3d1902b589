from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.evaluate.segmentation import (
    WORST_HD95,
    Score,
    dice,
    et_minimum,
    hd95,
    nest,
    postprocess,
    protocol_id,
    remove_small_components,
    score_case,
    table,
)

EMPTY = np.zeros((4, 5, 6), dtype=bool)


def blobs(seed: int, shape=(7, 8, 9)) -> np.ndarray:
    """A box and some loose voxels, which may touch the border."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) > 0.97
    low = rng.integers(0, 4, 3)
    high = low + rng.integers(1, 6, 3)
    mask[tuple(map(slice, low, high))] = True
    return mask


def test_dice_by_hand():
    p, t = EMPTY.copy(), EMPTY.copy()
    assert dice(p, t) == 1
    p[0, 0, :4] = True
    assert dice(p, t) == pytest.approx(0, abs=1e-8)
    t[0, 0, 2:5] = True
    assert dice(p, t) == pytest.approx(2 * 2 / (4 + 3))
    assert dice(p, p) == 1


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    found = []
    for voxel in np.argwhere(mask).tolist():
        for axis, step in itertools.product(range(3), (-1, 1)):
            other = list(voxel)
            other[axis] += step
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                found.append(tuple(voxel))
                break
    return found


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.5, 1.2)])
@pytest.mark.parametrize("seed", range(4))
def test_hd95_brute_force_and_monai(seed: int, spacing):
    import torch
    from monai.metrics import compute_hausdorff_distance

    p, t = blobs(seed), blobs(seed + 100)
    points = [np.array(surface(mask)) * np.array(spacing) for mask in (p, t)]
    distances = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    want = max(np.percentile(distances.min(axis), 95) for axis in (0, 1))
    assert hd95(p, t, spacing) == pytest.approx(want)
    both = [torch.from_numpy(mask)[None, None].float() for mask in (p, t)]
    peer = compute_hausdorff_distance(*both, percentile=95, spacing=list(spacing), include_background=True)
    assert hd95(p, t, spacing) == pytest.approx(peer.item(), rel=1e-5)


def test_hd95_of_nothing():
    p = EMPTY.copy()
    p[1, 1, 1] = True
    assert hd95(EMPTY, EMPTY) == 0
    assert hd95(p, EMPTY) == hd95(EMPTY, p) == WORST_HD95 == pytest.approx(373.1287, abs=1e-4)
    assert hd95(p, EMPTY, worst=50.0) == 50
    assert hd95(p, p) == 0
    assert hd95(p, np.roll(p, 2, axis=2), (1, 1, 1.5)) == 3


@given(st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=30)
def test_symmetry_and_range(a: int, b: int):
    p, t = blobs(a), blobs(b)
    assert dice(p, t) == dice(t, p)
    assert 0 <= dice(p, t) <= 1
    assert hd95(p, t) == hd95(t, p)
    assert (hd95(p, t) == 0) >= np.array_equal(p, t)
    padded = [np.pad(mask, 2) for mask in (p, t)]
    assert dice(*padded) == dice(p, t)


def test_small_components():
    mask = np.zeros((20, 40, 40), dtype=bool)
    mask[:10, :20, :20] = True  # 4,000 voxels
    mask[15, 30, :] = True  # 40
    mask[15:18, 0:14, 30:40] = True  # 420
    assert remove_small_components(mask).sum() == 4420
    assert remove_small_components(mask, least=30).sum() == 4460
    assert remove_small_components(mask, share=0.2).sum() == 4000
    assert remove_small_components(np.pad(mask[:1], 3)).sum() == 400
    assert not remove_small_components(EMPTY).any()
    corner = np.zeros((4, 4, 4), dtype=bool)
    corner[:2, :2, :2], corner[2, 2, 2] = True, True
    assert remove_small_components(corner, share=1.0).sum() == 9


def test_two_thousand_voxels_are_enough():
    mask = np.zeros((30, 60, 60), dtype=bool)
    mask[:, :50, :40] = True  # 60,000: a tenth is 6,000
    mask[:10, 52:60, 32:57] = True  # 2,000
    assert remove_small_components(mask).sum() == 62000
    mask[0, 52, 32] = False
    assert remove_small_components(mask).sum() == 60000


def test_regions_nest_and_a_small_et_is_core():
    et, tc, wt = (np.zeros((10, 10, 10), dtype=bool) for _ in range(3))
    et[0, :, :], tc[1, :, :], wt[:, 5, :] = True, True, True
    nested = nest({"wt": wt, "et": et, "tc": tc})
    assert nested["tc"].sum() == 200
    assert np.array_equal(nested["wt"], wt | tc | et)
    assert et.sum() == 100
    assert tc.sum() == 100
    small = et_minimum({"et": et, "tc": tc, "wt": wt}, least=101)
    assert not small["et"].any()
    assert np.array_equal(small["tc"], et | tc)
    assert np.array_equal(et_minimum({"et": et, "tc": tc}, least=100)["et"], et)
    done = postprocess({"et": et, "tc": tc, "wt": wt})
    assert not done["et"].any()
    assert np.array_equal(done["tc"], et | tc)
    assert np.array_equal(postprocess({"lesion": et})["lesion"], et)


def test_the_table_averages_cases_then_subsets():
    rows = [
        Score("a", "t1", "et", {"dice": 0.2, "hd95": 1.0}),
        Score("b", "t1", "et", {"dice": 0.4, "hd95": 3.0}),
        Score("a", "t1+t2", "et", {"dice": 0.9, "hd95": 4.0}),
        Score("a", "t1", "wt", {"dice": 1.0, "hd95": 0.0}),
    ]
    got = table(rows)
    assert got["dice"]["t1"]["et"] == pytest.approx(0.3)
    assert got["dice"]["mean"] == {"et": pytest.approx(0.6), "wt": 1.0}
    assert got["hd95"]["mean"]["et"] == pytest.approx(3.0)
    assert list(got["dice"]) == ["t1", "t1+t2", "mean"]


def test_scores_of_a_case():
    masks = {"et": blobs(0), "wt": blobs(1)}
    rows = score_case("p1", "flair", {"et": blobs(2), "wt": blobs(1)}, masks, (1, 1, 2))
    assert [(r.case, r.subset, r.region) for r in rows] == [("p1", "flair", "et"), ("p1", "flair", "wt")]
    assert rows[0].values == {"dice": dice(blobs(2), blobs(0)), "hd95": hd95(blobs(2), blobs(0), (1, 1, 2))}
    assert rows[1].values == {"dice": 1.0, "hd95": 0.0}
    assert protocol_id("brats2020", "rfnet", post=False) == "brats2020/rfnet/A"
    assert protocol_id("brats2020", "rfnet", post=True) == "brats2020/rfnet/A-post"

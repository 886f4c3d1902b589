from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from preceptor.data.volumes import to_regions
from preceptor.segmentation.config import EvaluationConfig
from preceptor.segmentation.evaluate import label_map
from preceptor.segmentation.metrics import EMPTY_HD95, dice, hd95, post_process, table

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
    assert pytest.approx(np.linalg.norm((240, 240, 155)), abs=1e-4) == EMPTY_HD95, "the diagonal of a BraTS volume"


@settings(max_examples=40)
@given(masks.filter(np.any), masks.filter(np.any), st.sampled_from([(1, 1, 1), (2.5, 1, 0.5), (1.211, 1.875, 1.875)]))
def test_hd95_is_that_of_monai(p, t, spacing):
    from monai.metrics import compute_hausdorff_distance

    one = [torch.from_numpy(np.pad(mask, 2))[None, None] for mask in (p, t)]
    each = [float(mm) for mm in spacing]
    want = compute_hausdorff_distance(*one, include_background=True, percentile=95, spacing=each)
    assert hd95(p, t, spacing) == pytest.approx(float(want), abs=1e-4)


def test_hd95_of_single_voxels_at_opposite_corners_is_the_diagonal():
    p, t = np.zeros((2, 6, 7, 8), bool)
    p[0, 0, 0] = t[5, 6, 7] = True
    assert hd95(p, t, (3, 1, 0.5)) == pytest.approx(np.sqrt(15**2 + 6**2 + 3.5**2))
    assert hd95(p, p, (3, 1, 0.5)) == 0


@given(masks.filter(np.any), masks.filter(np.any), st.tuples(*[st.integers(0, 3)] * 6))
def test_hd95_does_not_depend_on_the_empty_space_around(p, t, margins):
    pad = [margins[:2], margins[2:4], margins[4:]]
    assert hd95(np.pad(p, pad), np.pad(t, pad), (2, 1, 1)) == hd95(p, t, (2, 1, 1))


BRATS = {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}
NO_ET = {"et_minimum": 0}


def published(label: np.ndarray, share: float, voxels: int, top: int, et_minimum: int) -> np.ndarray:
    """The published rule, component by component; slices are the first axis here."""
    found, count = ndimage.label(label >= 1, structure=np.abs(np.indices((3, 3, 3)) - 1).sum(0) <= 2)
    members = [found == number for number in range(1, count + 1)]
    largest = max((member.sum() for member in members), default=0)
    for member in members:
        if member.sum() < min(voxels, share * largest) or np.nonzero(member)[0].max() <= top:
            label = np.where(member, 0, label)
    if (label == 4).sum() < et_minimum:
        label = np.where(label == 4, 1, label)
    return label


labels = arrays(np.uint8, (5, 6, 4), elements=st.sampled_from([0, 0, 0, 1, 2, 4]))


@given(labels, st.sampled_from([0, 0.1, 0.5, 1]), st.integers(0, 30), st.integers(0, 4), st.integers(0, 20))
def test_post_processing_is_the_published_rule(label, share, voxels, lowest, least):
    got = post_process(label, BRATS, share=share, voxels=voxels, lowest_slices=lowest, et_minimum=least)
    assert np.array_equal(got, published(label, share, voxels, lowest - 1, least))


def test_components_are_of_the_whole_tumour():
    label = np.zeros((30, 20, 20), np.uint8)
    label[2:12, 2:12, 2:12] = 2  # 1,000 voxels of oedema
    label[3, 3, 3] = 4  # an island of enhancing tumour in it belongs to that component
    label[20, 10, 5:15] = 2  # 10 voxels
    label[25, 10, 5:16] = 1  # 11 voxels
    got = post_process(label, BRATS, share=0.011, **NO_ET)
    assert got[3, 3, 3] == 4
    assert (np.count_nonzero(got == 2), np.count_nonzero(got == 1)) == (999, 11)
    # A component of `voxels` voxels stays, however large the largest one is.
    assert np.array_equal(post_process(label, BRATS, voxels=10, **NO_ET), label)
    # Nothing above the lowest 12 slices: the large component goes, and small is relative to it nevertheless.
    low = post_process(label, BRATS, share=0.01, lowest_slices=12, **NO_ET)
    assert np.count_nonzero(low) == 21
    assert np.array_equal(post_process(label, BRATS, share=0.01, lowest_slices=11, **NO_ET), label)


def test_voxels_that_share_an_edge_are_one_component_and_those_that_share_a_corner_are_not():
    edge, corner = np.zeros((2, 4, 4, 4), np.uint8)
    edge[0, 0, 0] = edge[0, 1, 1] = edge[1, 0, 1] = 2
    corner[0, 0, 0] = corner[1, 1, 1] = corner[1, 1, 2] = 2
    assert np.count_nonzero(post_process(edge, BRATS, share=1, **NO_ET)) == 3
    assert np.count_nonzero(post_process(corner, BRATS, share=1, **NO_ET)) == 2


@pytest.mark.parametrize(
    ("regions", "becomes"),
    [(BRATS, 1), ({"et": (3,), "tc": (1, 3), "wt": (1, 2, 3)}, 1), ({"et": (4,), "wt": (2, 4)}, 2), ({"et": (4,)}, 0)],
)
def test_a_small_enhancing_tumour_gets_the_label_around_it(regions, becomes):
    label = np.zeros((12, 12, 12), np.uint8)
    label[2:8, 2:8, 2:8] = max(set().union(*regions.values()) - set(regions["et"]), default=0)
    label[3:6, 3:6, 3:6] = regions["et"][0]
    assert np.array_equal(post_process(label, regions, et_minimum=27), label)
    assert (post_process(label, regions, et_minimum=28)[3:6, 3:6, 3:6] == becomes).all()


@given(
    arrays(np.float32, (3, 4, 5, 3), elements=st.sampled_from([0.2, 0.8])),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(0, 50),
)
def test_post_processing_keeps_regions_nested_and_changes_nothing_twice(probabilities, share, voxels, least):
    config = EvaluationConfig(minimum_component=share, minimum_component_voxels=voxels, et_minimum=least)
    raw, post = (label_map(probabilities, BRATS, settings) for settings in (None, config))
    et, tc, wt = to_regions(post, BRATS)
    assert not (et & ~tc).any()
    assert not (tc & ~wt).any()
    assert not ((post > 0) & (raw == 0)).any()
    again = post_process(post, BRATS, share=share, voxels=voxels, et_minimum=least)
    assert np.array_equal(again, post)


@pytest.mark.real_data
def test_perfect_masks_of_real_tumours_keep_what_the_published_rule_keeps():
    root = Path(os.environ["PRECEPTOR_DATA"]) / "brats20_cubes"
    scores = []
    for path in sorted(root.glob("*/*_seg.nii.gz")):
        label = np.asarray(nibabel.load(path).dataobj).astype(np.uint8).T  # slices first
        got = post_process(label, BRATS, **NO_ET)
        assert np.array_equal(got, published(label, 0.1, 2000, -1, 0)), path
        pairs = zip(to_regions(got, BRATS), to_regions(label, BRATS), strict=True)
        scores.append([dice(kept, truth) for kept, truth in pairs])
    # Dice of the truth after the published rule, as measured with another implementation.
    assert len(scores) == 300
    assert 100 * np.mean(scores, axis=0) == pytest.approx([99.99, 99.99, 99.93], abs=0.006)


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

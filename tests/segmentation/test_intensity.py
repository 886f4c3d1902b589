from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.volumes import load_case
from preceptor.errors import UserError
from preceptor.segmentation.intensity import bounding_box, foreground, normalise

KINDS = ("zscore", "percentile", "histogram")


def ball(background: float = 0.0, low: int = 100, high: int = 200, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with whole numbers inside a ball, and the ball."""
    grid = np.stack(np.meshgrid(*[np.arange(size) - (size - 1) / 2] * 3, indexing="ij"))
    inside = (grid**2).sum(0) < (size / 3) ** 2
    values = np.random.default_rng(0).integers(low, high, inside.shape)
    return np.where(inside, values, background).astype(np.float32), inside


@pytest.mark.parametrize("background", [0.0, -1024.0, 7.0])
def test_zscore_of_the_foreground(background):
    image, inside = ball(background)
    out = normalise(image, "zscore")
    values = image[inside].astype(np.float64)
    assert np.allclose(out[inside], (values - values.mean()) / values.std(), atol=1e-5)
    assert not out[~inside].any()
    assert out.dtype == np.float32


def test_percentiles_are_clipped():
    image, inside = ball()
    image[12, 12, 12] = 1e6
    values = np.clip(image[inside].astype(np.float64), *np.percentile(image[inside], (0.5, 99.5)))
    assert np.allclose(normalise(image, "percentile")[inside], (values - values.mean()) / values.std(), atol=1e-4)


def test_histogram_as_published():
    """Bins are one grey level wide where the minimum is 0: the last level with 50 voxels is the clip."""
    image, inside = ball(high=130)
    image[12, 12, 10:13] = 131, 160, 180
    levels = np.bincount(image.astype(int).reshape(-1))
    top = np.flatnonzero(levels >= 50)[-1]
    assert top < 131
    values = np.minimum(image[inside], top).astype(np.float64)
    out = normalise(image, "histogram")
    assert np.allclose(out[inside], (values - values.mean()) / values.std(), atol=1e-4)
    assert not out[~inside].any()
    # Ringing below the background counts as background.
    image[0, 0, 5], image[1, 1, 1] = -20, -3
    assert not normalise(image, "histogram")[~inside].any()


def test_histogram_clips_at_a_bin_of_exactly_50_voxels():
    image = np.zeros((10, 10, 20), np.float32)
    image.reshape(-1)[1000:1602] = [*[60] * 551, *[90] * 50, 120]
    values = np.minimum(image[image > 0], 90).astype(np.float64)
    expected = (values - values.mean()) / values.std()
    assert np.allclose(normalise(image, "histogram")[image > 0], expected, atol=1e-4)


def test_histogram_refuses_what_it_is_not_for():
    image, _ = ball()
    with pytest.raises(UserError, match="it applies to integer intensities"):
        normalise(image / 1000, "histogram")
    with pytest.raises(UserError, match="clip more than 5 %"):
        normalise(image * 100, "histogram")
    with pytest.raises(UserError, match="did you mean 'zscore'"):
        normalise(image, "z-score")


def test_ringing_and_noise_around_the_head_are_background_and_holes_in_it_are_not():
    image, inside = ball()
    ring = binary_dilation(inside) & ~inside
    rng = np.random.default_rng(1)
    image[ring] = rng.uniform(-60, 0, ring.sum())
    image[11:13, 11:13, 11:13] = 0  # fluid that is as dark as air
    assert np.array_equal(foreground(image), inside)
    noisy = image + np.where(inside, 0, np.abs(rng.normal(0, 3, image.shape))).astype(np.float32)
    found = foreground(noisy)
    assert found[inside].all()
    assert found[~inside].mean() < 0.01


def test_a_crop_from_inside_a_head_is_all_foreground_and_a_constant_image_is_zero():
    values = np.random.default_rng(0).normal(500, 20, (8, 8, 8)).astype(np.float32)
    assert foreground(values).all()
    assert normalise(values, "zscore").std() == pytest.approx(1, abs=1e-3)
    assert not normalise(np.full((4, 4, 4), 3.0), "zscore").any()


@given(st.floats(0.5, 50), st.sampled_from(["zscore", "percentile"]))
def test_the_unit_of_brightness_does_not_matter(gain, kind):
    image, _ = ball()
    assert np.allclose(normalise(image * np.float32(gain), kind), normalise(image, kind), atol=1e-3)


def test_boxes():
    mask = np.zeros((5, 6, 7), bool)
    assert bounding_box(mask) == (slice(0, 5), slice(0, 6), slice(0, 7))
    mask[1, 2, 3] = mask[3, 4, 3] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 5), slice(3, 4))


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_real_cases(kind):
    """Brains cut out, with ringing below 0: 13 to 18 % of the volume is brain."""
    data = read_volumes(Path(os.environ["PRECEPTOR_DATA"]) / "mri")
    for case in data.samples:
        for image in load_case(case, data).images.values():
            out = normalise(image, kind)
            inside = out != 0
            assert 0.13 < inside.mean() < 0.18
            assert out[inside].mean(dtype=np.float64) == pytest.approx(0, abs=1e-3)
            assert out[inside].std(dtype=np.float64) == pytest.approx(1, abs=1e-3)
            assert (image[inside] <= 0).mean() < 0.02  # dark fluid inside the brain
            assert np.abs(out).max() < (20 if kind == "zscore" else 10)

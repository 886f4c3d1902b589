from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.fft import dctn

from preceptor.data.phash import BITS, COPY_BITS, as_text, cosine_transform, from_text, hashes, near, thumbnail
from tests.auditing.made import picture

words = arrays(np.uint64, st.tuples(st.integers(1, 9), st.just(4)), elements=st.integers(0, 2**64 - 1))


def test_transform_is_scipys() -> None:
    values = np.random.default_rng(0).integers(0, 255, (3, 64, 64)).astype(np.uint8)
    expected = dctn(values.astype(float), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(cosine_transform(values), expected, atol=1e-9)


def test_bits_say_which_low_frequencies_are_above_their_median() -> None:
    grey = thumbnail(picture(1))
    low = dctn(grey.astype(float), norm="ortho")[:16, :16].ravel()
    expected = low > np.median(low[1:])
    expected[0] = False
    text = as_text(hashes(grey[None])[0])
    assert int(text, 16) == int("".join("1" if bit else "0" for bit in expected), 2)


def test_a_blank_image_has_no_hash_and_is_near_nothing() -> None:
    blank = hashes(np.full((2, 64, 64), 7, np.uint8))
    assert not blank.any()
    assert len(near(blank, blank, BITS)[0]) == 0


@given(words)
def test_text_and_back(found: np.ndarray) -> None:
    assert (from_text([as_text(row) for row in found]) == found).all()


@pytest.mark.parametrize("text", ["", "12", "g" * 64, "0" * 65])
def test_broken_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"digits|invalid literal"):
        from_text([text])


@settings(deadline=None)
@given(words, words, st.integers(0, BITS), st.booleans())
def test_near_is_brute_force(left: np.ndarray, right: np.ndarray, bits: int, upper: bool) -> None:
    if upper:
        right = left
    expected = []
    for i, one in enumerate(left):
        for j, two in enumerate(right):
            distance = sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(one, two, strict=True))
            if distance <= bits and one.any() and two.any() and not (upper and i >= j):
                expected.append((i, j, distance))
    found = zip(*(part.tolist() for part in near(left, right, bits, upper=upper)), strict=True)
    assert sorted(found) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("side", [96, 224, 512])
def test_copies_stay_near_and_others_far(seed: int, side: int) -> None:
    original = picture(seed, 320)
    buffer = io.BytesIO()
    original.resize((side, side), Image.Resampling.BICUBIC).convert("RGB").save(buffer, "JPEG", quality=60)
    copy = Image.open(buffer)
    found = hashes(np.stack([thumbnail(image) for image in (original, copy, picture(seed + 100, 320))]))
    assert len(near(found[:1], found[1:2], COPY_BITS)[0]) == 1
    assert len(near(found[:1], found[2:], 64)[0]) == 0


def test_near_of_more_images_than_are_compared_at_once() -> None:
    found = np.random.default_rng(0).integers(1, 2**63, (2100, 4)).astype(np.uint64)
    left, right, bits = near(found, found, 0)
    assert np.array_equal(left, np.arange(2100))
    assert np.array_equal(right, left)
    assert not bits.any()

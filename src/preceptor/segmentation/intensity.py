"""Intensities of scanners made comparable: z-scores inside the foreground, the background 0."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from preceptor.errors import UserError, nearest

Intensity = Literal["zscore", "percentile", "histogram"]

PERCENTILES = (0.5, 99.5)
BIN_VOXELS = 50
_MAX_BINS = 10**6
# Of the range from background to the 99.5th percentile: what is no brighter than this is background where it reaches
# the border, so that ringing around a brain that was cut out (also below 0) does not count as brain.
_LEVEL, _NOISY_LEVEL = 0.01, 0.15


def normalise(image: np.ndarray, kind: Intensity) -> np.ndarray:
    """Return an image (D, H, W) as float32: mean 0 and deviation 1 over the foreground, the background 0.

    - ``zscore``: that alone.
    - ``percentile``: clipped to the 0.5th and 99.5th percentile of the foreground before.
    - ``histogram``, as the published LCKD: a histogram of int(maximum) bins, clipped above at the last bin that holds
      at least 50 voxels; the foreground is what differs from the corner voxel. Values below the corner's count as it.

    For the first two the foreground is `foreground`. An image of one value is 0 throughout.

    Raises:
        UserError: `kind` is not known, or the image has no whole-number intensities for a histogram.
    """
    if kind not in get_args(Intensity):
        raise UserError(f"intensity {kind!r} is not known{nearest(kind, get_args(Intensity))}")
    image = np.asarray(image, np.float32)
    if kind == "histogram":
        corner = image[0, 0, 0]
        image = np.clip(image, corner, _histogram_top(image))
        inside = image != corner
    else:
        inside = foreground(image)
    values = image[inside]
    out = np.zeros(image.shape, np.float32)
    if len(values) == 0:
        return out
    if kind == "percentile":
        values = np.clip(values, *np.percentile(values, PERCENTILES))
    # Sums in double precision: a million float32 terms lose the small ones.
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    out[inside] = (values - np.float32(mean)) / np.float32(max(deviation, 1e-8))
    return out


def _histogram_top(image: np.ndarray) -> np.float32:
    """Return the lower edge of the last of int(maximum) bins that holds at least 50 voxels."""
    bins = int(image.max())
    if not 2 <= bins <= _MAX_BINS:
        raise UserError(
            f"intensity=histogram cuts the range into as many bins as the largest voxel is bright, here {bins}; it is "
            "for whole numbers as scanners store them: use intensity=percentile"
        )
    counts, edges = np.histogram(image, bins=bins)
    full = np.flatnonzero(counts >= BIN_VOXELS)
    # A background that fills a bin is there in every head; without any full bin nothing can be clipped.
    top = edges[full[-1]] if len(full) else edges[-1]
    if np.mean(image[image != image[0, 0, 0]] > top) > 0.05:
        raise UserError(
            f"intensity=histogram would clip more than 5 % of the image: so few voxels are there for {bins} levels of "
            f"brightness that few bins hold {BIN_VOXELS}; use intensity=percentile"
        )
    return np.float32(top)


def foreground(image: np.ndarray) -> np.ndarray:
    """Return the bool mask (D, H, W) of what is not background.

    Background is what is connected to the border and no brighter than the corners, give or take 1 % of the range, or
    the corners' noise where that is more. Dark parts that the foreground encloses (fluid, or air in the lungs) belong
    to it. An image whose corners are not its darkest part, such as a crop from inside a head, is all foreground.
    """
    from scipy.ndimage import label

    low, high = float(image.min()), float(np.percentile(image, PERCENTILES[1]))
    if high <= low:
        high = float(image.max())
    corners = np.concatenate([part.reshape(-1) for part in _corners(image)])
    ground = float(np.median(corners))
    if ground > low + 0.5 * (high - low):
        return np.ones(image.shape, bool)
    noise = 1.4826 * float(np.median(np.abs(corners - ground)))
    level = ground + max(_LEVEL * (high - ground), min(4 * noise, _NOISY_LEVEL * (high - ground)))
    dark = image <= level
    parts, count = label(dark)
    border = np.zeros(count + 1, bool)
    for axis in range(3):
        for side in (0, -1):
            border[np.unique(parts.take(side, axis))] = True
    border[0] = False
    return ~border[parts]


def _corners(image: np.ndarray) -> list[np.ndarray]:
    size = [max(1, side // 16) for side in image.shape]
    ends = [(slice(0, n), slice(side - n, side)) for n, side in zip(size, image.shape, strict=True)]
    return [image[a, b, c] for a in ends[0] for b in ends[1] for c in ends[2]]


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Return the smallest box around a mask (D, H, W); the whole where the mask is empty."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2])
    ends = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        ends.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return ends[0], ends[1], ends[2]

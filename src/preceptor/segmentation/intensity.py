"""Normalise intensities: z-scores inside the foreground, 0 in the background."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from preceptor.errors import UserError, nearest

Intensity = Literal["zscore", "percentile", "histogram"]

PERCENTILES = (0.5, 99.5)
BIN_VOXELS = 50
_MAX_BINS = 10**6
# Fractions of the range from the background to the 99.5th percentile. Voxels at the border that are not brighter count
# as background, so that ringing around a skull-stripped brain (also below 0) does not count as brain.
_LEVEL, _NOISY_LEVEL = 0.01, 0.15


def normalise(image: np.ndarray, kind: Intensity) -> np.ndarray:
    """Normalise an image (D, H, W) to float32 with mean 0 and standard deviation 1 in the foreground, 0 elsewhere.

    - ``zscore``: nothing else.
    - ``percentile``: clip to the 0.5th and 99.5th percentiles of the foreground first.
    - ``histogram`` (published LCKD code): clip above at the last of int(maximum) bins with at least 50 voxels, and
      below at the value of the corner voxel. The foreground are the voxels that differ from the corner voxel.

    For the first two, see `foreground`. A constant image becomes 0.

    Raises:
        UserError: `kind` is unknown, or `histogram` does not apply to the image.
    """
    if kind not in get_args(Intensity):
        raise UserError(f"intensity {kind!r} is not known{nearest(kind, get_args(Intensity))}")
    image = np.asarray(image, np.float32)
    inside = foreground(image, kind)
    if kind == "histogram":
        image = np.clip(image, image[0, 0, 0], _histogram_top(image))
    values = image[inside]
    out = np.zeros(image.shape, np.float32)
    if len(values) == 0:
        return out
    if kind == "percentile":
        values = np.clip(values, *np.percentile(values, PERCENTILES))
    # Sum in double precision, because a float32 sum of a million terms loses the small ones.
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    out[inside] = (values - np.float32(mean)) / np.float32(max(deviation, 1e-8))
    return out


def _histogram_top(image: np.ndarray) -> np.float32:
    """Return the lower edge of the last of int(maximum) bins with at least 50 voxels."""
    bins = int(image.max())
    if not 2 <= bins <= _MAX_BINS:
        raise UserError(
            f"intensity=histogram needs as many bins as the largest voxel value, here {bins}; it applies to integer "
            "intensities of scanners, so set intensity=percentile"
        )
    counts, edges = np.histogram(image, bins=bins)
    full = np.flatnonzero(counts >= BIN_VOXELS)
    # The background of a head always fills a bin. Without a full bin nothing is clipped.
    top = edges[full[-1]] if len(full) else edges[-1]
    if np.mean(image[image != image[0, 0, 0]] > top) > 0.05:
        raise UserError(
            f"intensity=histogram would clip more than 5 % of the image, because few of the {bins} bins have "
            f"{BIN_VOXELS} voxels; set intensity=percentile"
        )
    return np.float32(top)


def foreground(image: np.ndarray, kind: Intensity = "zscore") -> np.ndarray:
    """Return the mask (D, H, W) bool of the foreground. For ``histogram``, it is brighter than the corner voxel.

    Otherwise, the background is connected to the border and at most as bright as the corners plus 1 % of the range (or
    plus the noise of the corners, if that is larger). Dark parts that are enclosed by the foreground, such as fluid or
    air in the lungs, belong to it. If the corners are not the darkest part, as in a crop from inside a head, everything
    is foreground.
    """
    from scipy.ndimage import label

    if kind == "histogram":
        return image > image[0, 0, 0]
    low, high = float(image.min()), float(np.percentile(image, PERCENTILES[1]))
    if high <= low:
        high = float(image.max())
    corners = np.concatenate([part.reshape(-1) for part in _corners(image)])
    background = float(np.median(corners))
    if background > low + 0.5 * (high - low):
        return np.ones(image.shape, bool)
    noise = 1.4826 * float(np.median(np.abs(corners - background)))
    level = background + max(_LEVEL * (high - background), min(4 * noise, _NOISY_LEVEL * (high - background)))
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
    """Return the bounding box of a mask (D, H, W), or the whole volume if the mask is empty."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2])
    ends = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        ends.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return ends[0], ends[1], ends[2]

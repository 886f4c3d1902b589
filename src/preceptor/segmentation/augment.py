"""Draw random patches of a case and augment them. All random numbers come from the generator that is passed in.

Patches are (N, D, H, W) float32 with a label map (D, H, W) uint8. Voxels outside the volume are 0, like the background.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate

Augment = Literal["none", "light", "full"]

# `full`: probability and range of each step, as published.
ROTATION, ROTATION_P = 15.0, 0.2  # degrees about each axis
SCALE, SCALE_P = (0.85, 1.25), 0.2
ELASTIC_P, ELASTIC_STEP, ELASTIC_SIZE = (
    0.2,
    16,
    3.0,
)  # knots every 16 voxels, displaced with a standard deviation of 3 voxels
NOISE_P, NOISE = 0.1, 0.3  # largest standard deviation, for images of standard deviation 1
BLUR_P, BLUR = 0.2, (0.5, 1.0)  # sigma in voxels
BRIGHTNESS_P, BRIGHTNESS = 0.15, (0.75, 1.25)
CONTRAST_P, CONTRAST = 0.15, (0.75, 1.25)
LOW_RESOLUTION_P, LOW_RESOLUTION = 0.25, (0.5, 1.0)
GAMMA_P, GAMMA = 0.15, (0.7, 1.5)
CROP_SCALE_P, CROP_SCALE = 0.5, (0.9, 1.1)
# `light`, as is common for BraTS.
SHIFT, GAIN = 0.1, 0.1


def draw_patch(
    images: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    foreground_probability: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random patch of the given size from images (N, D, H, W) and a label map (D, H, W).

    With `foreground_probability` the patch is centred, as far as possible, on a random voxel of a random label, so that
    rare labels are as frequent as common ones. Otherwise its position is uniform. Smaller volumes are padded with 0.
    """
    shape = label.shape
    slack = [side - extent for side, extent in zip(shape, size, strict=True)]
    # Always draw both, so that later random numbers do not depend on whether the case has a lesion.
    uniform, choose = rng.random(3), rng.random(3)
    start = [int(u * (r + 1)) if r > 0 else r // 2 for u, r in zip(uniform, slack, strict=True)]
    values = np.flatnonzero(np.bincount(label.reshape(-1), minlength=256)[1:]) + 1
    if choose[0] < foreground_probability and len(values):
        voxels = np.flatnonzero(label == values[int(choose[1] * len(values))])
        centre = np.unravel_index(voxels[int(choose[2] * len(voxels))], shape)
        start = [
            int(np.clip(c - extent // 2, 0, r)) if r > 0 else r // 2
            for c, extent, r in zip(centre, size, slack, strict=True)
        ]
    return cut_out(images, start, size), cut_out(label, start, size)


def cut_out(volume: np.ndarray, start: list[int], size: tuple[int, int, int]) -> np.ndarray:
    """Return the box (..., *size) from `start` of a volume (..., D, H, W), padded with 0 outside the volume."""
    out = np.zeros((*volume.shape[:-3], *size), volume.dtype)
    low = [max(begin, 0) for begin in start]
    high = [min(begin + extent, side) for begin, extent, side in zip(start, size, volume.shape[-3:], strict=True)]
    a, b, c = (slice(first, last) for first, last in zip(low, high, strict=True))
    d, h, w = (slice(first - begin, last - begin) for first, last, begin in zip(low, high, start, strict=True))
    out[..., d, h, w] = volume[..., a, b, c]
    return out


def draw_size(size: tuple[int, int, int], augment: Augment, rng: np.random.Generator) -> tuple[int, int, int]:
    """Return the size of the crop that is scaled to `size`: with `full`, in half of the cases, 0.9 to 1.1 times it."""
    chosen, scale = rng.random(), rng.uniform(*CROP_SCALE)
    if augment != "full" or chosen >= CROP_SCALE_P:
        return size
    d, h, w = (max(2, round(side * scale)) for side in size)
    return d, h, w


def augment_patch(
    images: np.ndarray, label: np.ndarray, available: np.ndarray, augment: Augment, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Augment a patch. Modalities that are not `available` (N,) stay 0.

    - ``none``: no change.
    - ``light``: mirror each axis with probability 0.5; shift and scale the intensities of the foreground by up to 0.1.
    - ``full``: mirror, deform, rotate and scale; then noise, blur, brightness, contrast, low resolution and gamma, each
      with the probability of the published code.
    """
    if augment == "none":
        return images, label
    axes = tuple(axis for axis, chosen in enumerate(rng.random(3) < 0.5) if chosen)
    images, label = np.flip(images, tuple(axis + 1 for axis in axes)), np.flip(label, axes)
    if augment == "light":
        shape = (len(images), 1, 1, 1)
        gain = 1 + rng.uniform(-GAIN, GAIN, shape).astype(np.float32)
        shift = rng.uniform(-SHIFT, SHIFT, shape).astype(np.float32)
        return np.where(images != 0, images * gain + shift, np.float32(0)), np.ascontiguousarray(label)
    images, label = _deform(np.ascontiguousarray(images), np.ascontiguousarray(label), rng)
    for channel in range(len(images)):
        seed = int(rng.integers(2**32))
        if available[channel]:
            images[channel] = _intensity(images[channel], np.random.default_rng(seed))
    images[~available] = 0
    return images, label


def _deform(images: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rotate, scale and deform images (linear) and label map (nearest) in one resampling step."""
    rotate, rescale, elastic = rng.random(3) < (ROTATION_P, SCALE_P, ELASTIC_P)
    angles, scale = rng.uniform(-ROTATION, ROTATION, 3), rng.uniform(*SCALE)
    shape = label.shape
    knots = [max(3, side // ELASTIC_STEP + 1) for side in shape]
    shifts = rng.standard_normal((1, 3, *knots), np.float32)
    if not (rotate or rescale or elastic):
        return images, label
    matrix = _rotation(np.radians(angles)) if rotate else np.eye(3)
    matrix = matrix / (scale if rescale else 1.0)
    axes = [torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in shape]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) @ torch.from_numpy(matrix.T.astype(np.float32))
    if elastic:
        displacement = interpolate(torch.from_numpy(shifts), shape, mode="trilinear", align_corners=True)
        positions += ELASTIC_SIZE * displacement[0].permute(1, 2, 3, 0)
    # grid_sample expects (x, y, z) in [-1, 1], from the outer face of the first voxel to that of the last one.
    grid = (positions * (2 / torch.tensor(shape))).flip(-1)[None]
    out = grid_sample(torch.from_numpy(images)[None], grid, "bilinear", "zeros", align_corners=False)[0]
    labels = grid_sample(torch.from_numpy(label).float()[None, None], grid, "nearest", "zeros", align_corners=False)
    return out.numpy(), labels[0, 0].to(torch.uint8).numpy()


def _rotation(angles: np.ndarray) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        a, b = [other for other in range(3) if other != axis]
        rotation = np.eye(3)
        rotation[a, a], rotation[a, b], rotation[b, a], rotation[b, b] = c, -s, s, c
        matrix = matrix @ rotation
    return matrix


def _intensity(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply random noise, blur, brightness, contrast, low resolution and gamma to an image (D, H, W)."""
    from monai.transforms import AdjustContrast, GaussianSmooth, RandGaussianNoise, RandSimulateLowResolution

    noise, blur, brightness, contrast, low, gamma = rng.random(6) < (
        NOISE_P,
        BLUR_P,
        BRIGHTNESS_P,
        CONTRAST_P,
        LOW_RESOLUTION_P,
        GAMMA_P,
    )
    seeds = rng.integers(2**31, size=2)
    sigma, gain, spread, power = (rng.uniform(*span) for span in (BLUR, BRIGHTNESS, CONTRAST, GAMMA))
    x: Any = torch.from_numpy(image)[None]
    noisy: Any = RandGaussianNoise(prob=1, std=NOISE)
    coarse: Any = RandSimulateLowResolution(prob=1, zoom_range=LOW_RESOLUTION)
    if noise:
        x = noisy.set_random_state(seed=int(seeds[0]))(x)
    if blur:
        x = GaussianSmooth(sigma)(x)
    if brightness:
        x = x * gain
    if contrast:
        mean, minimum, maximum = x.mean(), x.min(), x.max()
        x = ((x - mean) * spread + mean).clamp(minimum, maximum)
    if low:
        x = coarse.set_random_state(seed=int(seeds[1]))(x)
    if gamma:
        x = AdjustContrast(power, retain_stats=True)(x)
    return np.asarray(x[0], np.float32)

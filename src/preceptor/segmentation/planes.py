"""Volumes as pictures: three planes through a lesion, with the outlines of regions as paths over them.

Volumes are (X, Y, Z) in nibabel's canonical orientation: to the patient's right, front and head. Planes follow the
radiological convention: the patient's right is on the left of the picture, the head is up, and sagittal planes show the
face on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preceptor.data.types import VolumeFile
from preceptor.data.volumes import Reader

WINDOW = (1.0, 99.5)  # percentiles of the foreground that are black and white
DARK, LIT_SHARE, MARGIN = 48, 0.01, 2  # crop around the body: grey level, share of a plane, voxels
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
"""The axis that each plane cuts."""


@dataclass(frozen=True)
class Volume:
    """Voxels (X, Y, Z) in canonical orientation, their affine, and their size in mm."""

    voxels: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        x, y, z = np.sqrt(np.square(self.affine[:3, :3]).sum(0)).tolist()
        return x, y, z

    def fits(self, other: Volume) -> bool:
        """Return whether both have the same grid."""
        same = self.voxels.shape == other.voxels.shape
        return same and bool(np.allclose(self.affine, other.affine, atol=1e-2))


Box = tuple[slice, slice, slice]


def read_volume(path: Path, channel: int | None = None, *, max_voxels: int) -> Volume:
    """Read a NIfTI file, one channel of a 4-D one, or the folder of a DICOM series.

    Raises:
        VolumeError: see `preceptor.data.volumes.Reader`. The size is checked before the voxels are decoded.
    """
    voxels, grid = Reader(max_voxels).volume(VolumeFile(path, channel))
    return Volume(voxels.transpose(2, 1, 0).astype(np.float32), grid.canonical_affine)


def apply_window(volume: np.ndarray) -> np.ndarray:
    """Return intensities as uint8, black and white at percentiles of the foreground."""
    foreground = volume[volume != volume.min()]
    if foreground.size == 0:
        return np.zeros(volume.shape, np.uint8)
    low, high = np.percentile(foreground, WINDOW)
    scaled = (volume - low) / max(float(high - low), 1e-6)
    return np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def content_box(grey: np.ndarray, mask: np.ndarray) -> Box:
    """Return the box that holds the mask and the body (planes with enough bright voxels), with a margin."""
    lit, box = grey > DARK, []
    for axis, side in enumerate(grey.shape):
        others = tuple(other for other in range(3) if other != axis)
        (at,) = np.nonzero((lit.mean(axis=others) > LIT_SHARE) | mask.any(axis=others))
        low, high = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, side)
        box.append(slice(max(0, low - MARGIN), min(side, high + MARGIN)))
    return box[0], box[1], box[2]


def central_voxel(mask: np.ndarray) -> tuple[int, int, int]:
    """Return the voxel of the mask nearest to its centre of mass, or the middle of the volume without a mask."""
    at = np.argwhere(mask)
    if len(at) == 0:
        x, y, z = (side // 2 for side in mask.shape)
        return x, y, z
    x, y, z = at[np.square(at - at.mean(0)).sum(1).argmin()].tolist()
    return x, y, z


def slice_plane(volume: np.ndarray, plane: str, at: tuple[int, int, int], box: Box) -> np.ndarray:
    """Return a plane (rows, columns) through the voxel `at`, inside the box, in radiological orientation."""
    axis = PLANES[plane]
    index = tuple(at[a] if a == axis else part for a, part in enumerate(box))
    return volume[index][::-1, ::-1].T


def outline(mask: np.ndarray, size: tuple[float, float]) -> str:
    """Return the outline of a 2-D mask as an SVG path, empty for an empty mask; `size` is a pixel's (width, height)."""
    from contourpy import contour_generator

    if not mask.any():
        return ""
    framed = np.pad(mask, 1).astype(np.float32)
    parts = []
    for points in contour_generator(z=framed).lines(0.5):
        corners = _corners((points - 0.5) * size)  # type: ignore[operator]
        steps = " ".join(f"{x:.1f} {y:.1f}" for x, y in corners.tolist())
        parts.append(f"M{steps}Z")
    return "".join(parts)


def _corners(points: np.ndarray) -> np.ndarray:
    """Return a closed line's corners: without the last point, which repeats the first, and points on straight parts."""
    points = points[:-1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    bent = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-6
    return points[bent] if bent.sum() > 2 else points


def pixel_size(plane: str, spacing: tuple[float, float, float]) -> tuple[float, float]:
    """Return the (width, height) in mm of a plane's pixel."""
    across, down = (side for axis, side in enumerate(spacing) if axis != PLANES[plane])
    return across, down


def region_masks(labels: np.ndarray, regions: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return a mask per region of a label map."""
    whole = np.round(labels).astype(np.int64)
    return {region: np.isin(whole, list(values)) for region, values in regions.items()}

"""Load the volumes of a case in one orientation, and write results on the grid of the source files.

Every array is (D, H, W): D from feet to head, H from back to front, W from left to right of the patient. Thus
`volume[z]` is an axial slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data import nifti
from preceptor.data.dicom_series import read_series
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import Geometry, VolumeError
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.errors import UserError
from preceptor.files import sha256

TOLERANCE = 1e-3
"""Largest difference between the elements of two affines that count as the same grid, in mm."""


class Reader:
    """Reads the volumes of one case: NIfTI files, and folders of a DICOM series. A 4-D file is decoded only once."""

    def __init__(self, max_voxels: int = MAX_VOXELS) -> None:
        self.max_voxels = max_voxels
        self._four_d: dict[Path, tuple[Any, np.ndarray]] = {}

    def volume(self, file: VolumeFile) -> tuple[np.ndarray, Geometry]:
        """Return the volume (D, H, W) in the number type of the file (float if the file has a scale) and its geometry.

        Raises:
            VolumeError: see `nifti.read_file`, `nifti.volume_shape`, `nifti.geometry` and `read_series`; also if the
                file has NaN or infinite voxels.
        """
        if file.path.is_dir():
            voxels, grid = read_series(file.path, max_voxels=self.max_voxels)
            return grid.canonical(voxels), grid
        header, voxels = self._four_d.get(file.path) or nifti.read_file(file.path, max_voxels=self.max_voxels)
        if file.channel is not None:
            self._four_d[file.path] = header, voxels
        shape = nifti.volume_shape(file.path, voxels.shape, file.channel)
        grid = nifti.geometry(file.path, header, shape)
        voxels = voxels.reshape((*shape, -1), order="F")[..., file.channel or 0]
        invalid = 0 if voxels.dtype.kind in "iu" else int(np.size(voxels) - np.isfinite(voxels).sum())
        if invalid:
            which = "" if file.channel is None else f", channel {file.channel}"
            raise VolumeError(
                f"{file.path}{which}: {invalid} voxels are NaN or infinite; set them to the value of the background"
            )
        return grid.canonical(voxels), grid


@dataclass(frozen=True)
class LoadedVolume:
    """The volumes of a case.

    Attributes:
        id: Identifier of the case.
        images: Float32 image (D, H, W) of each available modality.
        label: Label map (D, H, W) uint8, or None.
        shape: Shape (D, H, W) of all volumes.
        spacing: Voxel size in mm along D, H, W.
        geometry: Grid of the source files. It does not change if the volumes are resampled.
        remarks: Sentences on doubtful headers of the files.
        grids: Grid of the file of each modality. They differ from `geometry` in the order of the stored voxels only.
    """

    id: str
    images: dict[str, np.ndarray]
    label: np.ndarray | None
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    geometry: Geometry
    remarks: tuple[str, ...] = ()
    grids: Mapping[str, Geometry] = field(default_factory=dict)


def load_case(case: Case, data: SegmentationDataset | None = None, *, max_voxels: int = MAX_VOXELS) -> LoadedVolume:
    """Load the volumes of a case. If `data` is given, only the label values of its regions may occur.

    Raises:
        VolumeError: a file is missing, unreadable, too large or not three-dimensional; has NaN voxels or a single
            value; is on a different grid than the other files; or a label map has fractions or labels of no region.
    """
    reader = Reader(max_voxels)
    images: dict[str, np.ndarray] = {}
    grids: dict[str, Geometry] = {}
    first: tuple[VolumeFile, Geometry] | None = None
    remarks: list[str] = []
    for modality, file in case.images.items():
        volume, grid = reader.volume(file)
        first = first or (file, grid)
        require_same_grid(*first, file, grid)
        images[modality], grids[modality] = intensities(volume, file), grid
        remarks += [f"{file.path.name}: {remark}" for remark in grid.remarks]
    if first is None:
        raise VolumeError(f"case {case.id} has no image; give at least one modality")
    label = None
    if case.mask is not None:
        volume, grid = reader.volume(case.mask)
        require_same_grid(*first, case.mask, grid)
        label = label_map(volume, case.mask, data.regions if data else None)
    shape, spacing = first[1].canonical_shape, first[1].spacing
    return LoadedVolume(case.id, images, label, shape, spacing, first[1], tuple(remarks), grids)


def load_label(
    file: VolumeFile, regions: Mapping[str, Sequence[int]] | None = None, *, max_voxels: int = MAX_VOXELS
) -> tuple[np.ndarray, Geometry]:
    """Return (label map (D, H, W) uint8, geometry) of a file. `regions` are the labels that may occur.

    Raises:
        VolumeError: the file is missing, unreadable or too large, or holds fractions or labels of no region.
    """
    volume, geometry = Reader(max_voxels).volume(file)
    return label_map(volume, file, regions), geometry


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of the files of a DICOM series in a folder, whatever their names.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return sha256(path)
    files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    return hashlib.sha256(" ".join(sorted(map(sha256, files))).encode()).hexdigest()


def intensities(volume: np.ndarray, file: VolumeFile) -> np.ndarray:
    """Return a volume as float32. Raises VolumeError if all voxels have the same value, also after rounding."""
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise VolumeError(
            f"{file.path}: every voxel is {low:g}; if the modality was not acquired, leave the file out: a missing "
            "modality does not need a file"
        )
    if max(abs(low), abs(high)) > np.finfo(np.float32).max or np.float32(low) == np.float32(high):
        raise VolumeError(f"{file.path}: voxels from {low:.9g} to {high:.9g} do not fit float32; rescale the file")
    return np.ascontiguousarray(volume, np.float32)


def label_map(volume: np.ndarray, file: VolumeFile, regions: Mapping[str, Sequence[int]] | None = None) -> np.ndarray:
    """Return a label map (D, H, W) as uint8. Raises VolumeError for fractions and for labels of no region."""
    values = labels_in(volume)
    wrong = [value for value in values if not is_label(value)]
    if wrong:
        raise VolumeError(
            f"{file.path}: {wrong[0]:.15g} is not a label; labels are integers from 0 to 255 (resample label maps "
            "with nearest neighbours)"
        )
    values = [round(value) for value in values]
    known = {0} | {value for values in (regions or {}).values() for value in values}
    unknown = [value for value in values if value not in known]
    if regions is not None and unknown:
        raise VolumeError(
            f"{file.path}: label {', '.join(map(str, unknown))} is in no region; the regions "
            f"{ {name: list(values) for name, values in regions.items()} } have the labels {sorted(known - {0})}; "
            "add it to data.regions, or correct the label map"
        )
    return np.ascontiguousarray(volume if volume.dtype.kind in "iu" else np.rint(volume), np.uint8)


def is_label(value: float) -> bool:
    """Return whether a voxel is an integer from 0 to 255, to the rounding error of a scaled float32."""
    tolerance = 16 * float(np.finfo(np.float32).eps) * max(1.0, abs(value))
    return abs(value - round(value)) <= tolerance and 0 <= round(value) < 256


def labels_in(volume: np.ndarray) -> list[float]:
    """Return the distinct values of a label map, at most 1000."""
    if volume.dtype == np.uint8:
        return [float(value) for value in np.flatnonzero(np.bincount(volume.reshape(-1), minlength=256))]
    return [float(value) for value in np.unique(volume)[:1000]]


def require_same_grid(file: VolumeFile, grid: Geometry, other: VolumeFile, other_grid: Geometry) -> None:
    """Raise VolumeError if two files are on different grids. The order in which they store voxels does not matter."""
    if grid.canonical_shape != other_grid.canonical_shape:
        shape, other_shape = (" x ".join(map(str, g.shape)) for g in (grid, other_grid))
        raise VolumeError(
            f"{other.path} has {other_shape} voxels, {file.path.name} has {shape}; resample them to one grid"
        )
    gap = float(np.abs(grid.canonical_affine - other_grid.canonical_affine).max())
    if gap > TOLERANCE:
        raise VolumeError(
            f"{other.path}: its grid is not that of {file.path.name} (the affines differ by up to "
            f"{gap:.3g} mm); register the images, or correct the wrong header"
        )


def resampled(loaded: LoadedVolume, spacing: Sequence[float], *, max_voxels: int = MAX_VOXELS) -> LoadedVolume:
    """Resample the volumes to another voxel size (mm along D, H, W): images linearly, labels by nearest neighbour.

    For larger voxels the images are smoothed first by a Gaussian with a sigma of half the size ratio minus 1/2.

    Raises:
        VolumeError: the resampled volume would have more than `max_voxels` voxels.
    """
    from scipy.ndimage import gaussian_filter

    if len(spacing) != 3 or not all(0 < side < np.inf for side in spacing):
        raise UserError(f"spacing {list(spacing)} is not three sizes in mm; an example is [1, 1, 1]")
    factors = [new / old for new, old in zip(spacing, loaded.spacing, strict=True)]
    d, h, w = (max(2, round(side / factor)) for side, factor in zip(loaded.shape, factors, strict=True))
    if d * h * w > max_voxels:
        before, after = (" x ".join(f"{side:.4g}" for side in sides) for sides in (loaded.spacing, spacing))
        raise VolumeError(
            f"case {loaded.id}: resampled from voxels of {before} mm to {after} mm (data.spacing), the volume would "
            f"have {d} x {h} x {w} = {d * h * w} voxels, more than the limit of {max_voxels}; correct the voxel size "
            "in the header, crop the files, or train with a larger data.spacing or data.max_voxels"
        )
    sigma = [max(0.0, (factor - 1) / 2) for factor in factors]
    smooth = {name: gaussian_filter(image, sigma, mode="nearest") for name, image in loaded.images.items()}
    return replace(
        loaded,
        images={name: resize(image, (d, h, w)) for name, image in smooth.items()},
        label=None if loaded.label is None else resize(loaded.label, (d, h, w)),
        shape=(d, h, w),
        spacing=(spacing[0], spacing[1], spacing[2]),
    )


def resize(volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample a volume (..., d, h, w) to another shape: floats linearly, integers by nearest neighbour."""
    import torch
    from torch.nn.functional import interpolate

    if volume.shape[-3:] == shape:
        return volume
    lead = volume.shape[:-3]
    flat = torch.from_numpy(np.ascontiguousarray(volume)).reshape(1, -1, *volume.shape[-3:])
    if volume.dtype.kind == "f":
        out = interpolate(flat, shape, mode="trilinear", align_corners=False)
    else:
        out = interpolate(flat.float(), shape, mode="nearest-exact").to(flat.dtype)
    return out.reshape(*lead, *shape).numpy()


def to_regions(label: np.ndarray, regions: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return the masks (R, D, H, W) bool of the regions of a label map (D, H, W) with integers from 0 to 255."""
    table = np.zeros((len(regions), 256), bool)
    for row, values in zip(table, regions.values(), strict=True):
        row[list(values)] = True
    return table[:, label.astype(np.uint8)]


def to_labels(masks: np.ndarray, regions: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return the label map (D, H, W) uint8 of region masks (R, D, H, W) bool. The masks may be inconsistent.

    Regions are written from the widest to the narrowest. Each is written as the label that no narrower region contains
    (BraTS: wt 2, tc 1, et 4). Finally, every voxel whose regions are exactly those of one label gets that label. The
    result is the inverse of `to_regions` for labels that the regions distinguish; of labels that they do not
    distinguish, the smallest is written.
    """
    names = list(regions)
    values = [set(regions[name]) for name in names]
    label = np.zeros(masks.shape[1:], np.uint8)
    for row in sorted(range(len(names)), key=lambda row: -len(values[row])):
        narrower = set().union(*(other for other in values if len(other) < len(values[row])))
        label[masks[row].astype(bool)] = min(values[row] - narrower or values[row])
    for value in sorted(set().union(*values), reverse=True):
        fits = np.ones(label.shape, bool)
        for row in range(len(names)):
            fits &= masks[row].astype(bool) == (value in values[row])
        label[fits] = value
    return label


def save_mask(path: Path, label: np.ndarray, loaded: LoadedVolume) -> None:
    """Write a label map (D, H, W) as uint8 on the grid and in the orientation of the source file.

    A label map of a resampled volume is resampled to the grid of the source file by nearest neighbour.

    Raises:
        UserError: the name of the file does not end in .nii or .nii.gz.
    """
    assert 0 <= label.min() <= label.max() < 256, "labels are 0 to 255"
    nifti.write(path, on_source_grid(label.astype(np.uint8), loaded), loaded.geometry)


def save_probabilities(path: Path, probabilities: np.ndarray, loaded: LoadedVolume) -> None:
    """Write probabilities (R, D, H, W) as one float32 file (X, Y, Z, R) on the grid of the source file."""
    restored = on_source_grid(probabilities.astype(np.float32), loaded)
    nifti.write(path, np.moveaxis(restored, 0, -1), loaded.geometry)


def on_source_grid(volume: np.ndarray, loaded: LoadedVolume) -> np.ndarray:
    """Return a volume (..., D, H, W) from the grid of the network on the grid of the source file.

    Integers are resampled by nearest neighbour, floats linearly. Nothing changes if the case was not resampled.
    """
    shape = loaded.geometry.canonical_shape
    assert volume.shape[-3:] in (shape, loaded.shape), f"{volume.shape} is not on the grid of {loaded.id}"
    return resize(volume, shape)

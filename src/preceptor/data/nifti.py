"""Read and write NIfTI files. The header is checked before any voxel is decoded.

Only the geometry of a header is used. Descriptions, intent names and extensions may identify a patient and are never
copied.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.types import VolumeFile
from preceptor.errors import UserError
from preceptor.files import write_bytes

MAX_VOXELS = 512**3
_MAX_OFFSET = 64 * 2**20  # bytes of header extensions
_MAX_MM = 1e5  # limit for the elements of an affine
_COPY_AGAIN = "copy the file again from its source"


class VolumeError(UserError):
    """A volume that cannot be used. The message names the file, the reason and the fix."""


@dataclass(frozen=True)
class Geometry:
    """Voxel grid of a file: shape (X, Y, Z), `affine` (4, 4) in mm, and the codes of the two header transforms."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    sform_code: int
    qform_code: int
    units: str

    @property
    def orientation(self) -> np.ndarray:
        """Orientation (3, 2) of the axes of the file relative to right, anterior, superior, as defined by nibabel."""
        import nibabel

        return nibabel.orientations.io_orientation(self.affine)

    def canonical(self, volume: np.ndarray) -> np.ndarray:
        """Return a volume (X, Y, Z) in the canonical order (D, H, W): feet to head, back to front, left to right."""
        import nibabel

        return nibabel.orientations.apply_orientation(volume, self.orientation).transpose(2, 1, 0)

    def source(self, volume: np.ndarray) -> np.ndarray:
        """Return a volume (D, H, W, ...) in the voxel order of the file, (X, Y, Z, ...)."""
        import nibabel

        straight = volume.transpose(2, 1, 0, *range(3, volume.ndim))
        back = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), self.orientation)
        return nibabel.orientations.apply_orientation(straight, back)

    @property
    def canonical_affine(self) -> np.ndarray:
        """Affine of the voxels after reorientation to right, anterior, superior, in the order (X, Y, Z)."""
        import nibabel

        return self.affine @ nibabel.orientations.inv_ornt_aff(self.orientation, self.shape)

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Shape (D, H, W) after reorientation."""
        sizes = {int(axis): size for (axis, _), size in zip(self.orientation, self.shape, strict=True)}
        return sizes[2], sizes[1], sizes[0]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along (D, H, W)."""
        x, y, z = np.sqrt(np.square(self.canonical_affine[:3, :3]).sum(0))
        return float(z), float(y), float(x)


def read_header(path: Path, *, max_voxels: int = MAX_VOXELS) -> Any:
    """Return the nibabel image of a file without decoding its voxels.

    Raises:
        VolumeError: the file is missing, is not a NIfTI file, has more than `max_voxels` voxels, or contains colours or
            complex numbers.
    """
    import nibabel

    if not path.is_file():
        raise VolumeError(f"{path} does not exist; check the path")
    try:
        image: Any = nibabel.load(path)
        shape, dtype = image.shape, image.get_data_dtype()
    except Exception as error:  # nibabel raises its own errors and those of gzip and numpy
        raise VolumeError(f"{path}: not a readable NIfTI file ({_short(error)}); {_COPY_AGAIN}") from error
    if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is a subclass
        raise VolumeError(f"{path}: {type(image).__name__} instead of NIfTI; convert it to .nii.gz")
    voxels = int(np.prod([int(side) for side in shape], dtype=object))
    if voxels > max_voxels:
        sides = " x ".join(map(str, shape))
        raise VolumeError(
            f"{path}: {sides} = {voxels} voxels are more than the limit of {max_voxels}; crop or resample the file, "
            "or raise max_voxels"
        )
    if image.header.get_data_offset() > _MAX_OFFSET:
        raise VolumeError(f"{path}: the voxels start at byte {image.header.get_data_offset()}; {_COPY_AGAIN}")
    if dtype.kind not in "iuf":
        raise VolumeError(f"{path}: voxels of type {dtype} are not intensities; export the file as int16 or float32")
    return image


def geometry(path: Path, image: Any) -> Geometry:
    """Return the voxel grid of an image.

    Raises:
        VolumeError: the affine is not invertible.
    """
    affine = np.asarray(image.affine, np.float64)
    x, y, z = (int(side) for side in image.shape[:3])
    finite = np.isfinite(affine).all() and np.abs(affine).max() < _MAX_MM
    scale = np.prod(np.linalg.norm(affine[:3, :3], axis=0)) if finite else 0.0
    if scale == 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-4 * scale:
        raise VolumeError(
            f"{path}: its affine {affine[:3].tolist()} does not span space; correct the sform or qform of the header"
        )
    header = image.header
    try:
        units = header.get_xyzt_units()[0]
    except KeyError:  # an unknown code
        units = "unknown"
    return Geometry((x, y, z), affine, int(header["sform_code"]), int(header["qform_code"]), units)


def volume_shape(path: Path, shape: tuple[int, ...], channel: int | None) -> tuple[int, int, int]:
    """Return the shape (X, Y, Z) of a volume.

    Raises:
        VolumeError: the file is two-dimensional, is four-dimensional although no channel is given, or lacks the
            channel.
    """
    while len(shape) > 3 and shape[-1] == 1 and channel is None:
        shape = shape[:-1]
    sides = " x ".join(map(str, shape))
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise VolumeError(f"{path}: {sides} voxels are not a volume; give a 3-D file")
    if channel is None and len(shape) > 3:
        raise VolumeError(
            f"{path}: {sides} voxels are {len(shape)}-D, but a 3-D image is expected; split it into one file per image"
        )
    if channel is not None and (len(shape) != 4 or channel >= shape[3]):
        raise VolumeError(f"{path}: {sides} voxels have no channel {channel}; give a 4-D file with more channels")
    return shape[0], shape[1], shape[2]


class Reader:
    """Reads the volumes of one case. A four-dimensional file is decoded only once."""

    def __init__(self, max_voxels: int = MAX_VOXELS) -> None:
        self.max_voxels = max_voxels
        self._four_d: dict[Path, np.ndarray] = {}

    def geometry(self, file: VolumeFile) -> Geometry:
        image = read_header(file.path, max_voxels=self.max_voxels)
        volume_shape(file.path, image.shape, file.channel)
        return geometry(file.path, image)

    def volume(self, file: VolumeFile) -> tuple[np.ndarray, Geometry]:
        """Return the volume (D, H, W) in the number type of the file (float if the file has a scale) and its geometry.

        Raises:
            VolumeError: see `read_header` and `volume_shape`; also if the file is truncated or has NaN or infinite
                voxels.
        """
        image = read_header(file.path, max_voxels=self.max_voxels)
        shape = volume_shape(file.path, image.shape, file.channel)
        grid = geometry(file.path, image)
        voxels = self._four_d.get(file.path)
        if voxels is None:
            voxels = _decode(file.path, image)
            if file.channel is not None:
                self._four_d[file.path] = voxels
        voxels = voxels.reshape(shape) if file.channel is None else voxels[..., file.channel]
        invalid = 0 if voxels.dtype.kind in "iu" else int(np.size(voxels) - np.isfinite(voxels).sum())
        if invalid:
            which = "" if file.channel is None else f", channel {file.channel}"
            raise VolumeError(
                f"{file.path}{which}: {invalid} voxels are NaN or infinite; set them to the value of the background"
            )
        return grid.canonical(voxels), grid


def _decode(path: Path, image: Any) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):
            voxels = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, MemoryError) as error:
        raise VolumeError(f"{path}: truncated or broken file ({_short(error)}); {_COPY_AGAIN}") from error
    return voxels


def _short(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def write(path: Path, voxels: np.ndarray, grid: Geometry) -> None:
    """Write voxels (D, H, W) or (D, H, W, C) atomically, on the grid and in the orientation of a file.

    The header contains the geometry and nothing else of the source. The gzip header contains no time stamp.

    Raises:
        UserError: the name of the file does not end in .nii or .nii.gz.
    """
    import gzip

    import nibabel

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path} is not named as a NIfTI file; the name must end in .nii.gz or .nii")
    image = nibabel.Nifti1Image(np.ascontiguousarray(grid.source(voxels)), grid.affine)
    image.set_sform(grid.affine, grid.sform_code or (0 if grid.qform_code else 2))
    image.set_qform(grid.affine, grid.qform_code, strip_shears=True)
    if grid.units != "unknown":
        image.header.set_xyzt_units(grid.units)
    data = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_bytes(path, data)

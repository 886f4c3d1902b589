"""Read volumes from NIfTI files, and write them. The header is checked before any voxel is decoded.

Only the geometry of a header is used. Descriptions, intent names and extensions may identify a patient and are never
copied.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from preceptor.data.limits import MAX_VOXELS
from preceptor.errors import UserError
from preceptor.files import write_bytes

T = TypeVar("T")
_MAX_OFFSET = 64 * 2**20  # bytes of header extensions
_MAX_MM = 1e5  # limit for the elements of an affine
_MAX_VOXEL_MM, _SMALL_VOXEL_MM, _MIN_VOXEL_MM = 100, 0.01, 1e-5
_UNITS = {0: "unknown, taken for mm", 1: "metre", 2: "mm", 3: "micron"}
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Length in mm of each spatial unit of xyzt_units."""
_GZIP = b"\x1f\x8b"
_RESERVED_FLAGS = 0xE0  # refused by gzip, too; Python ignores them
_COPY_AGAIN = "copy the file again from its source"


class VolumeError(UserError):
    """A volume that cannot be used. The message names the file, the reason and the fix."""


@dataclass(frozen=True)
class Geometry:
    """Voxel grid of a file: shape (X, Y, Z), `affine` (4, 4) in mm, and the codes of the two header transforms.

    `remarks` are sentences on doubtful parts of the header.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    sform_code: int
    qform_code: int
    remarks: tuple[str, ...] = ()

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

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm3."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))


def read_file(path: Path, *, max_voxels: int = MAX_VOXELS) -> tuple[Any, np.ndarray]:
    """Return the header (nibabel) and the voxels of a file, in the order of the file and scaled by `scl_slope`.

    The header is checked against the NIfTI standard before any voxel is decoded. The file is read to its end, so that
    the checksums of .nii.gz are verified and its length is that of the header.

    Raises:
        VolumeError: the file is missing, is not a NIfTI file, is truncated, damaged or longer than its header says, has
            more than `max_voxels` voxels, contains colours or complex numbers, or its header contradicts itself.
    """
    return _with_stream(path, lambda stream: _read_stream(path, stream, max_voxels))


def read_header(path: Path, *, max_voxels: int = MAX_VOXELS) -> tuple[Any, tuple[int, ...]]:
    """Return the header (nibabel) and the shape of a file without reading its voxels.

    Raises:
        VolumeError: the header is missing, invalid or damaged. Damage behind the header is not found.
    """

    def read(stream: IO[bytes]) -> tuple[Any, tuple[int, ...]]:
        header = _read_header(path, stream)
        return header, _shape(path, header, max_voxels)

    return _with_stream(path, read)


def channels_of(path: Path) -> int:
    """Return the number of volumes that a file holds, by its header. Raises VolumeError as `read_header`."""
    return count_channels(read_header(path)[1])


def count_channels(shape: tuple[int, ...]) -> int:
    """Return the number of volumes in a file of this shape: (X, Y, Z, C), or (X, Y, Z, 1, C) as ITK writes it.

    The fourth dimension of NIfTI is time, and the fifth is for the elements of a vector.
    """
    return prod(shape[3:])


def remarks_of(path: Path, channel: int | None = None) -> tuple[str, ...]:
    """Return the remarks on the geometry of a file, by its header. Raises VolumeError as `read_header`, `geometry`."""
    header, shape = read_header(path)
    return geometry(path, header, volume_shape(path, shape, channel)).remarks


def _with_stream(path: Path, read: Callable[[IO[bytes]], T]) -> T:
    """Return `read` of the uncompressed content of a file. Raises VolumeError if the file is not what its name says."""
    if not path.is_file():
        raise VolumeError(f"{path} does not exist; check the path")
    compressed = path.name.lower().endswith(".gz")
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start[:2] == _GZIP and not compressed:
                raise VolumeError(f"{path}: compressed with gzip, but named .nii; rename it to .nii.gz")
            if compressed and _is_header(start):
                raise VolumeError(f"{path}: not compressed with gzip, but named .nii.gz; rename it to .nii")
            if compressed and start[:2] != _GZIP:
                reason = "not compressed with gzip" if start else "the file is empty"
                raise VolumeError(f"{path}: not a readable NIfTI file ({reason}); {_COPY_AGAIN}")
            if compressed and len(start) == 4 and start[3] & _RESERVED_FLAGS:
                raise VolumeError(f"{path}: truncated or broken file (unknown gzip flags); {_COPY_AGAIN}")
            file.seek(0)
            stream: IO[bytes] = gzip.GzipFile(fileobj=file) if compressed else file  # type: ignore[assignment]
            return read(stream)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise VolumeError(f"{path}: truncated or broken file ({_short(error)}); {_COPY_AGAIN}") from error


def _is_header(start: bytes) -> bool:
    return len(start) == 4 and {struct.unpack("<i", start)[0], struct.unpack(">i", start)[0]} & {348, 540} != set()


def _read_stream(path: Path, stream: IO[bytes], max_voxels: int) -> tuple[Any, np.ndarray]:
    from nibabel.volumeutils import apply_read_scaling

    header = _read_header(path, stream)
    shape = _shape(path, header, max_voxels)
    dtype = _voxel_type(path, header)
    block = header.template_dtype.itemsize
    offset = float(header["vox_offset"]) or block + 4.0
    if not block + 4 <= offset <= _MAX_OFFSET or offset != int(offset):
        raise VolumeError(f"{path}: vox_offset {offset:g} is not a place after the header; {_COPY_AGAIN}")
    slope, inter = _scaling(path, header)
    if len(stream.read(int(offset) - block)) < int(offset) - block:
        raise VolumeError(f"{path}: truncated or broken file (it ends before the voxels); {_COPY_AGAIN}")
    size = prod(shape) * dtype.itemsize
    data = np.empty(size, np.uint8)
    position = 0
    while position < size:
        number = stream.readinto(data.data[position:])  # type: ignore[attr-defined]
        if not number:
            reason = f"{position:,} of {size:,} bytes of voxels"
            raise VolumeError(f"{path}: truncated or broken file ({reason}); {_COPY_AGAIN}")
        position += number
    if stream.read(1):  # for .nii.gz this also verifies the checksum
        sides = " x ".join(map(str, shape))
        raise VolumeError(
            f"{path}: the file is longer than the {size:,} bytes of {sides} {dtype.name} voxels that its header gives; "
            "correct dim and datatype, or copy the file again from its source"
        )
    voxels = data.view(dtype).reshape(shape, order="F")
    with np.errstate(all="ignore"):
        return header, voxels if (slope, inter) == (1, 0) else apply_read_scaling(voxels, slope, inter)


def _read_header(path: Path, stream: IO[bytes]) -> Any:
    """Return the header as a nibabel object, without the corrections that nibabel makes silently."""
    from nibabel import Nifti1Header, Nifti2Header

    try:
        block = stream.read(348)
    except (OSError, EOFError, zlib.error) as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({_short(error)}); {_COPY_AGAIN}") from error
    if len(block) < 348:
        reason = "the file is empty" if not block else f"the header ends after {len(block)} of 348 bytes"
        raise VolumeError(f"{path}: not a readable NIfTI file ({reason}); {_COPY_AGAIN}")
    for endianness in "<>":
        (size,) = struct.unpack(f"{endianness}i", block[:4])
        if size == 540 and block[4:7] in (b"n+2", b"ni2"):
            block += stream.read(540 - 348)
            magic = block[4:7]
        elif size == 348 and block[344:348] in (b"n+1\0", b"ni1\0"):
            magic = block[344:347]
        elif size in (348, 540):
            raise VolumeError(
                f"{path}: not a readable NIfTI file (no NIfTI magic: Analyze 7.5 or damaged); convert it to .nii.gz"
            )
        else:
            continue
        if magic.startswith(b"ni"):
            raise VolumeError(
                f"{path}: the header of a pair of files (.hdr and .img), which is not read; convert it to one .nii.gz"
            )
        if len(block) == size:
            return (Nifti1Header if size == 348 else Nifti2Header)(block, endianness, check=False)
    raise VolumeError(f"{path}: not a readable NIfTI file (its first bytes are not those of NIfTI); {_COPY_AGAIN}")


def _shape(path: Path, header: Any, max_voxels: int) -> tuple[int, ...]:
    dimensions = [int(side) for side in header["dim"]]
    number = dimensions[0]
    if not 1 <= number <= 7 or min(dimensions[1 : number + 1]) < 1:
        raise VolumeError(f"{path}: dim {dimensions} is not a shape; {_COPY_AGAIN}")
    shape = tuple(dimensions[1 : number + 1])
    if prod(shape) > max_voxels:
        sides = " x ".join(map(str, shape))
        raise VolumeError(
            f"{path}: {sides} = {prod(shape)} voxels are more than the limit of {max_voxels}; crop or resample the "
            "file, or raise data.max_voxels in the recipe (of a trained model: preparation.max_voxels in its "
            "segmentation.json)"
        )
    return shape


def _voxel_type(path: Path, header: Any) -> np.dtype[Any]:
    """Return the number type of the voxels. Raises VolumeError for colours, complex numbers and unknown codes."""
    from nibabel.nifti1 import data_type_codes
    from nibabel.spatialimages import HeaderDataError

    code = int(header["datatype"])
    try:
        name, dtype = data_type_codes.label[code], header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        reason = f"datatype code {code} is not supported"
        raise VolumeError(f"{path}: {reason}; export the file as int16 or float32") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise VolumeError(f"{path}: voxels of type {name} are not intensities; export the file as int16 or float32")
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        reason = f"datatype {name} has {8 * dtype.itemsize} bits, but bitpix is {int(header['bitpix'])}"
        raise VolumeError(f"{path}: {reason}; {_COPY_AGAIN}")
    return dtype


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    """Return slope and intercept. By the standard, a slope of 0 means none. nibabel writes NaN instead."""
    if "scl_slope" not in header.template_dtype.names:
        return 1.0, 0.0
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or (np.isnan(slope) and (np.isnan(inter) or inter == 0)):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise VolumeError(f"{path}: scl_slope {slope:g} and scl_inter {inter:g} are not a scale; correct the header")
    return slope, inter


def geometry(path: Path, header: Any, shape: tuple[int, int, int]) -> Geometry:
    """Return the voxel grid of a file in mm.

    By the standard, the sform is used if its code is above 0, then the qform, then `pixdim` alone. Unknown units are
    taken for mm.

    Raises:
        VolumeError: the affine is not invertible, the units are not those of a length, or the voxel sizes of the sform
            and of `pixdim` differ by more than 1 %, or are not between 10 nm and 10 cm.
    """
    code = int(header["xyzt_units"]) & 7
    if code not in _MM:
        raise VolumeError(f"{path}: xyzt_units has the unknown code {code}; correct the header (2 is mm)")
    raw, remarks = _affine(path, header)
    affine = np.diag([_MM[code]] * 3 + [1.0]) @ raw
    finite = np.isfinite(affine).all() and np.abs(affine).max() < _MAX_MM
    scale = np.prod(np.linalg.norm(affine[:3, :3], axis=0)) if finite else 0.0
    if scale == 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-4 * scale:
        raise VolumeError(
            f"{path}: its affine {affine[:3].tolist()} does not span space; correct the sform or qform of the header"
        )
    sizes = np.array(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise VolumeError(f"{path}: pixdim {_sizes(sizes)} are not voxel sizes; correct the header")
    zooms = np.linalg.norm(raw[:3, :3], axis=0)
    if (np.abs(zooms - sizes) > 0.01 * sizes).any():
        raise VolumeError(
            f"{path}: the sform has voxels of {_sizes(zooms)}, but pixdim says {_sizes(sizes)}; correct the wrong one "
            "in the header"
        )
    size = zooms * _MM[code]
    if size.max() > _MAX_VOXEL_MM or size.min() < _MIN_VOXEL_MM:
        kind = "large" if size.max() > _MAX_VOXEL_MM else "small"
        raise VolumeError(
            f"{path}: voxels of {_sizes(size)} mm are too {kind}; correct pixdim, or xyzt_units (its code is {code}: "
            f"{_UNITS[code]})"
        )
    if size.min() < _SMALL_VOXEL_MM:
        remarks.append(f"voxels of {_sizes(size)} mm are very small; check pixdim and xyzt_units ({_UNITS[code]})")
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    skew = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if skew > 0.01:
        remarks.append(
            f"its axes are not perpendicular (up to {90 - np.degrees(np.arccos(min(skew, 1))):.1f} degrees off), but "
            "the network treats them as if; resample the image"
        )
    codes = [int(header[name]) for name in ("sform_code", "qform_code")]
    sform, qform = (code if code <= 5 else 2 for code in np.maximum(codes, 0).tolist())  # 2: aligned to another image
    return Geometry(shape, affine, sform, qform, tuple(remarks))


def _affine(path: Path, header: Any) -> tuple[np.ndarray, list[str]]:
    """Return the affine in the units of the header, and remarks on it."""
    from nibabel.spatialimages import HeaderDataError

    header = header.copy()
    if header["pixdim"][0] == 0:  # by the standard, 0 is 1
        header["pixdim"][0] = 1
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not sform and not qform:
        return np.asarray(header.get_base_affine(), np.float64), [
            "the header has neither sform nor qform, so that left and right are not defined; the first axis is taken "
            "to run from right to left"
        ]
    try:
        rotation = np.asarray(header.get_qform(), np.float64) if qform else None
    except (HeaderDataError, ValueError) as error:
        if not sform:
            raise VolumeError(f"{path}: invalid qform ({_short(error)}); correct the header") from error
        return np.asarray(header.get_sform(), np.float64), ["the qform is invalid; the sform is used"]
    if not sform:
        assert rotation is not None
        return rotation, []
    affine = np.asarray(header.get_sform(), np.float64)
    if rotation is None or not np.isfinite(affine).all():
        return affine, []
    ends = np.array([[*corner, 1] for corner in product(*[(0, int(side) - 1) for side in header["dim"][1:4]])]).T
    gap = float(np.abs((affine - rotation) @ ends)[:3].max())
    remarks = []
    if not gap <= np.linalg.norm(affine[:3, :3], axis=0).max():
        remarks.append(
            f"qform and sform place voxels up to {gap:.3g} units apart; the sform is used, as the standard says"
        )
    return affine, remarks


def _sizes(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def volume_shape(path: Path, shape: tuple[int, ...], channel: int | None) -> tuple[int, int, int]:
    """Return the shape (X, Y, Z) of a volume.

    Raises:
        VolumeError: the file is two-dimensional, has several channels although none is given, lacks the channel, or
            has several points in time with several channels each.
    """
    sides = " x ".join(map(str, shape))
    axes = [size for size in shape[3:] if size > 1]
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise VolumeError(f"{path}: {sides} voxels are not a volume; give a 3-D file")
    if len(axes) > (0 if channel is None else 1):
        raise VolumeError(
            f"{path}: {sides} voxels are not a volume: {len(shape)}-D, but a 3-D image is expected; split it into one "
            "file per image"
        )
    if channel is not None and (len(shape) == 3 or channel >= count_channels(shape)):
        raise VolumeError(f"{path}: {sides} voxels have no channel {channel}; give a 4-D file with more channels")
    return shape[0], shape[1], shape[2]


def _short(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def write(path: Path, voxels: np.ndarray, grid: Geometry) -> None:
    """Write voxels (D, H, W) or (D, H, W, C) atomically, on the grid and in the orientation of a file, in mm.

    The header contains the geometry and nothing else of the source. The gzip header contains no time stamp.

    Raises:
        UserError: the name of the file does not end in .nii or .nii.gz.
    """
    import nibabel

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path} is not named as a NIfTI file; the name must end in .nii.gz or .nii")
    image = nibabel.Nifti1Image(np.ascontiguousarray(grid.source(voxels)), grid.affine)
    image.set_sform(grid.affine, grid.sform_code or (0 if grid.qform_code else 2))
    image.set_qform(grid.affine, grid.qform_code, strip_shears=True)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_bytes(path, data)

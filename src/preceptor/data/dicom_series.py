"""Read a folder with one DICOM series as a volume: a file for each slice, or enhanced images of several frames.

Slices are placed by Image Position (Patient) and Image Orientation (Patient) as DICOM PS3.3 C.7.6.2 defines. Whatever
does not form a regular grid is refused. Only geometry and pixels are parsed: names, dates and free texts are not. The
identifier of the patient is read only to compare it (`patient_key`).
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preceptor.data.dicom import decode_grey, modality_table
from preceptor.data.dicom_header import DEFLATED, IMAGE_FIELDS, VALUE_FIELDS, is_dicom, silent_pydicom
from preceptor.data.image_structure import STOPS, Refused
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import Geometry, VolumeError
from preceptor.data.texts import is_given

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_FILES = 4096
MAX_FILE_BYTES = 300 * 2**20
"""Largest file. 512 x 512 x 512 voxels of 16 bits in a file of several frames have 256 MiB."""
SUFFIXES = (".dcm", ".dicom", ".ima")
OTHER_ENDINGS = (
    *(".nii", ".gz", ".txt", ".json", ".xml", ".csv", ".tsv", ".md", ".ini", ".db", ".html", ".pdf", ".png", ".jpg"),
    "dicomdir",
)
"""Endings of the names, in lower case, of files in the folder of a series that are ignored."""
_NO_IMAGES = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "RTIMAGE", "PR", "KO", "SR", "REG")
_CONSTANT = ("Modality", "Units", "RescaleType", "EchoTime", "ComplexImageComponent")
"""Fields that say what the values mean, and are therefore equal in all slices of a volume."""
_COUNTS = ("InstanceNumber", "ImagesInAcquisition", "NumberOfSlices", "NumberOfTemporalPositions")
_HEADER_FIELDS = [
    *_CONSTANT,
    *_COUNTS,
    *IMAGE_FIELDS,
    "SOPClassUID",
    "SeriesInstanceUID",
    "ImageType",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "GantryDetectorTilt",
]
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_FRAME_FIELDS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}
"""Fields of a frame in an enhanced image, by functional group (PS3.3 C.7.6.16.2)."""
_HEADER_FIELDS += _GROUPS
_PIXEL_FIELDS = [*_HEADER_FIELDS, *VALUE_FIELDS]
_NO_PATIENT = ("anon", "anonymous", "anonymised", "anonymized", "unknown", "none", "0")
_SALT = os.urandom(16)
_COPY_AGAIN = "copy the series again from its source"
_ONE_VOLUME = "move each volume to its own folder"


@dataclass(frozen=True)
class _Slice:
    path: Path
    frame: int  # number in the file, from 0
    series: str
    rows: int
    columns: int
    spacing: tuple[float, float]  # between rows, between columns
    position: np.ndarray  # of the centre of the first pixel, in mm, x to the left, y to the back, z to the head
    along_row: np.ndarray
    along_column: np.ndarray
    constants: tuple[str, ...]  # of the fields _CONSTANT
    counts: tuple[int | None, ...]  # of the fields _COUNTS


def holds_series(folder: Path) -> bool:
    """Return whether a folder contains a DICOM file, by the names or the first bytes of its files."""
    if not folder.is_dir():
        return False
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    if any(path.suffix.lower() in SUFFIXES for path in files):
        return True
    unknown = [path for path in files if not is_other(path.name)]
    return any(_is_dicom(path) for path in unknown[:MAX_FILES])


def is_other(name: str) -> bool:
    """Return whether a file in the folder of a series is not a slice by its name."""
    return name.lower().endswith(OTHER_ENDINGS)


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def read_series(folder: Path, *, max_voxels: int = MAX_VOXELS) -> tuple[np.ndarray, Geometry]:
    """Return the volume (X, Y, Z) of the DICOM series in a folder, and its grid in RAS mm as of NIfTI.

    X runs along the columns, Y along the rows, Z from slice to slice along the slice normal. The distance of slices is
    that of their positions. The modality transformation of each slice is applied (rescale slope and intercept, or the
    modality LUT). Padding pixels get the smallest value of the other pixels. The result is int32 if all values are
    integers, else float32.

    Args:
        folder: The folder. Subfolders are not read.
        max_voxels: Largest number of voxels; checked before any pixel is decoded.

    Raises:
        VolumeError: the folder contains no series or several, or slices that are broken, missing, doubled, unequally
            spaced, tilted, of different sizes or orientations, in several stacks, in colour, or in an unknown coding.
    """
    files, ignored = _files(folder)
    with silent_pydicom():
        slices = [one for path in files for one in _read_headers(path)]
    slices = _sorted(folder, slices)
    first = slices[0]
    shape = (first.columns, first.rows, len(slices))
    voxels = first.columns * first.rows * len(slices)
    if voxels > max_voxels:
        sides = " x ".join(map(str, shape))
        raise VolumeError(
            f"{folder}: {sides} = {voxels} voxels are more than the limit of {max_voxels}; crop or resample the "
            "series, or raise data.max_voxels in the recipe (of a trained model: preparation.max_voxels in its "
            "segmentation.json)"
        )
    if min(shape) < 2:
        raise VolumeError(f"{folder}: {' x '.join(map(str, shape))} voxels are not a volume; give the whole series")
    affine = _affine(folder, slices)
    remarks = _missing_slices(folder, slices)
    volume: np.ndarray = np.empty(shape, np.float64)
    padding = np.zeros(shape, bool)
    numbers: dict[Path, list[int]] = {}  # of the slices in each file
    for number, one in enumerate(slices):
        numbers.setdefault(one.path, []).append(number)
    with silent_pydicom():
        for path in numbers:
            frames = _frames(path, _PIXEL_FIELDS, pixels=True)
            for number in numbers[path]:
                values, padded = _read_pixels(slices[number], frames[slices[number].frame])
                volume[..., number], padding[..., number] = values.T, padded.T
    if padding.all():
        raise VolumeError(f"{folder}: every pixel is padding; give another series")
    if padding.any():
        volume[padding] = volume[~padding].min()
        remarks.append(f"{int(padding.sum())} padding pixels got the smallest value of the others")
    if ignored:
        remarks.append(f"{len(ignored)} files that are not DICOM were ignored: {', '.join(sorted(ignored)[:20])}")
    integers = bool((volume == np.rint(volume)).all()) and np.abs(volume).max() < 2**31
    return volume.astype(np.int32 if integers else np.float32), Geometry(shape, affine, 1, 1, tuple(remarks))


def patient_key(folder: Path) -> str | None:
    """Return a text that is equal for the series of one patient, by the Patient ID of the first file, or None.

    None stands for an identifier that is missing, as in "unknown", and for files that cannot be read. The result is a
    hash with a salt of this process, so that it does not identify the patient.
    """
    with suppress(VolumeError, OSError), silent_pydicom():
        value = _parse(_files(folder)[0][0], ["PatientID"], pixels=False).get("PatientID")
        text = str(value or "").strip()
        if is_given(text) and text.lower() not in _NO_PATIENT:
            return hashlib.sha256(_SALT + text.encode("utf-8", "surrogatepass")).hexdigest()
    return None


def slice_frames(folder: Path) -> list[tuple[Path, int]]:
    """Return the file of each slice and its frame in the file, from 0, in the order of the volume of `read_series`.

    Raises VolumeError as `read_series`, except for faults of pixels.
    """
    files, _ = _files(folder)
    with silent_pydicom():
        slices = _sorted(folder, [one for path in files for one in _read_headers(path)])
    return [(one.path, one.frame) for one in slices]


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the DICOM files of a folder, and the names of other files."""
    if dead := [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]:
        raise VolumeError(f"{dead[0]} is a link that leads to nothing, so that a slice may be missing; correct it")
    entries = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in entries if path.suffix.lower() in SUFFIXES or not is_other(path.name)]
    if not files:
        raise VolumeError(f"{folder} contains no DICOM file; give the folder of the slices")
    inner = [path for path in folder.iterdir() if not path.name.startswith(".") and holds_series(path)]
    if inner:
        raise VolumeError(
            f"{folder} and its folder {min(inner).name} both contain DICOM files; move all slices of one series, and "
            "nothing else, into one folder"
        )
    if len(files) > MAX_FILES:
        raise VolumeError(f"{folder}: {len(files)} files are more than the limit of {MAX_FILES}; {_ONE_VOLUME}")
    return files, [path.name for path in entries if path not in set(files)]


def _parse(path: Path, fields: list[str], *, pixels: bool) -> Dataset:
    """Return the given fields of a file. Error texts of pydicom may quote header values and are dropped."""
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise VolumeError(f"{path}: {path.stat().st_size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
        if not _is_dicom(path):
            raise VolumeError(f"{path}: not a DICOM file (no mark DICM at byte 128); remove it, or copy it again")
        if read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
            raise VolumeError(f"{path}: deflated DICOM is not supported; rewrite it uncompressed")
        return dcmread(path, specific_tags=list(fields), stop_before_pixels=not pixels)
    except (VolumeError, MemoryError, *STOPS):
        raise
    except BaseException as error:  # pydicom raises many kinds of errors for broken files
        raise _broken(path, error) from None


def _broken(path: Path, error: BaseException) -> VolumeError:
    return VolumeError(f"{path}: broken or truncated DICOM ({type(error).__name__}); {_COPY_AGAIN}")


def _frames(path: Path, fields: list[str], *, pixels: bool) -> list[Dataset]:
    """Return one data set for each frame of a file, with the fields and pixels of the frame."""
    data = _parse(path, fields, pixels=pixels)
    try:
        shared, groups = ([*(data.get(name) or ())] for name in _GROUPS)
        return _split(path, data, shared, groups, pixels=pixels) if groups else [data]
    except (VolumeError, MemoryError, *STOPS):
        raise
    except BaseException as error:  # pydicom raises many kinds of errors for broken files
        raise _broken(path, error) from None


def _split(path: Path, data: Dataset, shared: list[Dataset], groups: list[Dataset], *, pixels: bool) -> list[Dataset]:
    from pydicom import Dataset
    from pydicom.encaps import encapsulate, generate_frames

    number = int(data.get("NumberOfFrames") or 1)
    if number != len(groups) or number > MAX_FILES:
        raise VolumeError(f"{path}: {number} frames, but functional groups for {len(groups)}; {_COPY_AGAIN}")
    stacks = {str(group.FrameContentSequence[0].get("StackID")) for group in groups if "FrameContentSequence" in group}
    if len(stacks) > 1:
        raise VolumeError(f"{path}: {len(stacks)} stacks of frames in one file; save each stack as a file of its own")
    contents: list[bytes] = []
    if pixels and data.file_meta.TransferSyntaxUID.is_encapsulated:
        contents = [encapsulate([frame]) for frame in generate_frames(data.PixelData, number_of_frames=number)]
    elif pixels:
        size = int(data.Rows) * int(data.Columns) * int(data.BitsAllocated) // 8
        if not 0 <= len(data.PixelData) - size * number < 2:
            raise VolumeError(f"{path}: PixelData has not the size of {number} frames; {_COPY_AGAIN}")
        contents = [data.PixelData[i * size : (i + 1) * size] for i in range(number)]
    frames = []
    for i, group in enumerate(groups):
        frame = Dataset()
        frame.file_meta = data.file_meta
        for element in data:
            if element.keyword not in (*_GROUPS, "NumberOfFrames", "PixelData"):
                frame.add(element)
        for fields in (*shared[:1], group):
            for sequence, names in _FRAME_FIELDS.items():
                for name in names if sequence in fields else ():
                    if name in fields[sequence][0]:
                        frame[name] = fields[sequence][0][name]
        if pixels:
            frame.add_new("PixelData", "OB" if data.file_meta.TransferSyntaxUID.is_encapsulated else "OW", contents[i])
        frames.append(frame)
    return frames


def _read_headers(path: Path) -> list[_Slice]:
    frames = _frames(path, _HEADER_FIELDS, pixels=False)
    return [_read_header(path, number, data) for number, data in enumerate(frames)]


def _read_header(path: Path, number: int, data: Dataset) -> _Slice:
    try:
        _check_kind(path, data)
        return _Slice(
            path,
            number,
            str(data.get("SeriesInstanceUID", "")),
            int(data.Rows),
            int(data.Columns),
            (float(data.PixelSpacing[0]), float(data.PixelSpacing[1])),
            np.array(data.ImagePositionPatient, np.float64),
            np.array(data.ImageOrientationPatient[:3], np.float64),
            np.array(data.ImageOrientationPatient[3:], np.float64),
            tuple(str(data.get(field, "")) for field in _CONSTANT),
            tuple(int(data[field].value) if data.get(field) not in (None, "") else None for field in _COUNTS),
        )
    except VolumeError:
        raise
    except (ValueError, TypeError):
        raise VolumeError(
            f"{path}: PixelSpacing, ImagePositionPatient, ImageOrientationPatient or another geometry field is not a "
            "number (such as one with a decimal comma); correct the header"
        ) from None
    except STOPS:
        raise
    except BaseException as error:
        raise _broken(path, error) from None


def _check_kind(path: Path, data: Dataset) -> None:
    """Raise VolumeError unless a file is a single grey slice with a place in space."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    sop_class = UID(str(data.get("SOPClassUID", "")))
    name = sop_class.name if sop_class.type == "SOP Class" else "multi-frame image"
    if int(data.get("NumberOfFrames") or 1) > 1:
        raise VolumeError(
            f"{path}: {name} (several frames in one file without functional groups) is not read; convert it to .nii.gz"
        )
    if data.get("Modality") in _NO_IMAGES or name.startswith(("RT ", "Segmentation", "Parametric Map")):
        kind = data.Modality if data.get("Modality") in _NO_IMAGES else name
        raise VolumeError(
            f"{path}: an object of the kind {kind} is not an image of a series; remove it from the "
            "folder, or convert it to .nii.gz"
        )
    if "LOCALIZER" in [str(value).upper() for value in data.get("ImageType") or []]:
        raise VolumeError(f"{path}: a localizer (ImageType) is not a slice of a volume; remove it from the folder")
    absent = [field for field in ("Rows", "Columns", "BitsAllocated", "BitsStored") if data.get(field) is None]
    if absent:
        raise VolumeError(f"{path}: DICOM without {' and '.join(absent)} is not an image; remove it from the folder")
    fields = {"PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6}
    absent = [field for field in fields if not data.get(field)]
    if absent:
        raise VolumeError(
            f"{path}: DICOM without {' and '.join(absent)} has no place in space; give a volume of slices"
        )
    wrong = [field for field, number in fields.items() if len(data[field].value) != number]
    if wrong:
        raise VolumeError(f"{path}: {wrong[0]} does not have {fields[wrong[0]]} numbers; {_COPY_AGAIN}")
    colour, samples = data.get("PhotometricInterpretation"), int(data.get("SamplesPerPixel") or 1)
    if samples != 1 or colour != "MONOCHROME2":
        kind = "in inverted grey (MONOCHROME1)" if colour == "MONOCHROME1" else "in colour"
        raise VolumeError(f"{path}: a slice {kind} is not read; export the series as MONOCHROME2")
    tilt = data.get("GantryDetectorTilt")
    if tilt is not None and abs(float(tilt)) > 0.01:
        raise VolumeError(
            f"{path}: the gantry was tilted by {float(tilt):g} degrees (GantryDetectorTilt), so that the slices do not "
            "form a box; correct the tilt and convert the series to .nii.gz"
        )
    if data.get("HighBit") is not None and int(data.HighBit) != int(data.BitsStored) - 1:
        raise VolumeError(f"{path}: HighBit {data.HighBit} with BitsStored {data.BitsStored} is not supported")
    syntax = data.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise VolumeError(f"{path}: this DICOM compression is not supported; rewrite it uncompressed") from None
    if syntax.is_encapsulated and not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise VolumeError(f"{path}: no decoder for {syntax.name} is installed ({missing}); install one")


def _sorted(folder: Path, slices: list[_Slice]) -> list[_Slice]:
    """Return the slices along the slice normal. Raises VolumeError unless they form one series on one grid."""
    number = len({one.series for one in slices})
    if number > 1:
        raise VolumeError(
            f"{folder} contains {number} DICOM series ({len(slices)} files); move each series to its own folder "
            "and give that folder"
        )
    first = slices[0]
    numbers = [*first.spacing, *first.position, *first.along_row, *first.along_column]
    lengths = np.linalg.norm([first.along_row, first.along_column], axis=1)
    if (
        not np.isfinite(numbers).all()
        or min(first.spacing) <= 0
        or np.abs(lengths - 1).max() > 1e-3
        or abs(first.along_row @ first.along_column) > 1e-3
    ):
        raise VolumeError(
            f"{first.path}: PixelSpacing and ImageOrientationPatient are not sizes and perpendicular unit vectors; "
            f"{_COPY_AGAIN}"
        )
    for one in slices[1:]:
        turned = np.abs(np.subtract([one.along_row, one.along_column], [first.along_row, first.along_column])).max()
        if (one.rows, one.columns) != (first.rows, first.columns):
            raise VolumeError(
                f"{one.path} has {one.rows} x {one.columns} pixels, but {first.path.name} has {first.rows} x "
                f"{first.columns}; {_ONE_VOLUME}"
            )
        if not turned <= 1e-3:
            raise VolumeError(f"{one.path} and {first.path.name} have different orientations; {_ONE_VOLUME}")
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3, atol=0):
            raise VolumeError(f"{one.path} and {first.path.name} have different pixel sizes; {_ONE_VOLUME}")
        for field, value, expected in zip(_CONSTANT, one.constants, first.constants, strict=True):
            if value != expected:
                raise VolumeError(f"{one.path} and {first.path.name} have different {field}; {_ONE_VOLUME}")
        if not np.isfinite(one.position).all():
            raise VolumeError(f"{one.path}: ImagePositionPatient is not a place; {_COPY_AGAIN}")
    normal = np.cross(first.along_row, first.along_column)
    return sorted(slices, key=lambda one: float(one.position @ normal))


def _affine(folder: Path, slices: list[_Slice]) -> np.ndarray:
    """Return the affine (4, 4) from voxel indices to RAS mm.

    Raises:
        VolumeError: the slices are not equally spaced along their normal.
    """
    first, last = slices[0], slices[-1]
    normal = np.cross(first.along_row, first.along_column)
    places = np.array([one.position for one in slices])
    steps = np.diff(places @ normal)
    step = float(np.median(steps))
    for number in np.flatnonzero(steps < 1e-3):
        pair = f"{slices[number].path.name} and {slices[number + 1].path.name}"
        raise VolumeError(
            f"{folder}: {pair} are at the same position, so that the folder contains several volumes (echoes, phases, "
            f"times) or a copy; {_ONE_VOLUME}"
        )
    for number in np.flatnonzero(np.abs(steps - step) > 0.02 * step + 0.01):
        pair = f"{slices[number].path.name} and {slices[number + 1].path.name}"
        raise VolumeError(
            f"{folder}: {pair} are {steps[number]:.4g} mm apart, other slices {step:.4g} mm, so that slices are "
            f"missing or unequally spaced; {_COPY_AGAIN}, or resample it"
        )
    direction = (last.position - first.position) / (len(slices) - 1)
    aside = places - places[0] - np.outer(np.arange(len(slices)), normal * (direction @ normal))
    drift = float(np.linalg.norm(aside - np.outer(aside @ normal, normal), axis=1).max())
    if drift > 0.05 * min(*first.spacing, step) + 0.01:
        raise VolumeError(
            f"{folder}: the slices are shifted sideways by up to {drift:.3g} mm (tilted gantry), so that they do not "
            "form a box; correct the tilt and convert the series to .nii.gz"
        )
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    affine[:3, 2] = normal * (direction @ normal)
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM is LPS, NIfTI is RAS


def _missing_slices(folder: Path, slices: list[_Slice]) -> list[str]:
    """Return remarks on slices that may be missing at the ends, where positions do not tell.

    Raises:
        VolumeError: there are fewer slices than NumberOfSlices says (PS3.3 C.8.9.1).
    """
    numbers, images, stated, times = zip(*(one.counts for one in slices), strict=True)
    most = max((count for count in stated if count is not None), default=0)
    if len(slices) < most:
        raise VolumeError(
            f"{folder}: {len(slices)} slices, but NumberOfSlices says {most}, so that slices are missing; {_COPY_AGAIN}"
        )
    remarks = []
    known = sorted({number for number in numbers if number is not None})
    if known and (known[0] > 1 or known[-1] - known[0] + 1 > len(known)):
        remarks.append(
            f"the InstanceNumber of {len(slices)} slices runs from {known[0]} to {known[-1]}, so that slices may be "
            "missing; compare with the source"
        )
    if (most := max((count for count in images if count is not None), default=0)) > len(slices):
        remarks.append(
            f"{len(slices)} slices, but ImagesInAcquisition says {most}; slices are missing, or the acquisition has "
            "several volumes; compare with the source"
        )
    if (most := max((count for count in times if count is not None), default=0)) > 1:
        remarks.append(f"one volume of a series with {most} times (NumberOfTemporalPositions)")
    return remarks


def _read_pixels(one: _Slice, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (rows, columns) of a slice after the modality transformation, and where they are padding."""
    try:
        stored, padded = decode_grey(data, one.rows * one.columns)
        if (values := modality_table(data, stored)) is None:
            slope, intercept = (_number(one.path, data, name, default) for name, default in _RESCALE)
            if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
                raise VolumeError(f"{one.path}: RescaleSlope and RescaleIntercept are not a scale; {_COPY_AGAIN}")
            values = stored.astype(np.float64) * slope + intercept
        return values, padded
    except (VolumeError, MemoryError, *STOPS):
        raise
    except Refused as error:
        raise VolumeError(f"{one.path}: {error.reason}; {error.fix}") from None
    except BaseException as error:  # pydicom and its decoders raise many kinds of errors for broken files
        raise _broken(one.path, error) from None


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _number(path: Path, data: Dataset, field: str, default: float) -> float:
    try:
        value: Any = data.get(field)
        return default if value is None or value == "" else float(value)
    except (ValueError, TypeError):
        raise VolumeError(f"{path}: {field} is not a number; correct the header") from None

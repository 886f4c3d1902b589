"""Folders of DICOM series with mutated slices, against SimpleITK's geometry and the voxels that were written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from hypothesis import strategies as st
from pydicom.uid import UID, CTImageStorage, MRImageStorage

from preceptor.data.dicom_series import read_series
from tests.data.dicom_series_files import slices_of, write_slices
from tests.fuzz.mutate import DAMAGE, Mutation, mostly, mutate
from tests.fuzz.outcome import PATIENT, attempt, recorded, require
from tests.fuzz.target import Target

HALF = float(np.sqrt(0.5))
ORIENTATIONS = st.sampled_from(
    [
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
        (-1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
        (HALF, HALF, 0.0, -HALF, HALF, 0.0),
        (1.0, 0.0, 0.0, 0.0, HALF, HALF),
    ]
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "ImagePositionPatient": st.sampled_from(
        [[0, 0, 0], [-20, -30, 41.5], [-20, -30, 40.01], [1, 2], [1e9, 0, 0], None]
    ),
    "ImageOrientationPatient": st.sampled_from(
        [[1, 0, 0, 0, -1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [1], None]
    ),
    "PixelSpacing": st.sampled_from([[1, 1], [0, 1], [-1, 1], [1.5, 0.6], [1], None]),
    "SeriesInstanceUID": st.sampled_from([UID("1.2.3"), None]),
    "Rows": st.sampled_from([3, 7, 0, None]),
    "RescaleSlope": st.sampled_from([2, 0, -1, 0.5, None]),
    "RescaleIntercept": st.sampled_from([-1024, 0.25, None]),
    "Modality": st.sampled_from(["SEG", "RTSTRUCT", "MR", ""]),
    "ImageType": st.sampled_from([["ORIGINAL", "PRIMARY", "LOCALIZER"], ["DERIVED", "SECONDARY"]]),
    "NumberOfFrames": st.sampled_from([0, 1, 2]),
    "GantryDetectorTilt": st.sampled_from([0, 15, None]),
    "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "RGB", None]),
    "BitsStored": st.sampled_from([8, 12, 16, 17]),
    "PixelPaddingValue": st.sampled_from([0, 5, -2000]),
    "EchoTime": st.sampled_from([1, 90]),
    "EchoNumbers": st.sampled_from([1, 2]),
    "AcquisitionNumber": st.sampled_from([1, 2]),
}
CHANGE = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.tuples(st.integers(-1, 9), st.just(name), FIELDS[name])  # -1: all slices
)
INCOMPLETE = ("missing", "copied", "empty", "subfolder", "link")
"""What may happen to the files of a series so that it must be refused."""


@dataclass(frozen=True)
class SeriesInput:
    """A series, fields to change (slice, name, value), what happens to its files, and damage to one of them."""

    count: int
    orientation: tuple[float, ...]
    spacing: tuple[float, float, float]
    signed: bool
    magnetic: bool
    rescale: tuple[float, float] | None
    changes: tuple[tuple[int, str, Any], ...]
    files: str
    mutations: tuple[Mutation, ...]
    seed: int


INPUTS = st.builds(
    SeriesInput,
    count=mostly(st.integers(3, 5), st.integers(1, 2), 12),
    orientation=ORIENTATIONS,
    spacing=st.sampled_from([(1.5, 0.5, 3.0), (0.7, 0.7, 0.7), (1.0, 2.0, 0.25)]),
    signed=st.booleans(),
    magnetic=st.booleans(),
    rescale=st.sampled_from([None, (1.0, -1024.0), (2.0, 0.0), (0.5, 3.25)]),
    changes=mostly(st.just(()), st.lists(CHANGE, min_size=1, max_size=2).map(tuple), 2),
    files=mostly(
        st.just("all"),
        st.sampled_from(
            ["missing", "first missing", "copied", "hidden", "text", "subfolder", "empty", "link", "renamed"]
        ),
        3,
    ),
    mutations=DAMAGE,
    seed=st.integers(0, 99),
)


def set_field(data: Any, name: str, value: Any, signed: bool) -> None:
    """Set or delete a field of a data set."""
    if value is None:
        if name in data:
            delattr(data, name)
    elif name == "PixelPaddingValue":
        data.add_new(0x00280120, "SS" if signed or value < 0 else "US", value)
    else:
        setattr(data, name, value)


def check(case: SeriesInput, folder: Path) -> bool:
    """Read a series; what is accepted has the voxels that were written, and the geometry that SimpleITK reads."""
    rng = np.random.default_rng(case.seed)
    low = -900 if case.signed else 0
    volume = rng.integers(low, 2000, (case.count, 5, 4)).astype(np.int16 if case.signed else np.uint16)
    with recorded():
        slices = slices_of(
            volume,
            orientation=case.orientation,
            spacing=case.spacing,
            kind=MRImageStorage if case.magnetic else CTImageStorage,
        )
        for number, data in enumerate(slices):
            data.PatientName = data.PatientID = data.PatientComments = PATIENT
            data.SeriesDescription = f"t2 {PATIENT}"
            if case.rescale is not None:
                data.RescaleSlope, data.RescaleIntercept = case.rescale
            for place, name, value in case.changes:
                if place < 0 or place % case.count == number:
                    set_field(data, name, value, case.signed)
        root = folder / "p0_t2"
        try:
            write_slices(root, slices, lambda number: f"IM{(7 * number + 3) % 101:04d}.dcm")
        except Exception:  # pydicom does not write every contradiction
            return False
    change_files(case, root)
    outcome = attempt(lambda: read_series(root), place=root)
    if not outcome.accepted:
        sound = not case.changes and not case.mutations and case.count > 1
        require(not sound or case.files in INCOMPLETE, "refused", outcome.sentence)
        return False
    require(case.files not in INCOMPLETE or case.count < 4, case.files)
    if case.mutations or case.changes or case.files == "missing":
        return True
    voxels, geometry = outcome.value
    count = case.count - (case.files == "first missing" and case.count > 2)
    slope, intercept = case.rescale or (1.0, 0.0)
    written = volume[case.count - count :].astype(np.float64) * slope + intercept
    require(voxels.shape == (4, 5, count), "another shape", voxels.shape)
    require(np.array_equal(voxels.transpose(2, 1, 0), written), "other voxels")
    compare_geometry(root, geometry)
    return True


def change_files(case: SeriesInput, root: Path) -> None:
    """Remove, add and damage files of a series."""
    files = sorted(root.iterdir())
    by_position = [root / f"IM{(7 * number + 3) % 101:04d}.dcm" for number in range(case.count)]
    if case.files == "missing" and case.count > 2:
        by_position[1].unlink()
    elif case.files == "first missing" and case.count > 2:
        by_position[0].unlink()
    elif case.files == "copied":
        shutil.copy(files[0], root / "copy.dcm")
    elif case.files == "hidden":
        shutil.copy(files[0], root / "._IM0001.dcm")
    elif case.files == "text":
        (root / "readme.txt").write_text("a note")
    elif case.files == "subfolder":
        (root / "more").mkdir()
        shutil.copy(files[0], root / "more" / "IM1.dcm")
    elif case.files == "empty":
        (root / "IM9999.dcm").write_bytes(b"")
    elif case.files == "link":
        (root / "IM9998.dcm").symlink_to(root / "nowhere.dcm")
    elif case.files == "renamed":
        for number, path in enumerate(files):
            path.rename(root / f"{number}")
    files = sorted(path for path in root.iterdir() if path.is_file() and path.suffix in (".dcm", ""))
    if case.mutations and files:
        path = files[case.seed % len(files)]
        path.write_bytes(mutate(path.read_bytes(), case.mutations))


def compare_geometry(root: Path, geometry: Any) -> None:
    """Raise Wrong unless SimpleITK finds the same origin, spacing and directions (it uses LPS, NIfTI RAS)."""
    files = [path for path in root.iterdir() if path.suffix in (".dcm", "") and not path.name.startswith(".")]
    with recorded():
        places = {str(path): position(path) for path in files}
        image = SimpleITK.ReadImage(sorted(places, key=lambda name: places[name]))
    direction = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction, image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    require(np.abs(geometry.affine - affine).max() < 1e-3, "another geometry", (geometry.affine, affine))


def position(path: Path) -> float:
    """Return the position of a slice along its normal."""
    import pydicom

    data = pydicom.dcmread(path, stop_before_pixels=True)
    row, column = np.array(data.ImageOrientationPatient[:3]), np.array(data.ImageOrientationPatient[3:])
    return float(np.array(data.ImagePositionPatient, float) @ np.cross(row, column))


TARGET = Target(INPUTS, check, 60)

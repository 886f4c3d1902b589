"""DICOM series for tests: a data set per slice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

IDENTITY = (1.0, 0, 0, 0, 1, 0)


def slices_of(
    volume: np.ndarray,
    *,
    orientation: tuple[float, ...] = IDENTITY,
    origin: tuple[float, float, float] = (-20.0, -30.0, 40.0),
    spacing: tuple[float, float, float] = (1.5, 0.5, 3.0),
    series: str | None = None,
    kind: UID = CTImageStorage,
) -> list[FileDataset]:
    """Return one data set per slice of stored values (slices, rows, columns). `spacing` is rows, columns, slices."""
    series = series or generate_uid()
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    found = []
    for number, pixels in enumerate(volume):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, kind
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID = series, generate_uid()
        data.PatientName, data.PatientID, data.SeriesDescription = "DOE^JANE", "4711", "t2 flair"
        data.Modality = "MR" if kind == MRImageStorage else "CT"
        data.InstanceNumber = len(volume) - number
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        data.PixelSpacing = [spacing[0], spacing[1]]
        data.SliceThickness = 99  # differs from the distance of the slices
        data.ImageOrientationPatient = [float(value) for value in orientation]
        data.ImagePositionPatient = [float(value) for value in np.array(origin) + number * spacing[2] * normal]
        data.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
        found.append(data)
    return found


def write_slices(folder: Path, slices: list[FileDataset], names: Callable[[int], str] | None = None) -> Path:
    """Write the slices in an order of names that is not that of the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(slices):
        name = names(number) if names else f"IM{(7 * number + 3) % 101:04d}.dcm"
        data.save_as(folder / name, enforce_file_format=True)
    return folder


def noise(shape: tuple[int, int, int] = (5, 6, 4), seed: int = 0, kind: Any = np.int16) -> np.ndarray:
    """Return stored values (slices, rows, columns)."""
    return np.random.default_rng(seed).integers(0, 2000, shape).astype(kind)


def changed(slices: list[FileDataset], number: int, fields: Mapping[str, Any]) -> list[FileDataset]:
    """Set fields of one slice; None deletes a field."""
    for name, value in fields.items():
        if value is None:
            delattr(slices[number], name)
        else:
            setattr(slices[number], name, value)
    return slices


def enhanced_of(slices: list[FileDataset], order: list[int]) -> FileDataset:
    """Return one Enhanced MR image with the slices as frames, in an order that is not that of the positions."""
    data = copy.deepcopy(slices[0])
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    data.NumberOfFrames, data.InstanceNumber = len(slices), 1
    data.PixelData = b"".join(slices[i].PixelData for i in order)
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = slices[0].ImageOrientationPatient
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = slices[0].PixelSpacing
    shared.PixelMeasuresSequence[0].SliceThickness = 3.0
    data.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for i in order:
        group = Dataset()
        group.PlanePositionSequence, group.FrameContentSequence = [Dataset()], [Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = slices[i].ImagePositionPatient
        group.FrameContentSequence[0].StackID = "1"
        group.FrameContentSequence[0].InStackPositionNumber = i + 1
        group.PixelValueTransformationSequence = [Dataset()]
        group.PixelValueTransformationSequence[0].RescaleSlope = 2
        group.PixelValueTransformationSequence[0].RescaleIntercept = -7
        group.PixelValueTransformationSequence[0].RescaleType = "US"
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = groups
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(data, name)
    return data

"""DICOM files for tests: made ones, and those of pydicom with a reference rendering."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import numpy as np


def dicom(
    path: Path, pixels: np.ndarray, *, drop: tuple[str, ...] = (), pixel_data: bytes | None = None, **fields
) -> Path:
    """Write a DICOM file; `fields` override header fields, `drop` removes them, `pixel_data` replaces the pixels."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = fields.pop("transfer_syntax", ExplicitVRLittleEndian)
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = pixels.dtype.itemsize * 8
    header = {
        "PatientName": "Doe^Jane",
        "PatientID": "secret-4711",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    for name, value in {**header, **fields}.items():
        if name not in drop:
            setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes() if pixel_data is None else pixel_data
    if pixel_data is not None:
        dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


def dicom_paths() -> list[Path]:
    """Return the DICOM files that pydicom bundles and those of pydicom-data, if that is installed."""
    import pydicom.data

    # Not get_testdata_files, which tries to download what is missing.
    folders = [Path(pydicom.data.__file__).parent / "test_files"]
    if (extra := importlib.util.find_spec("data_store")) is not None and extra.origin:
        folders.append(Path(extra.origin).parent / "data")
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [p for p in paths if p.suffix.lower() in (".dcm", ".dicom") or p.read_bytes()[128:132] == b"DICM"]


def reference(path: Path) -> np.ndarray:
    """Render a file with pydicom's functions, as floats in [0, 255]."""
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(path)
        stored = pixel_array(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            bits = dataset.RedPaletteColorLookupTableDescriptor[2]
            return apply_color_lut(stored, dataset)[..., :3] * (255 / (2**bits - 1))
        if stored.ndim == 3:
            return stored.astype(float)
        padding = np.zeros(stored.shape, bool)
        if "PixelPaddingValue" in dataset:
            padding = stored == dataset.PixelPaddingValue
        values = apply_modality_lut(stored, dataset)
        shown = apply_voi_lut(values, dataset).astype(float)
        if dataset.get("VOILUTSequence"):
            low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        elif dataset.get("WindowWidth") is not None:  # pydicom maps windows to the range of the stored values, rescaled
            signed = dataset.PixelRepresentation
            ends = np.array([0, 2**dataset.BitsStored - 1]) - signed * 2 ** (dataset.BitsStored - 1)
            low, high = ends * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
        else:
            low, high = shown[~padding].min(), shown[~padding].max()
        grey = (shown - low) / max(high - low, 1e-9) * 255
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            grey = 255 - grey
        grey[padding] = 0
        return grey

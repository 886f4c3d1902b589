"""DICOM images with contradicting headers and damaged bytes, against a rendering written from DICOM PS3.3 C.7, C.11."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from preceptor.data.images import load_image
from tests.fuzz.mutate import DAMAGE, Mutation, mostly, mutate, rarely
from tests.fuzz.outcome import PATIENT, Wrong, attempt, recorded, require
from tests.fuzz.target import Target

JPEG, JPEG2000 = UID("1.2.840.10008.1.2.4.50"), UID("1.2.840.10008.1.2.4.90")
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG, JPEG2000)

NUMBERS = st.sampled_from([0, 1, -1, 2, 0.5, 40, 400, -1024, 1e-9, 1e6, 4095, 128])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "Rows": st.sampled_from([0, 1, 5, 6, 7, 512, 65535]),
    "Columns": st.sampled_from([0, 1, 5, 6, 7, 512, 65535]),
    "BitsAllocated": st.sampled_from([0, 1, 8, 12, 16, 32, 64]),
    "BitsStored": st.sampled_from([0, 1, 8, 10, 12, 14, 15, 16, 32]),
    "HighBit": st.sampled_from([0, 7, 9, 11, 13, 14, 15, 16]),
    "PixelRepresentation": st.sampled_from([0, 1, 2]),
    "PhotometricInterpretation": st.sampled_from(
        ["MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "PALETTE COLOR", "ARGB", PATIENT.upper()[:16]]
    ),
    "SamplesPerPixel": st.sampled_from([0, 1, 2, 3, 4]),
    "PlanarConfiguration": st.sampled_from([0, 1, 2]),
    "NumberOfFrames": st.sampled_from([0, 1, 2, 1000]),
    "RescaleSlope": NUMBERS,
    "RescaleIntercept": NUMBERS,
    "RescaleType": st.sampled_from(["HU", "US", "OD"]),
    "WindowCenter": st.one_of(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=2)),
    "WindowWidth": st.one_of(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=2)),
    "VOILUTFunction": st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", "LINEAR ", "OTHER"]),
    "PixelPaddingValue": st.sampled_from([0, 1, 2000, 65535, -1, -2000]),
    "PixelPaddingRangeLimit": st.sampled_from([0, 10, 65535, -10]),
    "PresentationLUTShape": st.sampled_from(["IDENTITY", "INVERSE", "OTHER"]),
    "ModalityLUTSequence": st.integers(0, 5),
    "VOILUTSequence": st.integers(0, 5),
}
DELETED = "deleted"
FIELD = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(FIELDS[name], FIELDS[name], FIELDS[name], st.just(DELETED)))
)
RAW = st.tuples(
    st.sampled_from(["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"]),
    st.sampled_from([b"1,5", b"", b"nan ", b"inf", b"1e400", b"abc ", b"1\\2 ", b" 40 ", PATIENT.encode()[:16]]),
)


@dataclass(frozen=True)
class DicomInput:
    """An image, the header fields to change, texts to write as numbers, and damage to the bytes of the file."""

    syntax: UID
    bits: int
    signed: bool
    colour: bool
    fields: tuple[tuple[str, Any], ...]
    raw: tuple[str, bytes] | None
    cut: int
    mutations: tuple[Mutation, ...]
    seed: int


INPUTS = st.builds(
    DicomInput,
    syntax=st.sampled_from(SYNTAXES),
    bits=st.sampled_from([8, 10, 12, 16]),
    signed=st.booleans(),
    colour=rarely(4),
    fields=st.lists(FIELD, max_size=4).map(tuple),
    raw=mostly(st.none(), RAW),
    cut=mostly(st.just(0), st.sampled_from([1, 2, 13, -1, -2, -72])),
    mutations=DAMAGE,
    seed=st.integers(0, 99),
)


def build(case: DicomInput) -> bytes:
    """Return the bytes of the file."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = case.syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = UID("1.2.3.4")
    dataset.PatientName = dataset.PatientID = PATIENT
    dataset.PatientComments = dataset.ImageComments = f"{PATIENT} fell"
    dataset.PatientBirthDate = "19010101"
    bits = 8 if case.colour or case.syntax == JPEG else case.bits
    signed = case.signed and not case.colour and case.syntax in SYNTAXES[:4]
    allocated = 8 if bits == 8 else 16
    dataset.Rows, dataset.Columns = 6, 6
    dataset.SamplesPerPixel = 3 if case.colour else 1
    dataset.PhotometricInterpretation = "RGB" if case.colour else "MONOCHROME2"
    if case.colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    shape = (6, 6, 3) if case.colour else (6, 6)
    pixels = np.random.default_rng(case.seed).integers(low, high, shape)
    order = ">" if case.syntax == ExplicitVRBigEndian else "<"
    kind = f"{order}{'i' if signed else 'u'}{allocated // 8}"
    dataset.PixelData = pixels.astype(kind).tobytes()
    if case.syntax in (JPEG, JPEG2000):
        image = Image.fromarray(pixels.astype(np.uint8 if allocated == 8 else np.uint16))
        file = io.BytesIO()
        if case.syntax == JPEG:
            image.save(file, "JPEG")
        else:
            image.save(file, "JPEG2000", no_jp2=True)
        dataset.PixelData = encapsulate([file.getvalue()])
        if case.colour and case.syntax == JPEG:
            dataset.PhotometricInterpretation = "YBR_FULL_422"
    elif case.syntax == RLELossless:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset["PixelData"].VR = "OW"
        dataset.compress(RLELossless, generate_instance_uid=False)
    dataset["PixelData"].VR = "OW" if allocated == 16 or case.syntax in (ImplicitVRLittleEndian,) else "OB"
    for name, value in case.fields:
        if isinstance(value, str) and value == DELETED:
            if name in dataset:
                delattr(dataset, name)
        elif name.endswith("LUTSequence"):
            setattr(dataset, name, [lut(value, signed, name)])
        elif name.startswith("PixelPadding"):
            dataset.add_new(name_tag(name), "SS" if value < 0 else "US", value)
        else:
            setattr(dataset, name, value)
    if case.cut > 0:
        dataset.PixelData = dataset.PixelData[: -case.cut]
    elif case.cut < 0:
        dataset.PixelData += bytes(-case.cut)
    if case.raw is not None:
        dataset.add_new(name_tag(case.raw[0]), "LO", case.raw[1].decode())
    file = io.BytesIO()
    pydicom.dcmwrite(
        file,
        dataset,
        enforce_file_format=True,
        implicit_vr=case.syntax == ImplicitVRLittleEndian,
        little_endian=case.syntax != ExplicitVRBigEndian,
    )
    data = file.getvalue()
    if case.raw is not None and case.syntax != ImplicitVRLittleEndian:
        tag = name_tag(case.raw[0]).to_bytes(4, "big")
        at = tag[:2] + tag[2:] if case.syntax == ExplicitVRBigEndian else tag[1::-1] + tag[:1:-1]
        data = data.replace(at + b"LO", at + b"DS")
    return mutate(data, case.mutations)


def name_tag(name: str) -> int:
    tag = pydicom.datadict.tag_for_keyword(name)
    assert tag is not None
    return tag


def lut(variant: int, signed: bool, name: str) -> Dataset:
    """Return an item of a Modality or VOI LUT Sequence; odd variants are inverted, some descriptors are broken."""
    item = Dataset()
    bits = 8 if variant in (2, 3) else 12
    entries = np.linspace(0, (1 << bits) - 1, 64).astype(int)
    entries = entries[::-1] if variant % 2 else entries
    first = -32 if signed else 0
    length = 63 if variant == 4 else 64
    item.add_new(0x00283002, "SS" if signed else "US", [length, first, bits])
    item.add_new(0x00283006, "US", entries.tolist() if variant != 5 else entries.tolist()[:20])
    if name == "ModalityLUTSequence":
        item.ModalityLUTType = "US"
    return item


def renderings(path: Path) -> list[np.ndarray] | None:
    """Return the 8-bit renderings that DICOM allows for a file, None if its header does not define one.

    There are several if pixels have the padding value, because it is then open whether they count for the range.
    """
    dataset = pydicom.dcmread(path)
    bits, signed = int(dataset.get("BitsStored", dataset.BitsAllocated)), int(dataset.PixelRepresentation)
    allocated, high = int(dataset.BitsAllocated), int(dataset.get("HighBit", bits - 1))
    if not 1 <= bits <= high + 1 <= allocated or is_too_long(dataset):
        return None
    # All bits, because pydicom does not know HighBit. Until 1996, the values could be above the lowest bit.
    compressed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    stored = dataset.pixel_array if compressed else pydicom.pixels.pixel_array(dataset, bits_stored=allocated)
    if stored.ndim == 3:
        return [stored.astype(np.uint8)]
    values = stored.astype(np.int64) >> (high + 1 - bits) & ((1 << bits) - 1)
    if signed:
        values = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    padding = np.zeros(values.shape, bool)
    if "PixelPaddingValue" in dataset:
        ends = [int(dataset.PixelPaddingValue), int(dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue))]
        # Both are US or SS as PixelRepresentation says: 65535 in signed pixels is -1.
        modulus = 2 ** max(16, int(dataset.BitsAllocated))
        ends = [(end + modulus // 2) % modulus - modulus // 2 if signed else end % modulus for end in ends]
        padding = (values >= min(ends)) & (values <= max(ends))
    if dataset.get("ModalityLUTSequence"):
        output, _ = looked_up(values, dataset.ModalityLUTSequence[0])
    else:
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
        output = values * float(1 if slope is None else slope) + float(0 if intercept is None else intercept)
    if dataset.get("VOILUTSequence"):
        shown, top = looked_up(np.rint(output).astype(np.int64), dataset.VOILUTSequence[0])
        greys = [shown / top]
    elif dataset.get("WindowWidth") is not None and dataset.get("WindowCenter") is not None:
        centre, width = (float(np.atleast_1d(dataset.get(name))[0]) for name in ("WindowCenter", "WindowWidth"))
        function = str(dataset.get("VOILUTFunction") or "LINEAR").strip()
        if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or width <= 0 or (function == "LINEAR" and width < 1):
            greys = [stretched(output, output)]
        elif function == "SIGMOID":
            greys = [1 / (1 + np.exp(np.clip(-4 * (output - centre) / width, -700, 700)))]
        elif function == "LINEAR_EXACT":
            greys = [np.clip((output - centre) / width + 0.5, 0, 1)]
        elif width == 1:
            greys = [(output > centre - 0.5).astype(float)]
        else:
            greys = [np.clip((output - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)]
    else:
        greys = [stretched(output, output)]
        if padding.any() and not padding.all():
            greys.append(stretched(output, output[~padding]))
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if dataset.get("PresentationLUTShape") in ("IDENTITY", "INVERSE"):  # it includes the inversion (PS3.3 C.11.6)
        inverted = dataset.PresentationLUTShape == "INVERSE"
    greys = [1 - grey if inverted else grey for grey in greys]
    found = [grey * 255 for grey in greys]
    return [np.where(padding, np.nan, grey) for grey in found]


def is_too_long(dataset: Dataset) -> bool:
    """Return whether uncompressed pixel data is longer than the image, so that its shape may be another one."""
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return False
    bits = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated
    return len(dataset.PixelData) > -(-bits // 16) * 2


def looked_up(values: np.ndarray, item: Dataset) -> tuple[np.ndarray, float]:
    """Return the entries of a look-up table and its largest possible entry (PS3.3 C.11.1.1)."""
    length, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData  # bytes if its VR is OW
    entries = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.atleast_1d(np.asarray(data))
    if len(entries) != (length or 65536):
        raise ValueError("the table has another length than its descriptor says")
    places = np.clip(values - first, 0, len(entries) - 1)
    return entries[places].astype(float), float((1 << bits) - 1)


def stretched(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return values scaled from the range of `counted` to [0, 1]; 0 if the range is empty."""
    low, high = counted.min(), counted.max()
    return np.zeros(values.shape) if low == high else np.clip((values - low) / (high - low), 0, 1)


def check(case: DicomInput, folder: Path) -> bool:
    """Read a file and compare it with the renderings that the standard allows."""
    with recorded():
        try:
            data = build(case)
        except Exception:  # pydicom does not write every contradiction
            return False
    path = folder / "x.dcm"
    path.write_bytes(data)
    outcome = attempt(lambda: load_image(path), place=path)
    if not outcome.accepted:
        return False
    found = np.asarray(outcome.value, np.float64)
    with recorded():
        try:
            allowed = renderings(path)
        except BaseException as error:  # an extension in Rust may panic
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise Wrong("a file that pydicom cannot render was read", type(error).__name__) from error
    require(allowed is not None, "a contradicting header was read")
    assert allowed is not None
    gaps = [
        float(np.nanmax(np.abs(found - grey), initial=0)) if found.shape == grey.shape else np.inf for grey in allowed
    ]
    if min(gaps) > 1.01:
        raise Wrong(f"grey levels differ from DICOM{used(path)}", f"by {min(gaps):.0f}")
    return True


def used(path: Path) -> str:
    """Return the optional fields of a header that change grey levels, so that failures of different kinds differ."""
    with recorded():
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
    names = ("ModalityLUTSequence", "VOILUTSequence", "PresentationLUTShape", "VOILUTFunction", "PixelPaddingValue")
    present = [name for name in names if name in dataset]
    return f", {present[0]}" if present else ""


TARGET = Target(INPUTS, check, 400)

"""Parse and check the header of a single DICOM image, before its pixels are decoded."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from preceptor.data.image_structure import COPY_AGAIN, STOPS, Refused, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

_MARK, _MARK_OFFSET = b"DICM", 128
DEFLATED = "1.2.840.10008.1.2.1.99"
# The only fields that pydicom parses. Names, dates and identifiers are never read into memory as values.
IMAGE_FIELDS = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
]
"""Fields that describe the pixels."""
VALUE_FIELDS = [
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "RescaleIntercept",
    "RescaleSlope",
    "PixelData",
]
"""Fields that give the values of the pixels."""
FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_GROUP_FIELDS = {
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
}
"""Fields that enhanced images have in a functional group and not at the top level (PS3.3 C.7.6.16.2)."""
_FIELDS = [
    *IMAGE_FIELDS,
    *VALUE_FIELDS,
    *FUNCTIONAL_GROUPS,
    "PlanarConfiguration",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PresentationLUTSequence",
    "PresentationLUTShape",
    "PixelPresentation",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
]
_REQUIRED = (
    "PixelData",
    "Rows",
    "Columns",
    "PhotometricInterpretation",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_MAX_ITEMS = 100_000  # elements, or items of sequences and fragments
EXPORT = "export the image as PNG or JPEG"


def is_dicom(data: bytes) -> bool:
    """Return whether a file has the mark of DICOM (PS3.10, 7.1)."""
    return data[_MARK_OFFSET : _MARK_OFFSET + len(_MARK)] == _MARK


_silence = threading.Lock()


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Suppress the warnings and log messages of pydicom, because they quote header values.

    Warning filters and loggers are global, so only one thread at a time can be inside.
    """
    logger = logging.getLogger("pydicom")
    with _silence, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        was_disabled, logger.disabled = logger.disabled, True
        try:
            yield
        finally:
            logger.disabled = was_disabled


@contextmanager
def named_errors() -> Iterator[None]:
    with silent_pydicom():
        try:
            yield
        except (Refused, MemoryError, *STOPS):
            raise
        except BaseException as error:  # pydicom and its decoders raise many kinds of errors for broken files
            # Drop the error text and the traceback: if a length field is broken, they may quote the patient's name.
            reason = f"broken or truncated DICOM ({type(error).__name__})"
            raise Refused(reason, f"{COPY_AGAIN}, or {EXPORT}") from None


def parse(data: bytes) -> Dataset:
    from pydicom.filereader import read_dataset, read_partial
    from pydicom.tag import Tag

    start = BytesIO(data)
    start.seek(_MARK_OFFSET + len(_MARK))
    meta = read_dataset(start, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    # pydicom inflates the whole data set before any size in it can be checked.
    if meta.get("TransferSyntaxUID") == DEFLATED:
        raise Refused("deflated DICOM is not supported", f"rewrite it uncompressed, or {EXPORT}")
    elements = 0

    def visit(tag: int, vr: str | None, length: int) -> bool:
        nonlocal elements
        elements += 1
        return elements > _MAX_ITEMS

    if data.count(b"\xfe\xff\x00\xe0") > _MAX_ITEMS:
        raise Refused(f"DICOM with more than {_MAX_ITEMS:,} items or fragments", EXPORT)
    dataset = read_partial(BytesIO(data), stop_when=visit, specific_tags=[Tag(name) for name in _FIELDS])
    if elements > _MAX_ITEMS:
        raise Refused(f"DICOM with more than {_MAX_ITEMS:,} elements", EXPORT)
    return dataset


def contradiction(*names: str) -> Refused:
    return Refused(f"DICOM with contradictory {' and '.join(names)}", f"correct the header, or {EXPORT}")


def value_of(dataset: Dataset, name: str) -> Any:
    """Return the value of a field, or None if it is absent or empty. The value is never quoted in an error."""
    try:
        value = dataset.get(name)
    except Exception:  # such as a decimal comma, or a length that is not a multiple of the item size
        raise Refused(f"DICOM with an invalid {name}", f"correct the header, or {EXPORT}") from None
    return None if value is None or (isinstance(value, (str, bytes, Sequence)) and not len(value)) else value


def numbers_of(dataset: Dataset, name: str) -> list[float]:
    value = value_of(dataset, name)
    values = [] if value is None else list(value) if isinstance(value, Sequence) else [value]
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        numbers = [np.nan]
    if not np.isfinite(numbers).all():
        raise Refused(f"DICOM with an invalid {name}", f"correct the header, or {EXPORT}")
    return numbers


def apply_functional_groups(dataset: Dataset) -> None:
    """Move rescale and window of the functional groups of a single frame to the top level, where `render` reads them.

    Raises:
        Refused: there are groups of several frames, or the top level has another value.
    """
    found = {}
    for group in FUNCTIONAL_GROUPS:  # those of the frame come last, and replace the shared ones
        items: Any = value_of(dataset, group) or []
        if len(items) > 1:
            raise contradiction(group, "NumberOfFrames")
        for sequence, names in _GROUP_FIELDS.items() if items else ():
            for fields in (value_of(items[0], sequence) or [])[:1]:
                found.update({name: fields[name] for name in names if value_of(fields, name) is not None})
    for name, element in found.items():
        if value_of(dataset, name) not in (None, element.value):
            raise contradiction(name, f"{name} in its functional groups")
        dataset[name] = element


def integer_of(dataset: Dataset, name: str, default: int) -> int:
    return int((numbers_of(dataset, name) or [default])[0])


def check_header(dataset: Dataset, max_pixels: int) -> None:
    """Refuse a header that is incomplete or contradictory, and kinds of images that are not supported."""
    from pydicom.pixels import get_decoder

    if absent := [name for name in _REQUIRED if name not in dataset or value_of(dataset, name) is None]:
        raise Refused(f"DICOM without {' and '.join(absent)}: not an image, or truncated")
    frames = integer_of(dataset, "NumberOfFrames", 1)
    if frames != 1:
        reason = f"multi-frame DICOM ({frames} frames); only single images are read"
        raise Refused(reason, "save each frame as a separate file")
    check_size(integer_of(dataset, "Columns", 0), integer_of(dataset, "Rows", 0), max_pixels)
    colour, samples = str(dataset.PhotometricInterpretation), integer_of(dataset, "SamplesPerPixel", 0)
    allocated, bits, high = (integer_of(dataset, name, 0) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    single = colour in (*_GREY, "PALETTE COLOR") and samples == 1
    if not (single or (colour in _COLOURS and samples == 3)):
        kind = colour if colour in (*_GREY, *_COLOURS, "PALETTE COLOR", "YBR_PARTIAL_420") else "of an unknown kind"
        reason = f"DICOM with PhotometricInterpretation {kind} and SamplesPerPixel {samples} is not supported"
        raise Refused(reason, EXPORT)
    if (allocated, bits) != (8, 8) if samples == 3 else allocated not in (1, 8, 16, 32):
        raise Refused(f"{colour} DICOM with BitsAllocated {allocated} and BitsStored {bits} is not supported", EXPORT)
    if not 0 < bits <= high + 1 <= allocated:
        raise contradiction("BitsAllocated", "BitsStored", "HighBit")
    if dataset.PixelRepresentation not in (0, 1):
        raise Refused("DICOM with an invalid PixelRepresentation", EXPORT)
    if samples == 3 and "PlanarConfiguration" not in dataset:
        raise Refused("colour DICOM without PlanarConfiguration", EXPORT)
    if "PresentationLUTSequence" in dataset:
        raise Refused("DICOM with a PresentationLUTSequence is not supported", EXPORT)
    if value_of(dataset, "PixelPresentation") in ("COLOR", "MIXED"):
        raise Refused("DICOM with PixelPresentation COLOR or MIXED is not supported", EXPORT)
    syntax = dataset.file_meta.TransferSyntaxUID
    kind = syntax.name if syntax.type == "Transfer Syntax" else "of an unknown kind"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused(f"DICOM compression {kind} is not supported", EXPORT) from None
    if not syntax.is_encapsulated:
        size = int(dataset.Columns) * int(dataset.Rows) * samples
        expected = -(-size * allocated // 8)
        if colour == "YBR_FULL_422":  # two pixels share their colour
            expected = size // 3 * 2
        # Of a longer value, pydicom takes the beginning or makes several frames.
        if len(dataset.PixelData) > expected + expected % 2:
            raise contradiction("PixelData", "Rows x Columns (the data is longer)")
        return
    if not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise Refused(f"no decoder for {kind} is installed ({missing})", f"install one, or {EXPORT}")
    if high != bits - 1:
        raise contradiction("BitsStored", "HighBit")

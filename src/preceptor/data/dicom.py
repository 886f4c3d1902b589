"""Render single DICOM images as 8-bit grey or RGB, as the standard prescribes.

Grey values pass through the modality transformation (look-up table, or rescale slope and intercept), the VOI
transformation (look-up table, or the first window) and the presentation (MONOCHROME1 and PresentationLUTShape). See
DICOM PS3.3 C.7.6.3 and C.11.1 to C.11.6. A file that contradicts itself is refused with the names of the fields.
Overlays, curves and colour profiles are not drawn.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from preceptor.data.containers import COPY_AGAIN, STOPS, Refused, check_size, jpeg_header, read_container
from preceptor.data.decode import decode

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
_FIELDS = [
    *IMAGE_FIELDS,
    *VALUE_FIELDS,
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
_MAX_EXPANSION = 2**28  # bytes that a run-length encoded segment may expand to before its runs are counted
# Compressed values (rows x columns x samples) that are decoded in less than 3 s and 600 MB.
_MAX_JPEG2000_VALUES, _MAX_COMPRESSED_VALUES = 16_000_000, 48_000_000
_EXPORT = "export the image as PNG or JPEG"


def is_dicom(data: bytes) -> bool:
    """Return whether a file has the mark of DICOM (PS3.10, 7.1)."""
    return data[_MARK_OFFSET : _MARK_OFFSET + len(_MARK)] == _MARK


def render(data: bytes, max_pixels: int) -> np.ndarray:
    """Return the image of a DICOM file as (rows, columns) or (rows, columns, 3) uint8.

    Without a window or VOI look-up table, the smallest and largest value become 0 and 255. Padding is black, and not
    counted for that range.

    Raises:
        Refused: the file is broken, too large, has several frames, contradicts itself, or is of a kind that is not
            supported. No value of the header is quoted.
    """
    with _named_errors():
        dataset = _parse(data)
        _check(dataset, max_pixels)
        stored = _decode_pixels(dataset, _check_codestream(dataset))
        if dataset.SamplesPerPixel == 3:
            return stored.astype(np.uint8, copy=False)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            return _by_level(stored, lambda levels, present: _palette(dataset, levels, present))
        return _by_level(stored, lambda levels, present: _grey(dataset, levels, present))


def decode_grey(dataset: Dataset, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored values (rows, columns) of a parsed grey image, and where they are padding.

    The values have no bits outside BitsStored and no modality transformation.

    Raises:
        Refused: as `render`. Other errors of pydicom and its decoders are not translated.
    """
    _check(dataset, max_pixels)
    pixels = _decode_pixels(dataset, _check_codestream(dataset))
    stored = _without_unused_bits(dataset, pixels, np.ones((), dtype=bool))
    return stored, _padding(dataset, pixels, stored)


def modality_table(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Return the entries of the modality look-up table for stored values, or None if there is no table.

    Raises:
        Refused: the table is invalid.
    """
    items = _value(dataset, "ModalityLUTSequence")
    return _look_up(dataset, items[0], stored, "ModalityLUTSequence")[0] if items else None


def size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return the columns and rows of a DICOM image without decoding it. Raises Refused as `render`."""
    with _named_errors():
        dataset = _parse(data)
        _check(dataset, max_pixels)
        return int(dataset.Columns), int(dataset.Rows)


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values linearly from [low, high] to [0, 255] and round them to uint8. Values outside are clipped."""
    if not low < high:
        return np.zeros(values.shape, dtype=np.uint8)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return stretch(np.arange(2**16, dtype=np.float64), low, high)[values]
    scaled = values.astype(np.float64)
    scaled -= low
    scaled /= high - low
    scaled *= 255
    return np.round(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


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
def _named_errors() -> Iterator[None]:
    with silent_pydicom():
        try:
            yield
        except (Refused, MemoryError, *STOPS):
            raise
        except BaseException as error:  # pydicom and its decoders raise many kinds of errors for broken files
            # Drop the error text and the traceback: if a length field is broken, they may quote the patient's name.
            reason = f"broken or truncated DICOM ({type(error).__name__})"
            raise Refused(reason, f"{COPY_AGAIN}, or {_EXPORT}") from None


def _parse(data: bytes) -> Dataset:
    from pydicom.filereader import read_dataset, read_partial
    from pydicom.tag import Tag

    start = BytesIO(data)
    start.seek(_MARK_OFFSET + len(_MARK))
    meta = read_dataset(start, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    # pydicom inflates the whole data set before any size in it can be checked.
    if meta.get("TransferSyntaxUID") == DEFLATED:
        raise Refused("deflated DICOM is not supported", f"rewrite it uncompressed, or {_EXPORT}")
    elements = 0

    def visit(tag: int, vr: str | None, length: int) -> bool:
        nonlocal elements
        elements += 1
        return elements > _MAX_ITEMS

    if data.count(b"\xfe\xff\x00\xe0") > _MAX_ITEMS:
        raise Refused(f"DICOM with more than {_MAX_ITEMS:,} items or fragments", _EXPORT)
    dataset = read_partial(BytesIO(data), stop_when=visit, specific_tags=[Tag(name) for name in _FIELDS])
    if elements > _MAX_ITEMS:
        raise Refused(f"DICOM with more than {_MAX_ITEMS:,} elements", _EXPORT)
    return dataset


# --- Checks before decoding -------------------------------------------------------------------------------------------


def _contradiction(*names: str) -> Refused:
    return Refused(f"DICOM with contradictory {' and '.join(names)}", f"correct the header, or {_EXPORT}")


def _value(dataset: Dataset, name: str) -> Any:
    """Return the value of a field, or None if it is absent or empty. The value is never quoted in an error."""
    try:
        value = dataset.get(name)
    except Exception:  # such as a decimal comma, or a length that is not a multiple of the item size
        raise Refused(f"DICOM with an invalid {name}", f"correct the header, or {_EXPORT}") from None
    return None if value is None or (isinstance(value, (str, bytes, Sequence)) and not len(value)) else value


def _numbers(dataset: Dataset, name: str) -> list[float]:
    value = _value(dataset, name)
    values = [] if value is None else list(value) if isinstance(value, Sequence) else [value]
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        numbers = [np.nan]
    if not np.isfinite(numbers).all():
        raise Refused(f"DICOM with an invalid {name}", f"correct the header, or {_EXPORT}")
    return numbers


def _integer(dataset: Dataset, name: str, default: int) -> int:
    return int((_numbers(dataset, name) or [default])[0])


def _check(dataset: Dataset, max_pixels: int) -> None:
    """Refuse a header that is incomplete or contradictory, and kinds of images that are not supported."""
    from pydicom.pixels import get_decoder

    if absent := [name for name in _REQUIRED if name not in dataset or _value(dataset, name) is None]:
        raise Refused(f"DICOM without {' and '.join(absent)}: not an image, or truncated")
    frames = _integer(dataset, "NumberOfFrames", 1)
    if frames != 1:
        reason = f"multi-frame DICOM ({frames} frames); only single images are read"
        raise Refused(reason, "save each frame as a separate file")
    check_size(_integer(dataset, "Columns", 0), _integer(dataset, "Rows", 0), max_pixels)
    colour, samples = str(dataset.PhotometricInterpretation), _integer(dataset, "SamplesPerPixel", 0)
    allocated, bits, high = (_integer(dataset, name, 0) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    single = colour in (*_GREY, "PALETTE COLOR") and samples == 1
    if not (single or (colour in _COLOURS and samples == 3)):
        kind = colour if colour in (*_GREY, *_COLOURS, "PALETTE COLOR", "YBR_PARTIAL_420") else "of an unknown kind"
        reason = f"DICOM with PhotometricInterpretation {kind} and SamplesPerPixel {samples} is not supported"
        raise Refused(reason, _EXPORT)
    if (allocated, bits) != (8, 8) if samples == 3 else allocated not in (1, 8, 16, 32):
        raise Refused(f"{colour} DICOM with BitsAllocated {allocated} and BitsStored {bits} is not supported", _EXPORT)
    if not 0 < bits <= high + 1 <= allocated:
        raise _contradiction("BitsAllocated", "BitsStored", "HighBit")
    if dataset.PixelRepresentation not in (0, 1):
        raise Refused("DICOM with an invalid PixelRepresentation", _EXPORT)
    if samples == 3 and "PlanarConfiguration" not in dataset:
        raise Refused("colour DICOM without PlanarConfiguration", _EXPORT)
    if "PresentationLUTSequence" in dataset:
        raise Refused("DICOM with a PresentationLUTSequence is not supported", _EXPORT)
    if _value(dataset, "PixelPresentation") in ("COLOR", "MIXED"):
        raise Refused("DICOM with PixelPresentation COLOR or MIXED is not supported", _EXPORT)
    syntax = dataset.file_meta.TransferSyntaxUID
    kind = syntax.name if syntax.type == "Transfer Syntax" else "of an unknown kind"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused(f"DICOM compression {kind} is not supported", _EXPORT) from None
    if not syntax.is_encapsulated:
        size = int(dataset.Columns) * int(dataset.Rows) * samples
        expected = -(-size * allocated // 8)
        if colour == "YBR_FULL_422":  # two pixels share their colour
            expected = size // 3 * 2
        # Of a longer value, pydicom takes the beginning or makes several frames.
        if len(dataset.PixelData) > expected + expected % 2:
            raise _contradiction("PixelData", "Rows x Columns (the data is longer)")
        return
    if not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise Refused(f"no decoder for {kind} is installed ({missing})", f"install one, or {_EXPORT}")
    if high != bits - 1:
        raise _contradiction("BitsStored", "HighBit")


def _check_codestream(dataset: Dataset) -> int:
    """Compare the compressed data with the header, because a decoder believes the former. Return its bits per value."""
    from pydicom.encaps import generate_frames
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes, RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return int(dataset.BitsAllocated)
    frame = bytes(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    pixels = int(dataset.Rows) * int(dataset.Columns)
    jpeg2000 = syntax in JPEG2000TransferSyntaxes or syntax.startswith(_HTJ2K)
    if pixels * int(dataset.SamplesPerPixel) > (_MAX_JPEG2000_VALUES if jpeg2000 else _MAX_COMPRESSED_VALUES):
        raise Refused(f"{syntax.name} DICOM of a size that takes too long to decode", "decompress the file")
    if syntax == RLELossless:
        _check_rle(frame, pixels, int(dataset.SamplesPerPixel) * -(-int(dataset.BitsAllocated) // 8))
        return int(dataset.BitsAllocated)
    if not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise Refused("truncated DICOM (the compressed data has no end marker)")
    if syntax in (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes):
        bits, height, width, components = jpeg_header(frame)
        if syntax in (_JPEG_BASELINE, _JPEG_EXTENDED) and bits == 8:
            image = read_container(frame)
            if image is None:
                raise Refused("damaged DICOM (the compressed data is not JPEG)")
            check_size(*image.size, pixels)
            decode(image)
    elif jpeg2000:
        bits, height, width, components = _jpeg2000_header(frame)
    else:
        raise Refused(f"DICOM compression {syntax.name} is not supported", _EXPORT)
    for found, name in ((height, "Rows"), (width, "Columns"), (components, "SamplesPerPixel")):
        if found != int(dataset[name].value):
            expected = int(dataset[name].value)
            raise Refused(f"DICOM with {name} {expected}, but {found} in its compressed data", COPY_AGAIN)
    if not jpeg2000 and int(dataset.BitsAllocated) > 16:  # GDCM ends the process
        raise Refused(
            f"DICOM with BitsAllocated {int(dataset.BitsAllocated)}, but JPEG has at most 16 bits", COPY_AGAIN
        )
    if bits > int(dataset.BitsAllocated):
        reason = f"DICOM with BitsAllocated {int(dataset.BitsAllocated)}, but {bits} bits in its compressed data"
        raise Refused(reason, COPY_AGAIN)
    return bits


_JPEG_BASELINE, _JPEG_EXTENDED, _HTJ2K = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.20"


def _jpeg2000_header(frame: bytes) -> tuple[int, int, int, int]:
    """Return bits, height, width and components of a JPEG 2000 codestream (ITU-T T.800, A.5.1)."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or start + 42 > len(frame):
        raise Refused("damaged DICOM (no JPEG 2000 header in its compressed data)")
    right, bottom, left, top, across, down, x0, y0, number = struct.unpack_from(">8IH", frame, start + 8)
    if not across or not down or -(-(right - x0) // across) * -(-(bottom - y0) // down) > 65_535:
        raise Refused("damaged DICOM (tiles in its JPEG 2000 data)")
    depths, steps = frame[start + 42 :: 3][:number], frame[start + 43 : start + 42 + 3 * number]
    if len(set(depths)) != 1 or set(steps[0::3] + steps[1::3]) != {1}:
        raise Refused("DICOM with subsampled or unequal components in its JPEG 2000 data is not supported", _EXPORT)
    return (depths[0] & 0x7F) + 1, bottom - top, right - left, number


def _check_rle(frame: bytes, pixels: int, segments: int) -> None:
    """Check the segments of a run-length encoded frame, and what they expand to (PS3.5, annex G)."""
    number, *starts = struct.unpack_from("<16I", frame)
    if number != segments:
        raise Refused(f"DICOM with {number} run-length segments in its compressed data, expected {segments}")
    bounds = [*starts[:number], len(frame)]
    for start, end in itertools.pairwise(bounds):
        if not 64 <= start <= end <= len(frame):
            raise Refused("truncated DICOM (run-length segments)")
        size, position = pixels if (end - start) * 64 <= _MAX_EXPANSION else 0, start
        while position < end and size < pixels + 256 and (end - start) * 64 > _MAX_EXPANSION:
            code = frame[position]
            size += code + 1 if code < 128 else 257 - code if code > 128 else 0
            position += code + 2 if code < 128 else 2 if code > 128 else 1
        if not pixels <= size < pixels + 256:
            raise Refused("damaged DICOM (run-length segments do not give the number of pixels)")


# --- Rendering --------------------------------------------------------------------------------------------------------


def _decode_pixels(dataset: Dataset, bits: int) -> np.ndarray:
    """Return the stored values (rows, columns) with all `bits`, or the RGB values (rows, columns, 3)."""
    from pydicom.pixels import pixel_array

    try:
        stored = pixel_array(dataset, bits_stored=max(bits, int(dataset.BitsStored)))
    except RuntimeError:
        kind = dataset.file_meta.TransferSyntaxUID.name
        reason = f"no installed decoder can read this {kind} image of {int(dataset.BitsStored)} bits"
        raise Refused(f"{reason}, or it is damaged", _EXPORT) from None
    if stored.shape[:2] != (dataset.Rows, dataset.Columns):  # pydicom takes surplus data for further frames
        raise _contradiction("Rows", "PixelData")
    return stored


def _by_level(stored: np.ndarray, render_levels: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return `render_levels(levels, present)` for each pixel.

    Up to 16 bits, all possible values are rendered once. That takes little time and memory even for large images.
    """
    if stored.dtype.itemsize > 2:
        return render_levels(stored, np.ones((), dtype=bool))
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    index = stored.astype(stored.dtype.newbyteorder("="), copy=False).view(unsigned)
    levels = np.arange(2 ** (8 * unsigned.itemsize), dtype=unsigned)
    present = np.zeros(len(levels), dtype=bool)
    present[index] = True
    return render_levels(levels.view(f"{stored.dtype.kind}{unsigned.itemsize}"), present)[index]


def _without_unused_bits(dataset: Dataset, levels: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return values of BitsStored bits, with their sign. The bits above and below may hold overlays."""
    allocated, bits, high = int(dataset.BitsAllocated), int(dataset.BitsStored), int(dataset.HighBit)
    if allocated in (1, bits):
        return levels
    values = (levels << (allocated - 1 - high)) >> (allocated - bits)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated and ((values != levels) & present).any():
        raise Refused(f"DICOM with BitsStored {bits}, but larger values in its compressed data", _EXPORT)
    return values


def _grey(dataset: Dataset, levels: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the displayed grey (N) uint8 of stored values (N). `present` marks those that occur."""
    stored = _without_unused_bits(dataset, levels, present)
    padding = _padding(dataset, levels, stored)
    shown = _voi(dataset, _modality(dataset, stored), present & ~padding)
    if _inverted(dataset):
        np.subtract(255, shown, out=shown)
    shown[padding] = 0
    return shown


def _padding(dataset: Dataset, levels: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Return which stored values are padding (PS3.3 C.7.5.1.1.2)."""
    values = _numbers(dataset, "PixelPaddingValue")
    limits = _numbers(dataset, "PixelPaddingRangeLimit")
    if not values:
        if limits:
            raise Refused("DICOM with PixelPaddingRangeLimit, but without PixelPaddingValue", _EXPORT)
        return np.zeros(stored.shape, dtype=bool)
    # Some writers store a negative value as unsigned, or the reverse.
    modulus, lowest = 2 ** max(16, int(dataset.BitsAllocated)), 0
    if dataset.PixelRepresentation == 1:
        lowest = -modulus // 2
    ends = (values[0], (limits or values)[0])
    wrapped = [(int(value) - lowest) % modulus + lowest for value in ends]
    if (ends[0] - ends[1]) * (wrapped[0] - wrapped[1]) < 0:  # one end has the wrong sign, which turns the range over
        raise _contradiction("PixelPaddingRangeLimit", "PixelPaddingValue")
    first, last = sorted(wrapped)
    return ((stored >= first) & (stored <= last)) | ((levels >= first) & (levels <= last))


def _modality(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Apply the modality look-up table, or the rescale slope and intercept (PS3.3 C.11.1)."""
    slopes, intercepts = _numbers(dataset, "RescaleSlope"), _numbers(dataset, "RescaleIntercept")
    if (slopes or intercepts) and _value(dataset, "ModalityLUTSequence"):
        raise _contradiction("ModalityLUTSequence", "RescaleSlope or RescaleIntercept")
    if (entries := modality_table(dataset, stored)) is not None:
        return entries
    if bool(slopes) != bool(intercepts):
        raise Refused(
            f"DICOM without Rescale{'Slope' if intercepts else 'Intercept'}", f"correct the header, or {_EXPORT}"
        )
    if not slopes:
        return stored
    if slopes[0] == 0:
        raise Refused("DICOM with RescaleSlope 0", f"correct the header, or {_EXPORT}")
    values = stored * slopes[0]
    values += intercepts[0]
    return values


def _voi(dataset: Dataset, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Apply the VOI look-up table or the first window, else the range of the visible values (PS3.3 C.11.2)."""
    if items := _value(dataset, "VOILUTSequence"):
        entries, bits = _look_up(dataset, items[0], values, "VOILUTSequence")
        return stretch(entries, 0, 2**bits - 1)
    centres, widths = _numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth")
    if len(centres) != len(widths):
        raise _contradiction("WindowCenter", "WindowWidth")
    # Some writers store zeros if they have no window.
    if not centres or (centres[0], widths[0]) == (0, 0):
        range_ = values[np.broadcast_to(visible, values.shape)]
        return (
            stretch(values, float(range_.min()), float(range_.max())) if range_.size else np.zeros(values.shape, "u1")
        )
    function = str(_value(dataset, "VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Refused("DICOM with an unknown VOILUTFunction", _EXPORT)
    if widths[0] <= 0 or (function == "LINEAR" and widths[0] < 1):
        least = "at least 1" if function == "LINEAR" else "more than 0"
        reason = f"DICOM with WindowWidth {widths[0]:g}; with VOILUTFunction {function}, it must be {least}"
        raise Refused(reason, f"correct the header, or {_EXPORT}")
    return np.round(_window(values, centres[0], widths[0], function) * 255).astype(np.uint8)


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window to the values and return them in [0, 1] (DICOM PS3.3 C.11.2.1.2.1 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _inverted(dataset: Dataset) -> bool:
    """Return whether the smallest value is white (PS3.3 C.7.6.3.1.2 and C.11.6.1.2)."""
    colour, shape = dataset.PhotometricInterpretation, _value(dataset, "PresentationLUTShape")
    if shape not in (None, "IDENTITY", "INVERSE"):
        raise Refused("DICOM with an unknown PresentationLUTShape", _EXPORT)
    if colour == "MONOCHROME1" and shape == "IDENTITY":
        raise _contradiction("PhotometricInterpretation MONOCHROME1", "PresentationLUTShape IDENTITY")
    return colour == "MONOCHROME1" or shape == "INVERSE"


def _look_up(dataset: Dataset, item: Dataset, values: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """Return the entries of a look-up table for values, and the bits of an entry (PS3.3 C.11.1.1.1, C.11.2.1.1)."""
    return _entries(
        values,
        _numbers(item, "LUTDescriptor"),
        _value(item, "LUTData"),
        f"LUTDescriptor or LUTData in its {name}",
        # A rescaled value may be negative although the stored values are unsigned.
        signed=dataset.PixelRepresentation == 1 or bool(values.min(initial=0) < 0),
        big_endian=not dataset.file_meta.TransferSyntaxUID.is_little_endian,
    )


def _entries(
    values: np.ndarray, descriptor: list[float], data: Any, name: str, *, signed: bool, big_endian: bool
) -> tuple[np.ndarray, int]:
    invalid = Refused(f"DICOM with an invalid {name}", _EXPORT)
    if len(descriptor) != 3 or data is None:
        raise invalid
    number, first, bits = int(descriptor[0]) % 2**16 or 2**16, int(descriptor[1]), int(descriptor[2])
    if signed and first >= 2**15:  # written as unsigned
        first -= 2**16
    if isinstance(data, bytes):
        if 2 * number <= len(data) <= 2 * number + 1:
            table = np.frombuffer(data, ">u2" if big_endian else "<u2", number)
        elif number <= len(data) <= number + 1 and bits == 8:
            table = np.frombuffer(data, np.uint8, number)
        else:
            raise invalid
    else:
        table = np.asarray(data if isinstance(data, Sequence) else [data], dtype=np.int64) % 2**16
    if len(table) != number or not 8 <= bits <= 16 or table.max() >= 2**bits:
        raise invalid
    return table.astype(np.int32)[
        np.clip(np.rint(values, dtype=np.float64) - first, 0, number - 1).astype(np.int64)
    ], bits


def _check_segments(data: Any, name: str, bits: int) -> None:
    """Refuse a segmented table that would expand to more than 65,536 entries (PS3.3 C.7.9.2)."""
    words = np.frombuffer(bytes(data or b""), np.uint8 if bits == 8 else "<u2").tolist()
    position = total = 0
    while position + 1 < len(words):
        code, length = words[position], words[position + 1]
        if code not in (0, 1):  # an indirect segment repeats others, in each other without end
            raise Refused(f"DICOM with indirect segments in its {name} is not supported", _EXPORT)
        position += 2 + (length if code == 0 else 1)
        total += length
    if total > 2**16:
        raise Refused(f"DICOM with an invalid {name}", _EXPORT)


def _palette(dataset: Dataset, levels: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the colours (N, 3) uint8 of stored values (N) (PS3.3 C.7.6.3.1.5 and C.7.6.3.1.6)."""
    from pydicom.pixels import apply_color_lut

    stored = _without_unused_bits(dataset, levels, present)
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    descriptors = [_numbers(dataset, f"{name}Descriptor") for name in names]
    if any(len(descriptor) != 3 for descriptor in descriptors) or len({tuple(d) for d in descriptors}) != 1:
        raise Refused("DICOM with missing or unequal PaletteColorLookupTableDescriptors", _EXPORT)
    number, _, bits = descriptors[0]
    if bits not in (8, 16):
        raise Refused(f"DICOM with {bits:g} bits in its RedPaletteColorLookupTableDescriptor", _EXPORT)
    if f"Segmented{names[0]}Data" in dataset and f"{names[0]}Data" not in dataset:
        if bits == 8 and not 0 < number <= 256:
            raise Refused("DICOM with a long SegmentedRedPaletteColorLookupTableData is not supported", _EXPORT)
        for name in names:
            _check_segments(_value(dataset, f"Segmented{name}Data"), f"Segmented{name}Data", int(bits))
        colours = apply_color_lut(stored.astype(np.int32), dataset)[..., :3]
        return stretch(colours, 0, 2**bits - 1)
    tables = [
        _entries(
            stored,
            descriptor,
            _value(dataset, f"{name}Data"),
            f"{name}Descriptor or {name}Data",
            signed=dataset.PixelRepresentation == 1,
            big_endian=not dataset.file_meta.TransferSyntaxUID.is_little_endian,
        )[0]
        for name, descriptor in zip(names, descriptors, strict=True)
    ]
    return stretch(np.stack(tables, axis=-1), 0, 2**bits - 1)

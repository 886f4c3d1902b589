"""Render single DICOM images as 8-bit grey or RGB, as the standard prescribes.

Grey values pass through the modality transformation (look-up table, or rescale slope and intercept), the VOI
transformation (look-up table, or the first window) and the presentation (MONOCHROME1 and PresentationLUTShape). See
DICOM PS3.3 C.7.6.3 and C.11.1 to C.11.6. Enhanced images have rescale and window in their functional groups. A file
that contradicts itself is refused with the names of the fields. Overlays, curves and colour profiles are not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from preceptor.data.dicom_header import (
    EXPORT,
    apply_functional_groups,
    check_header,
    contradiction,
    named_errors,
    numbers_of,
    parse,
    value_of,
)
from preceptor.data.dicom_pixels import check_codestream, decode_pixels
from preceptor.data.image_structure import Refused

if TYPE_CHECKING:
    from pydicom import Dataset


def render(data: bytes, max_pixels: int) -> np.ndarray:
    """Return the image of a DICOM file as (rows, columns) or (rows, columns, 3) uint8.

    Without a window or VOI look-up table, the smallest and largest value become 0 and 255. Padding is black, and not
    counted for that range.

    Raises:
        Refused: the file is broken, too large, has several frames, contradicts itself, or is of a kind that is not
            supported. No value of the header is quoted.
    """
    with named_errors():
        dataset = parse(data)
        check_header(dataset, max_pixels)
        apply_functional_groups(dataset)
        stored = decode_pixels(dataset, check_codestream(dataset))
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
    check_header(dataset, max_pixels)
    pixels = decode_pixels(dataset, check_codestream(dataset))
    stored = _without_unused_bits(dataset, pixels, np.ones((), dtype=bool))
    return stored, _padding(dataset, pixels, stored)


def modality_table(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Return the entries of the modality look-up table for stored values, or None if there is no table.

    Raises:
        Refused: the table is invalid.
    """
    items = value_of(dataset, "ModalityLUTSequence")
    return _look_up(dataset, items[0], stored, "ModalityLUTSequence")[0] if items else None


def size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return the columns and rows of a DICOM image without decoding it. Raises Refused as `render`."""
    with named_errors():
        dataset = parse(data)
        check_header(dataset, max_pixels)
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
        raise Refused(f"DICOM with BitsStored {bits}, but larger values in its compressed data", EXPORT)
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
    values = numbers_of(dataset, "PixelPaddingValue")
    limits = numbers_of(dataset, "PixelPaddingRangeLimit")
    if not values:
        if limits:
            raise Refused("DICOM with PixelPaddingRangeLimit, but without PixelPaddingValue", EXPORT)
        return np.zeros(stored.shape, dtype=bool)
    # Some writers store a negative value as unsigned, or the reverse.
    modulus, lowest = 2 ** max(16, int(dataset.BitsAllocated)), 0
    if dataset.PixelRepresentation == 1:
        lowest = -modulus // 2
    ends = (values[0], (limits or values)[0])
    wrapped = [(int(value) - lowest) % modulus + lowest for value in ends]
    if (ends[0] - ends[1]) * (wrapped[0] - wrapped[1]) < 0:  # one end has the wrong sign, which turns the range over
        raise contradiction("PixelPaddingRangeLimit", "PixelPaddingValue")
    first, last = sorted(wrapped)
    return ((stored >= first) & (stored <= last)) | ((levels >= first) & (levels <= last))


def _modality(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Apply the modality look-up table, or the rescale slope and intercept (PS3.3 C.11.1)."""
    slopes, intercepts = numbers_of(dataset, "RescaleSlope"), numbers_of(dataset, "RescaleIntercept")
    if (slopes or intercepts) and value_of(dataset, "ModalityLUTSequence"):
        raise contradiction("ModalityLUTSequence", "RescaleSlope or RescaleIntercept")
    if (entries := modality_table(dataset, stored)) is not None:
        return entries
    if bool(slopes) != bool(intercepts):
        raise Refused(
            f"DICOM without Rescale{'Slope' if intercepts else 'Intercept'}", f"correct the header, or {EXPORT}"
        )
    if not slopes:
        return stored
    if slopes[0] == 0:
        raise Refused("DICOM with RescaleSlope 0", f"correct the header, or {EXPORT}")
    values = stored * slopes[0]
    values += intercepts[0]
    return values


def _voi(dataset: Dataset, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Apply the VOI look-up table or the first window, else the range of the visible values (PS3.3 C.11.2)."""
    if items := value_of(dataset, "VOILUTSequence"):
        entries, bits = _look_up(dataset, items[0], values, "VOILUTSequence")
        return stretch(entries, 0, 2**bits - 1)
    centres, widths = numbers_of(dataset, "WindowCenter"), numbers_of(dataset, "WindowWidth")
    if len(centres) != len(widths):
        raise contradiction("WindowCenter", "WindowWidth")
    # Some writers store zeros if they have no window.
    if not centres or (centres[0], widths[0]) == (0, 0):
        range_ = values[np.broadcast_to(visible, values.shape)]
        return (
            stretch(values, float(range_.min()), float(range_.max())) if range_.size else np.zeros(values.shape, "u1")
        )
    function = str(value_of(dataset, "VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Refused("DICOM with an unknown VOILUTFunction", EXPORT)
    if widths[0] <= 0 or (function == "LINEAR" and widths[0] < 1):
        least = "at least 1" if function == "LINEAR" else "more than 0"
        reason = f"DICOM with WindowWidth {widths[0]:g}; with VOILUTFunction {function}, it must be {least}"
        raise Refused(reason, f"correct the header, or {EXPORT}")
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
    colour, shape = dataset.PhotometricInterpretation, value_of(dataset, "PresentationLUTShape")
    if shape not in (None, "IDENTITY", "INVERSE"):
        raise Refused("DICOM with an unknown PresentationLUTShape", EXPORT)
    if colour == "MONOCHROME1" and shape == "IDENTITY":
        raise contradiction("PhotometricInterpretation MONOCHROME1", "PresentationLUTShape IDENTITY")
    return colour == "MONOCHROME1" or shape == "INVERSE"


def _look_up(dataset: Dataset, item: Dataset, values: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """Return the entries of a look-up table for values, and the bits of an entry (PS3.3 C.11.1.1.1, C.11.2.1.1)."""
    return _entries(
        values,
        numbers_of(item, "LUTDescriptor"),
        value_of(item, "LUTData"),
        f"LUTDescriptor or LUTData in its {name}",
        # A rescaled value may be negative although the stored values are unsigned.
        signed=dataset.PixelRepresentation == 1 or bool(values.min(initial=0) < 0),
        big_endian=not dataset.file_meta.TransferSyntaxUID.is_little_endian,
    )


def _entries(
    values: np.ndarray, descriptor: list[float], data: Any, name: str, *, signed: bool, big_endian: bool
) -> tuple[np.ndarray, int]:
    invalid = Refused(f"DICOM with an invalid {name}", EXPORT)
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
            raise Refused(f"DICOM with indirect segments in its {name} is not supported", EXPORT)
        position += 2 + (length if code == 0 else 1)
        total += length
    if total > 2**16:
        raise Refused(f"DICOM with an invalid {name}", EXPORT)


def _palette(dataset: Dataset, levels: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the colours (N, 3) uint8 of stored values (N) (PS3.3 C.7.6.3.1.5 and C.7.6.3.1.6)."""
    from pydicom.pixels import apply_color_lut

    stored = _without_unused_bits(dataset, levels, present)
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    descriptors = [numbers_of(dataset, f"{name}Descriptor") for name in names]
    if any(len(descriptor) != 3 for descriptor in descriptors) or len({tuple(d) for d in descriptors}) != 1:
        raise Refused("DICOM with missing or unequal PaletteColorLookupTableDescriptors", EXPORT)
    number, _, bits = descriptors[0]
    if bits not in (8, 16):
        raise Refused(f"DICOM with {bits:g} bits in its RedPaletteColorLookupTableDescriptor", EXPORT)
    if f"Segmented{names[0]}Data" in dataset and f"{names[0]}Data" not in dataset:
        if bits == 8 and not 0 < number <= 256:
            raise Refused("DICOM with a long SegmentedRedPaletteColorLookupTableData is not supported", EXPORT)
        for name in names:
            _check_segments(value_of(dataset, f"Segmented{name}Data"), f"Segmented{name}Data", int(bits))
        return _to_8_bit(apply_color_lut(stored.astype(np.int32), dataset)[..., :3], int(bits))
    tables = [
        _entries(
            stored,
            descriptor,
            value_of(dataset, f"{name}Data"),
            f"{name}Descriptor or {name}Data",
            signed=dataset.PixelRepresentation == 1,
            big_endian=not dataset.file_meta.TransferSyntaxUID.is_little_endian,
        )[0]
        for name, descriptor in zip(names, descriptors, strict=True)
    ]
    return _to_8_bit(np.stack(tables, axis=-1), int(bits))


def _to_8_bit(colours: np.ndarray, bits: int) -> np.ndarray:
    """Return palette entries of `bits` as uint8. A palette of 8-bit values that states 16 would be black."""
    if bits == 16 and colours.max(initial=0) < 256:
        raise Refused(
            "DICOM with 16 bits in its RedPaletteColorLookupTableDescriptor, but only values below 256 in its palette",
            f"correct the header, or {EXPORT}",
        )
    return stretch(colours, 0, 2**bits - 1)

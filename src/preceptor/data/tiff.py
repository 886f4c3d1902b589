"""Check the directory, the fields and the strips or tiles of a TIFF file (TIFF 6.0) before a decoder sees them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

from preceptor.data.image_structure import (
    SAVE_AS_PNG,
    SAVE_FRAMES,
    TYPE_BYTES,
    Container,
    Part,
    Refused,
    directory,
    inflated_size,
    orientation_of,
)

# Tags of TIFF 6.0 that say how pixels are stored, with their defaults.
_DEFAULTS = {
    "BitsPerSample": (258, (1,)),
    "Compression": (259, (1,)),
    "FillOrder": (266, (1,)),
    "PhotometricInterpretation": (262, ()),
    "SamplesPerPixel": (277, (1,)),
    "PlanarConfiguration": (284, (1,)),
    "ColorMap": (320, ()),
    "SampleFormat": (339, (1,)),
    "ExtraSamples": (338, ()),
}
# Fax coding (2 to 4) tells neither the number of bytes nor whether a row is damaged.
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits"}


def _long_values(data: bytes, order: str, entries: dict[int, tuple[int, int, int]], tag: int) -> list[int]:
    kind, count, offset = entries.get(tag, (4, 0, 0))
    code = {3: "H", 4: "I"}.get(kind)
    return list(struct.unpack_from(f"{order}{count}{code}", data, offset)) if code and count else []


def read_tiff(data: bytes) -> Container:
    """Check the directory, the fields and the strips or tiles of a TIFF file (TIFF 6.0)."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    frames = _frames(data, order, start)
    if frames > 1:
        raise Refused(f"TIFF with {frames} frames; only single images are read", SAVE_FRAMES)
    (number,) = struct.unpack_from(f"{order}H", data, start)
    entries: dict[int, tuple[int, int, int]] = {}
    total = 0
    for i in range(start + 2, start + 2 + 12 * number, 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, i)
        size = TYPE_BYTES.get(kind, 1) * count
        offset = i + 8 if size <= 4 else struct.unpack_from(f"{order}I", data, i + 8)[0]
        if offset + size > len(data):
            raise Refused(f"truncated or damaged TIFF (the value of tag {tag} lies outside the file)")
        total += size
        entries[tag] = kind, count, offset
    if total > len(data):
        raise Refused("damaged TIFF (its tags overlap)")
    exif = tuple(directory(data))
    by_tag = {entry.tag: entry.integers() for entry in reversed(exif)}  # those of the first directory win
    if not by_tag.get(256) or not by_tag.get(257):
        raise Refused("damaged TIFF (no ImageWidth or ImageLength)")
    size = by_tag[256][0], by_tag[257][0]
    fields = {name: by_tag.get(tag) or default for name, (tag, default) in _DEFAULTS.items()}
    _check_fields(fields)
    bits, samples = fields["BitsPerSample"][0], fields["SamplesPerPixel"][0]
    parts = _parts(
        data,
        size,
        bits * samples,
        {tag: _long_values(data, order, entries, tag) for tag in (273, 278, 279, 322, 323, 324, 325)},
        planes=samples if fields["PlanarConfiguration"][0] == 2 else 1,
        compression=fields["Compression"][0],
    )
    return Container(
        "TIFF",
        size,
        data,
        compression=_COMPRESSIONS[fields["Compression"][0]],
        parts=parts,
        orientation=orientation_of(exif),
        bits=bits,
        channels=samples,
        # Pillow inverts up to 8 bits.
        inverted=fields["PhotometricInterpretation"][0] == 0 and bits > 8,
        unsigned=fields["SampleFormat"][0] == 1,
        fields=_listed(fields, "PhotometricInterpretation", "BitsPerSample", "SampleFormat", "SamplesPerPixel"),
        exif=exif,
    )


def _frames(data: bytes, order: str, position: int) -> int:
    visited: set[int] = set()
    while position and position not in visited and len(visited) < 1000:
        if position + 2 > len(data):
            raise Refused("truncated or damaged TIFF (a directory lies outside the file)")
        visited.add(position)
        end = position + 2 + 12 * struct.unpack_from(f"{order}H", data, position)[0]
        if end > len(data):
            raise Refused("truncated or damaged TIFF (a directory lies outside the file)")
        # Some writers end the file without the offset of the next directory.
        position = struct.unpack_from(f"{order}I", data, end)[0] if end + 4 <= len(data) else 0
    return len(visited)


def _listed(fields: dict[str, tuple[int, ...]], *names: str) -> str:
    return ", ".join(f"{name} {' '.join(map(str, fields[name][:8])) or 'missing'}" for name in names)


def _check_fields(fields: dict[str, tuple[int, ...]]) -> None:
    """Refuse fields that the decoder reads wrong or not at all."""

    def refuse(*names: str) -> None:
        raise Refused(f"TIFF with {_listed(fields, *names)} is not supported", SAVE_AS_PNG)

    bits, formats, samples = fields["BitsPerSample"], fields["SampleFormat"], fields["SamplesPerPixel"][0]
    colour = fields["PhotometricInterpretation"]
    if fields["Compression"][0] not in _COMPRESSIONS:
        refuse("Compression")
    if fields["FillOrder"] != (1,):
        refuse("FillOrder")
    if len(set(bits)) > 1 or len(bits) not in (1, samples):
        refuse("BitsPerSample", "SamplesPerPixel")
    if len(set(formats)) > 1 or formats[0] not in (1, 2, 3) or (formats[0] != 1 and (samples > 1 or bits[0] < 16)):
        refuse("BitsPerSample", "SampleFormat")
    if colour not in ((0,), (1,), (2,), (3,), (5,)):
        refuse("PhotometricInterpretation")
    if samples > 1 and bits[0] > 8 and (colour != (2,) or bits[0] != 16 or fields["PlanarConfiguration"][0] != 1):
        refuse("PhotometricInterpretation", "BitsPerSample", "PlanarConfiguration")
    if bits[0] > 8 and samples not in (1, 3, 4):
        refuse("SamplesPerPixel", "BitsPerSample")
    extra = fields["ExtraSamples"]
    if samples > {2: 3, 5: 4}.get(colour[0], 1) and (not extra or extra[0] > 2 or (bits[0] == 16 and extra[0] == 1)):
        refuse("SamplesPerPixel", "BitsPerSample", "ExtraSamples")
    # A palette of 8-bit values, as old writers stored it, would be black.
    if colour == (3,) and max(fields["ColorMap"], default=0) < 256:
        refuse("ColorMap")


def _parts(
    data: bytes, size: tuple[int, int], pixel_bits: int, layout: dict[int, list[int]], *, planes: int, compression: int
) -> tuple[Part, ...]:
    """Return all strips or tiles. Refuse a file in which their number or place is not as its fields imply."""
    width, height = size
    row_bits = pixel_bits // planes
    if layout[324]:
        across, down = layout[322][0] if layout[322] else 0, layout[323][0] if layout[323] else 0
        if not across or not down or across > width + 4096 or down > height + 4096:
            raise Refused("damaged TIFF (TileWidth or TileLength)")
        offsets, lengths = layout[324], layout[325]
        expected = [down * -(-across * row_bits // 8)] * (-(-width // across) * -(-height // down))
    else:
        down = min(layout[278][0] if layout[278] else height, height)
        if not down:
            raise Refused("damaged TIFF (RowsPerStrip)")
        offsets, lengths = layout[273], layout[279]
        expected = [min(down, height - top) * -(-width * row_bits // 8) for top in range(0, height, down)]
        if not lengths and len(offsets) == 1 and compression == 1:
            lengths = expected  # an optional field of old writers
    expected *= planes
    if len(offsets) != len(expected) or len(lengths) != len(offsets):
        raise Refused(f"truncated or damaged TIFF ({len(offsets)} of {len(expected)} strips or tiles)")
    if any(offset + length > len(data) for offset, length in zip(offsets, lengths, strict=True)):
        raise Refused("truncated TIFF (a strip or tile lies outside the file)")
    return tuple(zip(offsets, lengths, expected, strict=True))


# --- Number of bytes that a strip or tile expands to ------------------------------------------------------------------


def check_parts(container: Container) -> None:
    """Count the bytes of all strips or tiles, because the decoder skips surplus data, and most have no checksum.

    Raises:
        Refused: a strip or tile is damaged, does not end, or has less or more bytes than the fields of the file imply.
    """
    view, expand = memoryview(container.pixels), _EXPANDED_SIZE[container.compression]
    for offset, length, expected in container.parts:
        size = expand(view[offset : offset + length], expected)
        if size is None:
            raise Refused(f"truncated or damaged TIFF (a strip or tile of {container.compression} does not end)")
        if size != expected:
            kind = "truncated" if size < expected else "damaged"
            found = f"{size:,}" if size < expected else "more"
            raise Refused(f"{kind} TIFF ({found} of {expected:,} bytes of pixels in a strip or tile)")


def _stored_size(data: memoryview, limit: int) -> int:
    return limit if limit < len(data) < limit + _ALIGNMENT else len(data)


def _deflate_size(data: memoryview, limit: int) -> int | None:
    try:
        return inflated_size([data], limit)
    except zlib.error:
        raise Refused("damaged TIFF (wrong checksum or code of a strip or tile)") from None


def packbits_size(data: bytes | memoryview, limit: int) -> int:
    """Return the number of bytes that run lengths expand to (TIFF 6.0, section 9; DICOM PS3.5, annex G).

    A number above `limit` means that there are more.
    """
    size = position = 0
    while position < len(data) and size <= limit:
        code = data[position]
        size += code + 1 if code < 128 else 257 - code if code > 128 else 0
        position += code + 2 if code < 128 else 2 if code > 128 else 1
    # A literal run that is cut has fewer bytes than it says.
    return size - max(0, position - len(data))


_CLEAR, _END, _FIRST = 256, 257, 258  # LZW: the codes that clear the table and end the data, and the first of the table
_NUMBERS = np.arange(4096 - _FIRST)  # of codes after the last clear code; the table is full then
_WIDTHS = 9 + np.searchsorted([253, 765, 1789], _NUMBERS)  # bits; the table grows with each code but the first
_STARTS = np.concatenate([[0], np.cumsum(_WIDTHS)])  # bits


def _lzw_size(data: memoryview, limit: int) -> int | None:
    """Return the number of bytes that LZW codes expand to (TIFF 6.0, section 13), or None if they do not end.

    The place and width of each code depend only on the number of codes since the last clear code. Code number i adds
    to the table the string of code i - 1 and one more byte.
    """
    padded = np.frombuffer(bytes(data) + bytes(3), np.uint8)
    size, bit = 0, 0
    while size <= limit:
        number = int(np.searchsorted(_STARTS, 8 * len(data) - bit, "right")) - 1
        places = _STARTS[:number] + bit % 8
        window = padded[bit // 8 : bit // 8 + int(_STARTS[-1]) // 8 + 4].astype(np.uint32)
        words = window[:-2] << 16 | window[1:-1] << 8 | window[2:]
        widths = _WIDTHS[:number].astype(np.uint32)
        codes = words[places >> 3] >> (24 - (places & 7).astype(np.uint32) - widths) & ((1 << widths) - 1)
        stops = (codes == _CLEAR) | (codes == _END)
        if not stops.any():
            return None
        count = int(stops.argmax())
        # The code whose string is one byte shorter; `count` stands for none.
        shorter = np.append(codes[:count].astype(np.int64) - _FIRST, count)
        if (shorter[:count] >= _NUMBERS[:count]).any():
            return None
        shorter[shorter < 0] = count
        lengths = (np.arange(count + 1) < count).astype(np.int64)
        while (more := lengths[shorter]).any():  # twice as many steps each time
            lengths += more
            shorter = shorter[shorter]
        size += int(lengths.sum())
        if codes[count] == _END:
            return size
        bit += int(_STARTS[count + 1])
    return size


_ALIGNMENT = 4  # some writers fill a strip with up to three bytes
_EXPANDED_SIZE: dict[str, Callable[[memoryview, int], int | None]] = {
    "none": _stored_size,
    "LZW": _lzw_size,
    "Deflate": _deflate_size,
    "PackBits": packbits_size,
}

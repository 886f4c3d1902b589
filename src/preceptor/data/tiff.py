"""Check the directory, the fields and the strips or tiles of a TIFF file (TIFF 6.0) before a decoder sees them."""

from __future__ import annotations

import struct
import zlib

from preceptor.data.structure import (
    SAVE_AS_PNG,
    SAVE_FRAMES,
    TYPE_BYTES,
    Container,
    Refused,
    directory,
    orientation_of,
)

# Tags of TIFF 6.0 that say how pixels are stored, with their defaults.
_TIFF_DEFAULTS = {
    "BitsPerSample": (258, (1,)),
    "Compression": (259, (1,)),
    "PhotometricInterpretation": (262, ()),
    "SamplesPerPixel": (277, (1,)),
    "PlanarConfiguration": (284, (1,)),
    "ColorMap": (320, ()),
    "SampleFormat": (339, (1,)),
    "ExtraSamples": (338, ()),
}
_TIFF_COMPRESSIONS = {1: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 8: "Deflate", 32773: "PackBits"}
_TIFF_COMPRESSIONS[32946] = "Deflate"


def _long_values(data: bytes, order: str, entries: dict[int, tuple[int, int, int]], tag: int) -> list[int]:
    kind, count, offset = entries.get(tag, (4, 0, 0))
    code = {3: "H", 4: "I"}.get(kind)
    return list(struct.unpack_from(f"{order}{count}{code}", data, offset)) if code and count else []


def read_tiff(data: bytes) -> Container:
    """Check the directory, the fields and the strips or tiles of a TIFF file (TIFF 6.0)."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    frames = _tiff_frames(data, order, start)
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
    fields = {name: by_tag.get(tag) or default for name, (tag, default) in _TIFF_DEFAULTS.items()}
    _check_tiff_fields(fields)
    bits, samples = fields["BitsPerSample"][0], fields["SamplesPerPixel"][0]
    _check_tiff_pixels(
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
        orientation=orientation_of(exif),
        bits=bits,
        channels=samples,
        # Pillow inverts up to 8 bits.
        inverted=fields["PhotometricInterpretation"][0] == 0 and bits > 8,
        unsigned=fields["SampleFormat"][0] == 1,
        fields=_listed(fields, "PhotometricInterpretation", "BitsPerSample", "SampleFormat", "SamplesPerPixel"),
        exif=exif,
    )


def _tiff_frames(data: bytes, order: str, position: int) -> int:
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


def _check_tiff_fields(fields: dict[str, tuple[int, ...]]) -> None:
    """Refuse fields that the decoder reads wrong or not at all."""

    def refuse(*names: str) -> None:
        raise Refused(f"TIFF with {_listed(fields, *names)} is not supported", SAVE_AS_PNG)

    bits, formats, samples = fields["BitsPerSample"], fields["SampleFormat"], fields["SamplesPerPixel"][0]
    colour = fields["PhotometricInterpretation"]
    if fields["Compression"][0] not in _TIFF_COMPRESSIONS:
        refuse("Compression")
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


def _check_tiff_pixels(
    data: bytes, size: tuple[int, int], pixel_bits: int, layout: dict[int, list[int]], *, planes: int, compression: int
) -> None:
    """Check that all strips or tiles are there and inside the file, and the checksums of deflated ones."""
    width, height = size
    if layout[324]:
        across, down = layout[322][0] if layout[322] else 0, layout[323][0] if layout[323] else 0
        if not across or not down or across > width + 4096 or down > height + 4096:
            raise Refused("damaged TIFF (TileWidth or TileLength)")
        offsets, lengths = layout[324], layout[325]
        expected = -(-width // across) * -(-height // down)
    else:
        across, down = width, min(layout[278][0] if layout[278] else height, height)
        if not down:
            raise Refused("damaged TIFF (RowsPerStrip)")
        offsets, lengths = layout[273], layout[279]
        expected = -(-height // down)
        if not lengths and len(offsets) == 1 and compression == 1:
            lengths = [height * -(-width * pixel_bits // 8)]  # an optional field of old writers
    if len(offsets) < expected * planes or len(lengths) != len(offsets):
        raise Refused(f"truncated or damaged TIFF ({len(offsets)} of {expected * planes} strips or tiles)")
    if any(offset + length > len(data) for offset, length in zip(offsets, lengths, strict=True)):
        raise Refused("truncated TIFF (a strip or tile lies outside the file)")
    strip_bytes = down * -(-across * (pixel_bits // planes) // 8)
    if compression == 1 and not layout[324]:
        needed = planes * height * -(-width * (pixel_bits // planes) // 8)
        if sum(lengths) < needed:
            raise Refused(f"truncated TIFF ({sum(lengths):,} of {needed:,} bytes of pixels)")
    if compression in (8, 32946):
        for offset, length in zip(offsets, lengths, strict=True):
            inflate = zlib.decompressobj()
            try:
                inflate.decompress(data[offset : offset + length], strip_bytes + 1)
                inflate.decompress(inflate.unconsumed_tail, 1)
            except zlib.error:
                raise Refused("damaged TIFF (wrong checksum of a strip or tile)") from None
            if not inflate.eof:
                raise Refused("truncated or damaged TIFF (a strip or tile does not end)")

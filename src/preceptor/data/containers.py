"""Check the structure of PNG, JPEG, TIFF, BMP and WebP files before a decoder sees them.

A decoder library is lenient: it fills missing parts with grey, skips checksums and expands compressed comments. The
functions here read the markers, chunks and directories of a file, but not its pixels. They refuse a file that is
incomplete, and return the bytes that define the pixels without all others (texts, EXIF, colour profiles, thumbnails).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_PARTS = 100_000
"""Largest number of chunks or segments of a file. A PNG of 64 MiB in the usual chunks of 8 KiB has 8,192."""
MAX_SCANS = 100
"""Largest number of scans of a JPEG file. Usual encoders write 1 to 12."""
MAX_SCAN_PIXELS = 400_000_000
"""Largest number of scans times pixels of a JPEG file, because each scan visits each block of the image."""

MAX_SIDE = 65_535
"""Largest number of rows or columns, as in JPEG and DICOM. Decoders need memory for each row."""

STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""The exceptions that are no errors. A decoder written in Rust reports a failure as a BaseException that is not among
them (`pyo3_runtime.PanicException`), so that `except Exception` around a decoder is not enough."""

COPY_AGAIN = "copy the file again from its source"
_SAVE_FRAMES = "save each frame as a separate file"
_SAVE_AS_PNG = "save it as 8-bit or 16-bit PNG"


class Refused(ValueError):
    """A file that must not be decoded.

    Attributes:
        reason: What is wrong.
        fix: What the user can do.
    """

    def __init__(self, reason: str, fix: str = COPY_AGAIN):
        super().__init__(reason)
        self.reason, self.fix = reason, fix


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise Refused if an image has no pixels, too many, or sides that are too long."""
    if width < 1 or height < 1:
        raise Refused(f"{width} x {height} pixels")
    if width * height > max_pixels:
        reason = f"{width} x {height} pixels, more than the limit of {max_pixels:,}"
        raise Refused(reason, "shrink the image or raise data.max_image_pixels")
    if max(width, height) > MAX_SIDE:
        raise Refused(f"{width} x {height} pixels, a side longer than {MAX_SIDE:,}", "shrink or crop the image")


@dataclass(frozen=True)
class Container:
    """The structure of an image file.

    Attributes:
        format: Name of the format in Pillow.
        size: Width and height in pixels, as stored.
        pixels: The bytes that the decoder gets.
        orientation: EXIF orientation, 1 to 8.
        inflated: PNG only: number of bytes of the inflated image data.
        colours: PNG and BMP only: number of colours of the palette, or 0.
        shortened: Small JPEG only: the same bytes without the last byte of each scan.
        bits: Bits per channel.
        channels: Stored channels: 1 grey or palette, 2 grey and alpha, 3 colour, 4 colour and alpha (or CMYK).
        inverted: Whether the largest value is black, and the decoder does not invert it.
        unsigned: Whether integers of 32 bits are unsigned.
        fields: Names and values of the fields that say how the pixels of a TIFF are stored.
        transparent: Colour that a PNG of 16 bits declares as transparent, or ().
        exif: Directory entries of the EXIF data or TIFF file.
        comments: Names of texts in the file. The names of PNG texts are arbitrary.
    """

    format: str
    size: tuple[int, int]
    pixels: bytes
    orientation: int = 1
    shortened: bytes | None = None
    inflated: int = 0
    colours: int = 0
    bits: int = 8
    channels: int = 1
    inverted: bool = False
    unsigned: bool = False
    fields: str = ""
    transparent: tuple[int, ...] = ()
    exif: tuple[Entry, ...] = ()
    comments: frozenset[str] = frozenset()

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height in pixels after the EXIF orientation is applied."""
        width, height = self.size
        return (height, width) if self.orientation > 4 else (width, height)


class Entry(NamedTuple):
    """A directory entry of TIFF or EXIF data. `value` holds at most the first 64 KiB."""

    tag: int
    kind: int
    value: bytes
    order: str

    def integers(self) -> tuple[int, ...]:
        """Return the values of an entry of type BYTE, SHORT or LONG. Other types have none."""
        code = {1: "B", 3: "H", 4: "I"}.get(self.kind)
        if code is None:
            return ()
        number = len(self.value) // struct.calcsize(code)
        return struct.unpack_from(f"{self.order}{number}{code}", self.value)


def read_container(data: bytes) -> Container | None:
    """Return the structure of a file, or None if it has the signature of no known format.

    Raises:
        Refused: the file is incomplete, has several frames, or stores pixels in a way that is not supported.
    """
    for signature, reader in _READERS.items():
        if re.match(signature, data, re.DOTALL):
            return reader(data)
    return None


# --- PNG --------------------------------------------------------------------------------------------------------------

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_SURPLUS = 2**16  # bytes after the last row that some writers add
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def _png(data: bytes) -> Container:
    """Check all chunks of a PNG file with their checksums (W3C PNG specification, sections 5 and 11)."""
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    comments: set[str] = set()
    exif: tuple[Entry, ...] = ()
    header = b""
    parts: dict[bytes, bytes] = {}  # palette and transparency
    view, position, pixel_chunks, ended = memoryview(data), len(_PNG_SIGNATURE), 0, False
    previous = b""
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            raise Refused(f"truncated PNG ({'no image data' if not pixel_chunks else 'no IEND chunk'})")
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise Refused(f"truncated PNG (the chunk at byte {position:,} is cut)")
        body = view[position + 8 : end - 4]
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Refused(f"damaged PNG (wrong checksum of the chunk at byte {position:,})")
        if (not header) != (kind == b"IHDR"):
            raise Refused("damaged PNG (not exactly one header at the start)")
        if kind == b"IHDR":
            header = bytes(body)
        elif kind == b"IDAT":
            if pixel_chunks and previous != b"IDAT":
                raise Refused("damaged PNG (the image data is interrupted)")
            pixel_chunks += 1
            kept.append(view[position:end])
        elif kind in (b"PLTE", b"tRNS"):
            if pixel_chunks or kind in parts or (kind == b"PLTE" and b"tRNS" in parts):
                raise Refused(f"damaged PNG (a chunk {kind.decode()} that is doubled or at the wrong place)")
            parts[kind] = bytes(body)
        elif kind == b"eXIf":
            exif = tuple(directory(bytes(body)))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            comments.add(bytes(body[:80]).split(b"\0")[0].decode("latin-1"))
        elif kind == b"acTL" and length >= 4 and int.from_bytes(body[:4], "big") > 1:
            raise Refused(
                f"PNG with {int.from_bytes(body[:4], 'big')} frames; only single images are read", _SAVE_FRAMES
            )
        elif kind == b"IEND":
            ended = True
            break
        elif kind[:1].isupper():
            raise Refused(f"PNG with the unknown critical chunk {kind!r}", _SAVE_AS_PNG)
        previous, position = kind, end
    if not ended:
        raise Refused(f"PNG with more than {MAX_PARTS:,} chunks", "save it again")
    if len(header) != 13 or not pixel_chunks:
        raise Refused("truncated PNG (no image data)")
    width, height, bits, colour, *rest = struct.unpack(">IIBBBBB", header)
    if colour not in _PNG_CHANNELS:
        raise Refused(f"damaged PNG (colour type {colour})")
    channels = _PNG_CHANNELS[colour]
    palette, transparency = parts.get(b"PLTE", b""), parts.get(b"tRNS", b"")
    if (colour == 3 or palette) and (len(palette) % 3 or not 3 <= len(palette) <= 768):
        raise Refused(f"damaged PNG (a palette of {len(palette)} bytes)")
    transparent: tuple[int, ...] = ()
    if colour in (0, 2) and transparency:
        if len(transparency) != 2 * channels:
            raise Refused(f"damaged PNG (a chunk tRNS of {len(transparency)} bytes)")
        transparent = struct.unpack(f">{channels}H", transparency)
        if bits == 16 or max(transparent) >= 2**bits:
            transparency = b""
        elif 1 < bits < 8:  # the decoder scales grey values to 8 bits, but not the transparent one
            transparency = struct.pack(">H", transparent[0] * 255 // (2**bits - 1))
    elif colour != 3:
        transparency = b""
    if colour == 4 and bits == 16:  # the scanlines of 16-bit grey with alpha are those of 8-bit RGBA
        header = struct.pack(">IIBBBBB", width, height, 8, 6, *rest)
    kept[1:1] = [_png_chunk(b"IHDR", header)]
    if colour == 3:
        kept.insert(2, _png_chunk(b"PLTE", palette))
    if transparency:
        kept.insert(2 + (colour == 3), _png_chunk(b"tRNS", transparency))
    kept.append(_png_chunk(b"IEND", b""))
    return Container(
        "PNG",
        (width, height),
        b"".join(kept),
        orientation=_orientation(exif),
        bits=bits,
        channels=channels,
        colours=len(palette) // 3 if colour == 3 else 0,
        inflated=_png_bytes(width, height, bits * channels, interlaced=rest[2] == 1),
        transparent=transparent if bits == 16 else (),
        exif=exif,
        comments=frozenset(comments),
    )


def _png_bytes(width: int, height: int, pixel_bits: int, *, interlaced: bool) -> int:
    """Return the number of bytes of all scanlines with their filter types (W3C PNG, sections 7.2 and 8.2)."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    total = 0
    for left, top, across, down in passes if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        total += rows * (1 + -(-columns * pixel_bits // 8)) if columns > 0 and rows > 0 else 0
    return total


def check_image_data(container: Container) -> None:
    """Inflate the image data of a PNG, because the decoder fills missing rows with black and says nothing.

    Raises:
        Refused: there is less or more data than the header says, or its checksum is wrong.
    """
    inflate, left = zlib.decompressobj(), container.inflated
    view, position = memoryview(container.pixels), len(_PNG_SIGNATURE)
    try:
        while position < len(view) and not inflate.eof:
            length = int.from_bytes(view[position : position + 4], "big")
            body = view[position + 8 : position + 8 + length] if view[position + 4 : position + 8] == b"IDAT" else b""
            while len(body) and not inflate.eof:
                left -= len(inflate.decompress(body, 2**18))
                body = inflate.unconsumed_tail
                if left < -_PNG_SURPLUS:
                    raise Refused("damaged PNG (more image data than its header says)")
            position += 12 + length
        if not inflate.eof:
            left -= len(inflate.flush())
    except zlib.error:
        raise Refused("damaged PNG (wrong checksum or code in the image data)") from None
    if left > 0 or not inflate.eof:
        raise Refused("truncated PNG (less image data than its header says)")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# --- JPEG -------------------------------------------------------------------------------------------------------------

_PICTURES, _PREVIEW = 0xB002, 1  # tag of the entries of a multi-picture index, and type of a large thumbnail in it
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SMALL_SIDE = 256
"""Shorter side times channels, below which a row of blocks may take less than the 64 bits that the decoder reads ahead.
A block of 8 x 8 pixels takes at least 2 bits."""


@dataclass
class _JpegFrame:
    progressive: bool
    size: tuple[int, int]
    sampling: dict[int, tuple[int, int]]
    # Coefficients by component: the number of low bits that are still missing, or None if nothing was coded.
    missing_bits: dict[int, list[int | None]] = field(default_factory=dict)


def _jpeg(data: bytes) -> Container:
    """Check the segments and scans of a JPEG file (ITU-T T.81, annex B).

    The scans must code all bits of all coefficients. Whether each scan has exactly the data that the header implies,
    the decoder says (`decode.decode`).
    """
    kept, shortened = [b"\xff\xd8"], [b"\xff\xd8"]  # segments, and the coded data of each scan
    frame: _JpegFrame | None = None
    comments: set[str] = set()
    exif: tuple[Entry, ...] = ()
    scans, position = 0, 2
    for _ in range(MAX_PARTS):
        match = _MARKER.search(data, position)
        if match is None:
            raise Refused("truncated JPEG (no end marker)")
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xD9:
            break
        if marker in (0x01, 0xD8):
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : end]
        if end > len(data) or end < position + 2:
            raise Refused("truncated JPEG (a segment is cut)")
        segment = b"\xff" + bytes([marker]) + data[position:end]
        position = end
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None:
                raise Refused("damaged JPEG (two frame headers)")
            frame = _jpeg_frame(marker, body)
        elif marker == 0xDC and (frame is None or body != frame.size[1].to_bytes(2, "big")):
            raise Refused("damaged JPEG (a number of lines that contradicts its header)")
        elif marker == 0xFE:
            comments.add("comment")
            continue
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or tuple(directory(body[6:]))
            continue
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap"):
            comments.add("xmp")
            continue
        elif marker == 0xED and body.startswith(b"Photoshop"):
            comments.add("photoshop")
            continue
        elif marker == 0xEE and body.startswith(b"Adobe"):
            pass  # tells whether colours are YCbCr or RGB, CMYK or YCCK
        elif marker == 0xE0 and body.startswith(b"JFIF\0"):
            segment = b"\xff\xe0\x00\x10" + body[:12] + b"\0\0"  # without the thumbnail
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            _check_pictures(body[4:])
            continue
        elif marker not in (0xC4, 0xDA, 0xDB, 0xDD):
            continue
        kept.append(segment)
        shortened.append(segment)
        if marker != 0xDA:
            continue
        scans += 1
        if frame is None:
            raise Refused("damaged JPEG (a scan before the frame header)")
        if scans > MAX_SCANS or scans * frame.size[0] * frame.size[1] > MAX_SCAN_PIXELS:
            width, height = frame.size
            reason = f"JPEG of {width} x {height} pixels in {scans} or more scans, which takes too long to decode"
            raise Refused(reason, "save it as baseline JPEG or as PNG")
        _note_scan(frame, body)
        following = _MARKER.search(data, position)
        if following is None:
            raise Refused("truncated JPEG (no end marker)")
        coded, position = data[position : following.start()].rstrip(b"\xff"), following.start()
        kept.append(coded)
        shortened.append(_without_last_byte(coded))
    else:
        raise Refused(f"JPEG with more than {MAX_PARTS:,} segments", "save it again")
    if frame is None or not scans:
        raise Refused("truncated JPEG (no image data)")
    if any(left != 0 for component in frame.sampling for left in frame.missing_bits.get(component, [None])):
        raise Refused("truncated JPEG (the last scans are missing)")
    return Container(
        "JPEG",
        frame.size,
        b"".join([*kept, b"\xff\xd9"]),
        shortened=b"".join([*shortened, b"\xff\xd9"]) if min(frame.size) * len(frame.sampling) < _SMALL_SIDE else None,
        orientation=_orientation(exif),
        channels=len(frame.sampling),
        exif=exif,
        comments=frozenset(comments),
    )


def _without_last_byte(coded: bytes) -> bytes:
    """Return the coded data of a scan without its last byte, and without a restart marker after it."""
    if coded[-2:-1] == b"\xff" and coded[-1] != 0:
        coded = coded[:-2].rstrip(b"\xff")
    return coded[: -2 if coded.endswith(b"\xff\0") else -1]


def _check_pictures(index: bytes) -> None:
    """Refuse a multi-picture file unless its other pictures are previews of the first (CIPA DC-007, 5.2.3)."""
    entries = {entry.tag: entry for entry in directory(index)}
    if _PICTURES not in entries:
        raise Refused("damaged JPEG (an index of several pictures that cannot be read)")
    attributes = entries[_PICTURES]
    kinds = [kind & 0xFFFFFF for kind, *_ in struct.iter_unpack(f"{attributes.order}IIIHH", attributes.value)]
    if any(kind >> 16 != _PREVIEW for kind in kinds[1:]):
        raise Refused(f"JPEG with {len(kinds)} pictures (MPO); only single images are read", _SAVE_FRAMES)


def jpeg_header(data: bytes) -> tuple[int, int, int, int]:
    """Return bits, height, width and components of a JPEG or JPEG-LS stream. Raises Refused if there is no header."""
    position = 2
    for _ in range(1000):
        match = _MARKER.search(data, position)
        if match is None or match.end() + 8 > len(data):
            break
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">BHHB", data, position + 2)
        position += int.from_bytes(data[position : position + 2], "big")
    raise Refused("damaged JPEG (no frame header)")


def _jpeg_frame(marker: int, body: bytes) -> _JpegFrame:
    bits, height, width, number = struct.unpack_from(">BHHB", body)
    if marker not in (0xC0, 0xC1, 0xC2):
        kind = {0xC3: "lossless", 0xC9: "arithmetic", 0xCA: "arithmetic"}.get(marker, "hierarchical or lossless")
        raise Refused(f"JPEG with {kind} coding is not supported", _SAVE_AS_PNG)
    if bits != 8:
        raise Refused(f"JPEG with {bits} bits per channel is not supported", _SAVE_AS_PNG)
    if height == 0 or width == 0 or len(body) < 6 + 3 * number:
        raise Refused("damaged JPEG (frame header without size or components)")
    sampling = {body[6 + 3 * i]: (body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(number)}
    if number not in (1, 3, 4) or len(sampling) != number or any(not 1 <= f <= 4 for s in sampling.values() for f in s):
        raise Refused(f"damaged JPEG (frame header with {number} components)")
    return _JpegFrame(marker == 0xC2, (width, height), sampling)


def _note_scan(frame: _JpegFrame, body: bytes) -> None:
    """Note the coefficient bits of a scan in `frame`."""
    components = tuple(body[1 : 1 + 2 * body[0] : 2]) if body else ()
    if len(body) != 4 + 2 * len(components) or not components or not set(components) <= set(frame.sampling):
        raise Refused("damaged JPEG (scan header)")
    first, last, low = (*body[-3:-1], body[-1] & 15) if frame.progressive else (0, 63, 0)
    if not first <= last <= 63:
        raise Refused("damaged JPEG (scan header)")
    for component in components:
        frame.missing_bits.setdefault(component, [None] * 64)[first : last + 1] = [low] * (last + 1 - first)


# --- TIFF and EXIF ----------------------------------------------------------------------------------------------------

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_ORIENTATION = 0x0112
_DIRECTORY_TAGS = (0x8769, 0x8825)  # EXIF, GPS
_VALUE_BYTES = 2**16
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


def directory(data: bytes) -> Iterator[Entry]:
    """Yield the entries of the first directory of TIFF or EXIF data, and of its EXIF and GPS directories.

    Entries with broken offsets are left out. Values are bounded, because many entries may share the same bytes.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return
    budget = len(data)
    starts = list(struct.unpack_from(f"{order}I", data, 4))
    for start in starts:
        number = struct.unpack_from(f"{order}H", data, start)[0] if start + 2 <= len(data) else 0
        for i in range(start + 2, min(start + 2 + 12 * number, len(data) - 11), 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", data, i)
            size = _TYPE_BYTES.get(kind, 0) * count
            offset = i + 8 if size <= 4 else struct.unpack_from(f"{order}I", data, i + 8)[0]
            if size and offset + size <= len(data):
                value = data[offset : offset + min(size, _VALUE_BYTES, budget)]
                budget -= len(value)
                entry = Entry(tag, kind, value, order)
                yield entry
                if tag in _DIRECTORY_TAGS and start == starts[0]:
                    starts += entry.integers()[:1]


def _orientation(entries: tuple[Entry, ...]) -> int:
    values = next((entry.integers() for entry in entries if entry.tag == _ORIENTATION), ())
    return values[0] if values and 1 <= values[0] <= 8 else 1


def _long_values(data: bytes, order: str, entries: dict[int, tuple[int, int, int]], tag: int) -> list[int]:
    kind, count, offset = entries.get(tag, (4, 0, 0))
    code = {3: "H", 4: "I"}.get(kind)
    return list(struct.unpack_from(f"{order}{count}{code}", data, offset)) if code and count else []


def _tiff(data: bytes) -> Container:
    """Check the directory, the fields and the strips or tiles of a TIFF file (TIFF 6.0)."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    frames = _tiff_frames(data, order, start)
    if frames > 1:
        raise Refused(f"TIFF with {frames} frames; only single images are read", _SAVE_FRAMES)
    (number,) = struct.unpack_from(f"{order}H", data, start)
    entries: dict[int, tuple[int, int, int]] = {}
    total = 0
    for i in range(start + 2, start + 2 + 12 * number, 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, i)
        size = _TYPE_BYTES.get(kind, 1) * count
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
        orientation=_orientation(exif),
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
        raise Refused(f"TIFF with {_listed(fields, *names)} is not supported", _SAVE_AS_PNG)

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


# --- BMP --------------------------------------------------------------------------------------------------------------


def _bmp(data: bytes) -> Container:
    """Check that a BMP file is as long as its header says, and that its pixels follow its colour table."""
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, planes, bits = struct.unpack_from("<HHHH", data, 18)
        compression, used, entry = 0, 0, 3
    else:
        width, height, planes, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (used,), entry = struct.unpack_from("<I", data, 46), 4
    if compression not in (0, 3, 6):
        raise Refused(f"BMP with compression {compression} is not supported", _SAVE_AS_PNG)
    if width <= 0 or height == 0 or planes != 1:
        raise Refused("damaged BMP header")
    colours = (used or 2**bits) if bits <= 8 else 0
    masks = {3: 12, 6: 16}.get(compression, 0) if header == 40 else 0
    if colours > 2**bits or start < 14 + header + masks + colours * entry:
        raise Refused("damaged BMP (its pixels begin inside its colour table)")
    needed = start + (width * bits + 31) // 32 * 4 * abs(height)
    if needed > len(data):
        raise Refused(f"truncated BMP ({len(data):,} of {needed:,} bytes)")
    return Container("BMP", (width, abs(height)), data, colours=colours)


# --- WebP -------------------------------------------------------------------------------------------------------------


def _webp(data: bytes) -> Container:
    """Check the chunks of a WebP file (RFC 9649)."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise Refused(f"truncated WebP ({len(data):,} of {end:,} bytes)")
    comments: set[str] = set()
    exif: tuple[Entry, ...] = ()
    position, frames, size = 12, 0, (0, 0)
    for _ in range(MAX_PARTS):
        if position + 8 > end:
            break
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        body = data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
        if len(body) < length or position > end + 1:
            raise Refused("truncated WebP (a chunk is cut)")
        if kind == b"VP8X":
            size = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
        elif kind == b"VP8 " and size == (0, 0):
            size = tuple(side & 0x3FFF for side in struct.unpack_from("<HH", body, 6))
        elif kind == b"VP8L" and size == (0, 0):
            word = int.from_bytes(body[1:5], "little")
            size = (word & 0x3FFF) + 1, (word >> 14 & 0x3FFF) + 1
        elif kind == b"EXIF":
            exif = tuple(directory(body.removeprefix(b"Exif\0\0")))
        elif kind == b"XMP ":
            comments.add("xmp")
        frames += kind == b"ANMF"
    else:
        raise Refused(f"WebP with more than {MAX_PARTS:,} chunks", "save it again")
    if frames > 1:
        raise Refused(f"WEBP with {frames} frames; only single images are read", _SAVE_FRAMES)
    return Container("WEBP", size, data, orientation=_orientation(exif), exif=exif, comments=frozenset(comments))


_READERS: dict[bytes, Callable[[bytes], Container]] = {
    re.escape(_PNG_SIGNATURE): _png,
    rb"\xff\xd8\xff": _jpeg,
    rb"II\*\0|MM\0\*": _tiff,
    rb"BM": _bmp,
    rb"RIFF....WEBP": _webp,
}

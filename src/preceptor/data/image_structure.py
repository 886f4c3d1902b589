"""What the readers of image containers share: the result, the refusal, and the directories of EXIF data."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

MAX_PARTS = 100_000
"""Largest number of chunks or segments of a file. A PNG of 64 MiB in the usual chunks of 8 KiB has 8,192."""
MAX_SIDE = 65_535
"""Largest number of rows or columns, as in JPEG and DICOM. Decoders need memory for each row."""

STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""The exceptions that are no errors. A decoder written in Rust reports a failure as a BaseException that is not among
them (`pyo3_runtime.PanicException`), so that `except Exception` around a decoder is not enough."""

COPY_AGAIN = "copy the file again from its source"
SAVE_FRAMES = "save each frame as a separate file"
SAVE_AS_PNG = "save it as 8-bit or 16-bit PNG"


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


Part: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Container:
    """The structure of an image file.

    Attributes:
        format: Name of the format in Pillow.
        size: Width and height in pixels, as stored.
        pixels: The bytes that the decoder gets.
        orientation: EXIF orientation, 1 to 8.
        inflated: PNG only: number of bytes of the inflated image data.
        compression: TIFF only: name of the compression.
        parts: TIFF only: offset, length and expanded length of each strip or tile, in bytes.
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
    compression: str = ""
    parts: tuple[Part, ...] = ()
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


def inflated_size(parts: Iterable[memoryview], limit: int) -> int | None:
    """Return the number of bytes that zlib data expands to, or None if it does not end.

    A number above `limit` means that there are more.

    Raises:
        zlib.error: a code or the checksum is wrong.
    """
    inflate, size = zlib.decompressobj(), 0
    for part in parts:
        rest: bytes | memoryview = part
        while len(rest) and not inflate.eof:
            size += len(inflate.decompress(rest, 2**18))
            rest = inflate.unconsumed_tail
            if size > limit:
                return size
    if not inflate.eof:
        size += len(inflate.flush())
    return size if inflate.eof else None


TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_ORIENTATION = 0x0112
_DIRECTORY_TAGS = (0x8769, 0x8825)  # EXIF, GPS
_VALUE_BYTES = 2**16


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
            size = TYPE_BYTES.get(kind, 0) * count
            offset = i + 8 if size <= 4 else struct.unpack_from(f"{order}I", data, i + 8)[0]
            if size and offset + size <= len(data):
                value = data[offset : offset + min(size, _VALUE_BYTES, budget)]
                budget -= len(value)
                entry = Entry(tag, kind, value, order)
                yield entry
                if tag in _DIRECTORY_TAGS and start == starts[0]:
                    starts += entry.integers()[:1]


def orientation_of(entries: tuple[Entry, ...]) -> int:
    values = next((entry.integers() for entry in entries if entry.tag == _ORIENTATION), ())
    return values[0] if values and 1 <= values[0] <= 8 else 1

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

from preceptor.data.image_structure import (
    MAX_PARTS,
    SAVE_AS_PNG,
    SAVE_FRAMES,
    Container,
    Entry,
    Refused,
    directory,
    inflated_size,
    orientation_of,
)
from preceptor.data.jpeg import read_jpeg
from preceptor.data.tiff import read_tiff


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
                f"PNG with {int.from_bytes(body[:4], 'big')} frames; only single images are read", SAVE_FRAMES
            )
        elif kind == b"fdAT":  # a frame besides the image data
            raise Refused("PNG with several frames; only single images are read", SAVE_FRAMES)
        elif kind == b"IEND":
            ended = True
            break
        elif kind[:1].isupper():
            raise Refused(f"PNG with the unknown critical chunk {kind!r}", SAVE_AS_PNG)
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
        orientation=orientation_of(exif),
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
    limit = container.inflated + _PNG_SURPLUS
    try:
        size = inflated_size(_image_data(memoryview(container.pixels)), limit)
    except zlib.error:
        raise Refused("damaged PNG (wrong checksum or code in the image data)") from None
    if size is None or size < container.inflated:
        raise Refused("truncated PNG (less image data than its header says)")
    if size > limit:
        raise Refused("damaged PNG (more image data than its header says)")


def _image_data(view: memoryview) -> Iterator[memoryview]:
    position = len(_PNG_SIGNATURE)
    while position < len(view):
        end = position + 12 + int.from_bytes(view[position : position + 4], "big")
        if view[position + 4 : position + 8] == b"IDAT":
            yield view[position + 8 : end - 4]
        position = end


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


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
        raise Refused(f"BMP with compression {compression} is not supported", SAVE_AS_PNG)
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
        raise Refused(f"WEBP with {frames} frames; only single images are read", SAVE_FRAMES)
    return Container("WEBP", size, data, orientation=orientation_of(exif), exif=exif, comments=frozenset(comments))


_READERS: dict[bytes, Callable[[bytes], Container]] = {
    re.escape(_PNG_SIGNATURE): _png,
    rb"\xff\xd8\xff": read_jpeg,
    rb"II\*\0|MM\0\*": read_tiff,
    rb"BM": _bmp,
    rb"RIFF....WEBP": _webp,
}

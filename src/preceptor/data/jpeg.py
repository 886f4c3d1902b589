"""Check the segments and scans of a JPEG file (ITU-T T.81) before a decoder sees them."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from preceptor.data.image_structure import (
    MAX_PARTS,
    SAVE_AS_PNG,
    SAVE_FRAMES,
    Container,
    Entry,
    Refused,
    directory,
    orientation_of,
)

MAX_SCANS = 100
"""Largest number of scans of a JPEG file. Usual encoders write 1 to 12."""
MAX_SCAN_PIXELS = 400_000_000
"""Largest number of scans times pixels of a JPEG file, because each scan visits each block of the image."""

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


def read_jpeg(data: bytes) -> Container:
    """Check the segments and scans of a JPEG file (ITU-T T.81, annex B).

    The scans must code all bits of all coefficients. Whether each scan has exactly the data that the header implies,
    the decoder says (`decode.decode`).
    """
    kept = [b"\xff\xd8"]  # segments, and the coded data of each scan
    coded_places: set[int] = set()  # of the coded data among them
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
        coded_places.add(len(kept))
        kept.append(coded)
    else:
        raise Refused(f"JPEG with more than {MAX_PARTS:,} segments", "save it again")
    if frame is None or not scans:
        raise Refused("truncated JPEG (no image data)")
    if any(left != 0 for component in frame.sampling for left in frame.missing_bits.get(component, [None])):
        raise Refused("truncated JPEG (the last scans are missing)")
    kept.append(b"\xff\xd9")
    shortened = None
    if min(frame.size) * len(frame.sampling) < _SMALL_SIDE:
        cut = [_without_last_byte(part) if place in coded_places else part for place, part in enumerate(kept)]
        shortened = b"".join(cut)
    return Container(
        "JPEG",
        frame.size,
        b"".join(kept),
        shortened=shortened,
        orientation=orientation_of(exif),
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
        raise Refused(f"JPEG with {len(kinds)} pictures (MPO); only single images are read", SAVE_FRAMES)


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
        raise Refused(f"JPEG with {kind} coding is not supported", SAVE_AS_PNG)
    if bits != 8:
        raise Refused(f"JPEG with {bits} bits per channel is not supported", SAVE_AS_PNG)
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

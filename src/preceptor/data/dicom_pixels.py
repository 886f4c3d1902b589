"""Check the compressed data of a DICOM image against its header, and decode it."""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from preceptor.data.containers import read_container
from preceptor.data.decode import decode
from preceptor.data.dicom_header import EXPORT, contradiction
from preceptor.data.image_structure import COPY_AGAIN, Refused, check_size
from preceptor.data.jpeg import jpeg_header
from preceptor.data.tiff import packbits_size

if TYPE_CHECKING:
    from pydicom import Dataset

# Compressed values (rows x columns x samples) that are decoded in less than 3 s and 600 MB.
_MAX_JPEG2000_VALUES, _MAX_COMPRESSED_VALUES = 16_000_000, 48_000_000


def check_codestream(dataset: Dataset) -> int:
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
        _check_tile_parts(frame)
    else:
        raise Refused(f"DICOM compression {syntax.name} is not supported", EXPORT)
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
        raise Refused("DICOM with subsampled or unequal components in its JPEG 2000 data is not supported", EXPORT)
    return (depths[0] & 0x7F) + 1, bottom - top, right - left, number


def _check_tile_parts(frame: bytes) -> None:
    """Check that the tile-parts of a JPEG 2000 codestream have the stated lengths (ITU-T T.800, A.4.2)."""
    position = frame.find(b"\xff\x90\x00\x0a", frame.find(b"\xff\x4f\xff\x51"))
    while frame[position : position + 4] == b"\xff\x90\x00\x0a" and position + 12 <= len(frame):
        length = int.from_bytes(frame[position + 6 : position + 10], "big")
        if length == 0:  # the last tile-part, up to the end marker
            return
        position += max(length, 12)
    if frame[position : position + 2] != b"\xff\xd9":
        raise Refused("truncated or damaged DICOM (a part of its JPEG 2000 data has another length than stated)")


def _check_rle(frame: bytes, pixels: int, segments: int) -> None:
    """Check the segments of a run-length encoded frame, and what they expand to (PS3.5, annex G)."""
    number, *starts = struct.unpack_from("<16I", frame)
    if number != segments:
        raise Refused(f"DICOM with {number} run-length segments in its compressed data, expected {segments}")
    bounds = [*starts[:number], len(frame)]
    for start, end in itertools.pairwise(bounds):
        if not 64 <= start <= end <= len(frame):
            raise Refused("truncated DICOM (run-length segments)")
        if packbits_size(frame[start:end], pixels) != pixels:
            raise Refused("damaged DICOM (run-length segments do not give the number of pixels)")


@contextmanager
def _decoder_messages(messages: bytearray) -> Iterator[None]:
    """Collect what is written to the standard error.

    The JPEG decoder of GDCM fills missing data with zeros, and has no other way to say so. Only one thread at a time
    can be inside (`silent_pydicom`). Messages of others are passed on.
    """
    try:
        saved = os.dup(2)
    except OSError:  # a process without standard error
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            messages += b"".join(lines)
            os.write(2, b"".join(line for line in lines if b"JPEG" not in line))


def decode_pixels(dataset: Dataset, bits: int) -> np.ndarray:
    """Return the stored values (rows, columns) with all `bits`, or the RGB values (rows, columns, 3)."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import JPEGTransferSyntaxes

    messages = bytearray()
    is_jpeg = dataset.file_meta.TransferSyntaxUID in JPEGTransferSyntaxes
    try:
        with _decoder_messages(messages) if is_jpeg else nullcontext():
            stored = pixel_array(dataset, bits_stored=max(bits, int(dataset.BitsStored)))
    except RuntimeError:
        kind = dataset.file_meta.TransferSyntaxUID.name
        reason = f"no installed decoder can read this {kind} image of {int(dataset.BitsStored)} bits"
        raise Refused(f"{reason}, or it is damaged", EXPORT) from None
    if b"Corrupt JPEG data" in messages:
        raise Refused("truncated or damaged DICOM (the decoder of its JPEG data reports missing or wrong data)")
    if stored.shape[:2] != (dataset.Rows, dataset.Columns):  # pydicom takes surplus data for further frames
        raise contradiction("Rows", "PixelData")
    return stored

"""PNG, JPEG, BMP, TIFF and WebP files of all modes with damaged chunks and bytes, against Pillow and the whole file."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from preceptor.data.images import load_image
from tests.fuzz.mutate import MUTATIONS, POSITIONS, mostly, mutate, place
from tests.fuzz.outcome import PATIENT, Wrong, attempt, recorded, require
from tests.fuzz.target import Target

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
}
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp"}
DEEP = ("I;16", "I", "F", "I;16B")
"""Modes of more than 8 bits."""


@dataclass(frozen=True)
class RasterInput:
    """A file of Pillow, and one kind of damage.

    `damage` is None, ``("bytes", mutations)``, ``("truncate", position)``, ``("early end", position)`` (the file is cut
    and its end marker appended), ``("zero tail", position)``, or for PNG ``("chunk", number, mutations, fix the CRC)``.
    """

    kind: str
    mode: str
    size: tuple[int, int]
    progressive: bool
    orientation: int
    compression: str | None
    damage: tuple[Any, ...] | None
    seed: int


FAULT = st.one_of(
    st.tuples(st.just("bytes"), MUTATIONS.map(tuple)),
    st.tuples(st.just("truncate"), POSITIONS),
    st.tuples(st.just("early end"), POSITIONS),
    st.tuples(st.just("zero tail"), POSITIONS),
    st.tuples(st.just("chunk"), st.integers(0, 5), MUTATIONS.map(tuple), st.booleans()),
)
INPUTS = st.sampled_from(sorted(MODES)).flatmap(
    lambda kind: st.builds(
        RasterInput,
        kind=st.just(kind),
        mode=st.sampled_from(MODES[kind]),
        size=st.sampled_from([(1, 1), (7, 5), (16, 16), (40, 24), (120, 80)]),
        progressive=st.booleans(),
        orientation=st.sampled_from([1, 1, 1, 3, 6, 8, 5]),
        compression=st.sampled_from([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"]),
        damage=mostly(st.none(), FAULT, 2),
        seed=st.integers(0, 99),
    )
)


def picture(case: RasterInput) -> Image.Image:
    """Return a smooth picture with noise."""
    width, height = case.size
    rng = np.random.default_rng(case.seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(x / 7 + case.seed) + 60 * np.cos(y / 5)
    noise = rng.integers(-5, 6, (height, width, 4))
    bands = np.clip(base[..., None] + noise, 0, 255).astype(np.uint8)
    if case.mode == "I;16":
        return Image.fromarray((bands[..., 0].astype(np.uint16) << 4) + bands[..., 1])
    if case.mode == "I":
        return Image.fromarray(bands[..., 0].astype(np.int32) * 300 - 1000)
    if case.mode == "F":
        return Image.fromarray(bands[..., 0].astype(np.float32) / 7)
    rgba = Image.fromarray(bands)
    return rgba if case.mode == "RGBA" else rgba.convert("RGB").convert(case.mode)


def encode(case: RasterInput) -> bytes:
    """Return the bytes of the undamaged file."""
    image = picture(case)
    exif = Image.Exif()
    exif[0x0112] = case.orientation
    exif[0x010E] = exif[0x013B] = PATIENT
    options: dict[str, Any] = {}
    if case.kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Author", PATIENT)
        options = {"pnginfo": info, "exif": exif}
    elif case.kind == "JPEG":
        options = {"quality": 90, "progressive": case.progressive, "exif": exif, "comment": PATIENT.encode()}
        if case.compression and not case.progressive:
            options["restart_marker_blocks"] = 2
    elif case.kind == "TIFF":
        options = {"compression": case.compression, "exif": exif}
        if case.mode == "YCbCr":
            options.pop("compression")
    elif case.kind == "WEBP":
        options = {"lossless": case.progressive, "exif": exif}
    file = io.BytesIO()
    image.save(file, case.kind, **options)
    return file.getvalue()


def chunks_of(data: bytes) -> list[tuple[bytes, bytes, int]]:
    """Return (type, content, CRC) of every chunk of a PNG file."""
    found = []
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        content = data[at + 8 : at + 8 + length]
        found.append((data[at + 4 : at + 8], content, int.from_bytes(data[at + 8 + length : at + 12 + length], "big")))
        at += 12 + length
    return found


def damaged(case: RasterInput, data: bytes) -> bytes:
    """Return the bytes of the file after the damage."""
    if case.damage is None:
        return data
    kind, *rest = case.damage
    if kind == "bytes":
        return mutate(data, rest[0])
    at = place(rest[0], len(data)) if kind != "chunk" else 0
    if kind == "truncate":
        return data[:at]
    if kind == "zero tail":
        return data[:at] + bytes(len(data) - at)
    if kind == "early end":
        ends = {"PNG": data[-12:], "JPEG": b"\xff\xd9"}
        return data[:at] + ends.get(case.kind, b"")
    if case.kind != "PNG":
        return mutate(data, rest[1])
    parts = []
    chunks = chunks_of(data)
    for number, (name, content, crc) in enumerate(chunks):
        if number == rest[0] % len(chunks):
            content = mutate(content, rest[1])
            crc = zlib.crc32(name + content) if rest[2] else crc
        parts.append(struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc))
    return data[:8] + b"".join(parts)


def pillow(data: bytes) -> np.ndarray | None:
    """Return Pillow's own 8-bit decoding on black, upright; None for more than 8 bits or if Pillow refuses it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode in DEEP:
                return None
            upright = ImageOps.exif_transpose(image)
    except Exception:
        return None
    grey = upright.mode in ("1", "L", "LA", "La")
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.asarray(upright.convert("L" if grey else "RGB"))


def sound_png(data: bytes) -> bool:
    """Return whether the CRC of every critical chunk of a PNG and the checksum of its compressed pixels are right."""
    chunks = chunks_of(data)
    critical = [chunk for chunk in chunks if chunk[0][:1].isupper()]
    if any(zlib.crc32(name + content) != crc for name, content, crc in critical):
        return False
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(b"".join(content for name, content, _ in chunks if name == b"IDAT"))
    except zlib.error:
        return False
    return inflater.eof


def check(case: RasterInput, folder: Path) -> bool:
    """Read a file and compare it with Pillow and, after a truncation, with the whole file."""
    with recorded():
        whole = encode(case)
        data = damaged(case, whole)
    path = folder / f"x{SUFFIXES[case.kind]}"
    path.write_bytes(data)
    outcome = attempt(lambda: load_image(path), place=path)
    if not outcome.accepted:
        supported = case.mode != "YCbCr"  # of TIFF, because decoders differ in the range of its values
        require(data != whole or not supported, "an undamaged file is refused", outcome.sentence)
        return False
    found = np.asarray(outcome.value)
    require(outcome.value.mode in ("L", "RGB") and not outcome.value.info, "the image has another mode or metadata")
    shortened = case.damage is not None and case.damage[0] in ("truncate", "early end")
    if case.kind == "PNG" and not shortened:
        require(sound_png(data), "a PNG with a wrong checksum was read")
    with recorded():
        expected = pillow(data)
        complete = attempt(lambda: load_image(write(folder, whole, path.suffix))).value if data != whole else None
    # Of damaged EXIF data, Pillow may read nothing, and thus not the orientation.
    if expected is not None and not (np.array_equal(found, expected) or np.array_equal(found, complete)):
        raise Wrong("an 8-bit image differs from Pillow", f"{found.shape} {expected.shape}")
    # Only the formats with an end marker or checksum tell zeros from pixels.
    zeroed = case.damage is not None and case.damage[0] == "zero tail" and case.kind in ("PNG", "JPEG")
    if shortened or zeroed:
        require(np.array_equal(found, np.asarray(complete)), f"an incomplete {case.kind} was read")
    if case.damage is None and case.mode in DEEP:
        deep = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(whole))), np.float64)
        order = np.argsort(deep, axis=None)
        require(
            (np.diff(found.reshape(-1)[order].astype(int)) >= 0).all(), "grey levels are not in the order of the pixels"
        )
        require(deep.min() == deep.max() or np.ptp(found) == 255, "the range of the pixels is not that of the image")
    return True


def write(folder: Path, data: bytes, suffix: str) -> Path:
    path = folder / f"whole{suffix}"
    path.write_bytes(data)
    return path


TARGET = Target(INPUTS, check, 400)

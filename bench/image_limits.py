"""Measure the time and memory that one image file can cost, including files made to cost as much as possible.

Each file is loaded in a process of its own. The table shows the outcome, the processor time in seconds, and the peak of
the resident memory above that of the imported modules. With ``--dicom``, list how each DICOM file of pydicom and
pydicom-data is read, and the largest difference from a rendering with pydicom's own functions.

    python bench/image_limits.py [--dicom] [--match TEXT]
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 5656  # 5656 x 5656 = 31,990,336 pixels, just below the limit


def texture(channels: int, side: int = SIDE, dtype: type = np.uint8) -> np.ndarray:
    """Return an image with gradients and noise, which compresses about as well as a photograph."""
    rng = np.random.default_rng(0)
    tile = np.linspace(0, 200, 512)[:, None, None] + rng.normal(20, 4, (512, 512, channels))
    tile = (tile.clip(0, 255) * (257 if dtype == np.uint16 else 1)).astype(dtype)
    times = -(-side // 512)
    image = np.tile(tile, (times, times, 1))[:side, :side]
    return image[..., 0] if channels == 1 else image


def encode(array: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def deep_png(channels: int, colour: int) -> bytes:
    rows = texture(channels, dtype=np.uint16).astype(">u2").reshape(SIDE, -1).view(np.uint8)
    return png(SIDE, SIDE, 16, colour, np.pad(rows, ((0, 0), (1, 0))).tobytes())


def many_scans(count: int) -> bytes:
    data = encode(texture(3, 1024), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + b"\xff\xd9"


def exif_bomb(body: int) -> bytes:
    """Return EXIF data in which each entry has the same large value."""
    number = min((body - 14) // 24, 65_535)
    entries = b"".join(struct.pack("<HHII", i, 7, body - 8, 8) for i in range(number))
    return (b"II*\0" + struct.pack("<IH", 8, number) + entries).ljust(body, b"\0")


def tiff(fields: dict[int, int], rest: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + rest


def tiff_fields(width: int, height: int, compression: int, **others: int) -> dict[int, int]:
    fields = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    return {**fields, **{int(name[1:]): value for name, value in others.items()}}


def dicom(pixels: bytes, rows: int, columns: int, bits: int, *, syntax: str = "1.2.840.10008.1.2.1", samples: int = 1):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = UID(syntax)
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PixelRepresentation = rows, columns, samples, 0
    dataset.PhotometricInterpretation = "MONOCHROME2" if samples == 1 else "RGB"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelData = encapsulate([pixels]) if meta.TransferSyntaxUID.is_encapsulated else pixels
    dataset["PixelData"].VR = "OB" if meta.TransferSyntaxUID.is_encapsulated or bits == 8 else "OW"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def jpeg2000(array: np.ndarray) -> bytes:
    return encode(array, "JPEG2000", no_jp2=True, irreversible=False)


J2K, RLE, JPEG = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50"


def rle_bomb() -> bytes:
    runs = b"\x81\0" * (30 * 2**20)  # 128 equal pixels each
    return dicom(struct.pack("<16I", 1, 64, *[0] * 14) + runs, SIDE, SIDE, 8, syntax=RLE)


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG, 32 MP colour": lambda: encode(texture(3), "JPEG"),
    "JPEG, 32 MP colour, progressive 4:4:4": lambda: encode(texture(3), "JPEG", progressive=True, subsampling=0),
    "JPEG, 64 MP colour": lambda: encode(texture(3, 8000), "JPEG"),
    "JPEG, 1 MP, 1,500 scans": lambda: many_scans(1500),
    "JPEG, 1 MP, 85 scans": lambda: many_scans(75),
    "JPEG, 16 million comments": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * (16 * 2**20 - 1),
    "JPEG, 64 MiB of 0xFF": lambda: b"\xff\xd8" + b"\xff" * (64 * 2**20 - 2),
    "JPEG, EXIF of 2,700 x 64 KiB": lambda: (
        b"\xff\xd8\xff\xe1"
        + struct.pack(">H", 65000)
        + b"Exif\0\0"
        + exif_bomb(64992)
        + encode(texture(1, 64), "JPEG")[2:]
    ),
    "PNG, 32 MP colour": lambda: encode(texture(3), "PNG", compress_level=1),
    "PNG, 32 MP colour with alpha": lambda: encode(texture(4), "PNG", compress_level=1),
    "PNG, 32 MP grey, 16 bits": lambda: deep_png(1, 0),
    "PNG, 32 MP grey, 16 bits, constant": lambda: png(SIDE, SIDE, 16, 0, bytes(SIDE * (1 + 2 * SIDE))),
    "PNG, 32 MP colour with alpha, 16 bits": lambda: png(SIDE, SIDE, 16, 6, bytes(SIDE * (1 + 8 * SIDE))),
    "PNG, 64 MP colour with alpha, 16 bits": lambda: png(8000, 8000, 16, 6, bytes(8000 * (1 + 8 * 8000))),
    "PNG, 1 x 32,000,000": lambda: png(1, 32_000_000, 8, 0, bytes(2 * 32_000_000)),
    "PNG, 488 x 65,535": lambda: png(488, 65_535, 8, 2, bytes(65_535 * (1 + 3 * 488))),
    "PNG, 1,000 compressed texts of 64 MB": lambda: png(
        8, 8, 8, 0, bytes(72), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64_000_000))) * 1000
    ),
    "PNG, colour profile of 500 MB": lambda: png(
        8, 8, 8, 0, bytes(72), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(500_000_000)))
    ),
    "PNG, 5 million chunks": lambda: png(8, 8, 8, 0, bytes(72), chunk(b"abCd", b"") * 5_000_000),
    "PNG, EXIF of 65,535 x 60 MB": lambda: png(8, 8, 8, 0, bytes(72), chunk(b"eXIf", exif_bomb(60_000_000))),
    "PNG, 1,000 frames": lambda: png(8, 8, 8, 0, bytes(72), chunk(b"acTL", struct.pack(">II", 1000, 0))),
    "TIFF, 32 MP grey, 16 bits, Deflate": lambda: encode(
        texture(1, dtype=np.uint16), "TIFF", compression="tiff_adobe_deflate"
    ),
    "TIFF, 32 MP float, LZW": lambda: encode(
        np.round(texture(1) / 8).astype(np.float32), "TIFF", compression="tiff_lzw"
    ),
    "TIFF, 32 MP colour, LZW": lambda: encode(texture(3) // 16, "TIFF", compression="tiff_lzw"),
    "TIFF, 65,535 tags of the same 60 MB": lambda: (
        b"II*\0"
        + struct.pack("<IH", 8, 65535)
        + b"".join(struct.pack("<HHII", 1000 + i % 60000, 7, 60_000_000, 8) for i in range(65535))
        + bytes(60_000_000)
    ),
    "TIFF, one tile of 2 billion pixels": lambda: tiff(
        tiff_fields(64, 64, 5, t322=2**16, t323=2**15, t324=200, t325=50), bytes(400)
    ),
    "TIFF, strip of 64 x 64 that inflates to 1 GB": lambda: tiff(
        tiff_fields(64, 64, 8, t273=200, t278=64, t279=900_000), zlib.compress(bytes(2**30)).ljust(1_100_000, b"\0")
    ),
    "WebP, 32 MP colour": lambda: encode(texture(3), "WEBP", method=0),
    "WebP, 50 frames": lambda: encode(
        texture(3, 64), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(49)]
    ),
    "BMP, 21 MP colour": lambda: encode(texture(3, 4600), "BMP"),
    "DICOM, 32 MP, 16 bits": lambda: dicom(texture(1, dtype=np.uint16).tobytes(), SIDE, SIDE, 16),
    "DICOM, 16 MP, 32 bits": lambda: dicom(texture(1, 4000).astype("<u4").tobytes(), 4000, 4000, 32),
    "DICOM, 16 MP, 16 bits, JPEG 2000": lambda: dicom(
        jpeg2000(texture(1, 4000, np.uint16)), 4000, 4000, 16, syntax=J2K
    ),
    "DICOM, 32 MP colour, JPEG 2000": lambda: dicom(jpeg2000(texture(3)), SIDE, SIDE, 8, syntax=J2K, samples=3),
    "DICOM, 32 MP colour, JPEG": lambda: dicom(encode(texture(3), "JPEG"), SIDE, SIDE, 8, syntax=JPEG, samples=3),
    "DICOM, 16 MP colour, JPEG": lambda: dicom(encode(texture(3, 3999), "JPEG"), 3999, 3999, 8, syntax=JPEG, samples=3),
    "DICOM, 64 x 64, JPEG of 32 MP": lambda: dicom(encode(texture(1), "JPEG"), 64, 64, 8, syntax=JPEG),
    "DICOM, 64 x 64, JPEG 2000 of 16 MP": lambda: dicom(jpeg2000(texture(1, 4000)), 64, 64, 8, syntax=J2K),
    "DICOM, run lengths of 4 GB": rle_bomb,
    "DICOM, 8 million empty fragments": lambda: dicom(bytes(2), 64, 64, 8, syntax=RLE).replace(
        b"\xfe\xff\xdd\xe0", b"\xfe\xff\x00\xe0\0\0\0\0" * (7 * 2**20) + b"\xfe\xff\xdd\xe0"
    ),
    "DICOM, 100,000 frames": lambda: dicom(bytes(64 * 64), 64, 64, 8).replace(
        b"\x28\0\x10\0US", b"\x28\0\x08\0IS\x06\x00100000\x28\0\x10\0US"
    ),
}


def peak_memory() -> float:
    """Return the peak of the resident memory of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def measure(path: Path, results) -> None:
    import time

    import pydicom.pixels  # noqa: F401

    from preceptor.data.images import ImageError, load_image

    load_image(path.with_name("warm.png"))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = peak_memory(), time.process_time()
    try:
        image = load_image(path)
        outcome = f"{image.mode} {image.width} x {image.height}"
    except ImageError as error:
        outcome = "refused: " + str(error).removeprefix(f"{path}: ").split(";")[0]
    seconds = time.process_time() - start
    results.put((outcome, seconds, peak_memory() - before))


def limits(match: str) -> None:
    context = multiprocessing.get_context("spawn")
    print("| file | outcome | seconds | peak MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(texture(1, 64)).save(Path(folder) / "warm.png")
        for name, make in FILES.items():
            if match not in name:
                continue
            path = Path(folder) / "file"
            path.write_bytes(make())
            results = context.Queue()
            process = context.Process(target=measure, args=(path, results))
            process.start()
            outcome, seconds, peak = results.get(timeout=100)
            process.join()
            print(
                f"| {name} ({path.stat().st_size / 1e6:.1f} MB) | {outcome} | {seconds:.2f} | {peak:.0f} |", flush=True
            )


def dicom_files() -> Iterator[tuple[str, str]]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.data.dicom_files import dicom_paths, reference

    from preceptor.data.images import ImageError, load_image

    for path in dicom_paths():
        try:
            image = load_image(path)
        except ImageError as error:
            yield path.name, "refused: " + str(error).removeprefix(f"{path}: ").split(";")[0]
        else:
            difference = np.abs(np.asarray(image) - reference(path)).max()
            yield path.name, f"{image.mode} {image.width} x {image.height}, difference {difference:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dicom", action="store_true")
    parser.add_argument("--match", default="", help="only files whose name contains this text")
    arguments = parser.parse_args()
    if arguments.dicom:
        print("| file | outcome |\n|---|---|")
        for name, outcome in dicom_files():
            print(f"| {name} | {outcome} |")
    else:
        limits(arguments.match)

"""Image files that are incomplete, stored in rare ways, or made to cost much time or memory."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from preceptor.data import images
from preceptor.data.images import ImageError, load_image, require_images
from preceptor.errors import UserError
from tests.data.test_images import GRADIENT, huge_png, jpeg_bytes, png, png_chunk

# --- Integrity ---

JPEG_OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimize": True},
    {"progressive": True},
    {"restart_marker_blocks": 5},
    {"progressive": True, "restart_marker_blocks": 5},
    {"subsampling": 0, "quality": 30},
    {"subsampling": "4:2:2"},
]


def scans(data: bytes) -> list[tuple[int, int]]:
    """Return where the coded data of each scan of a JPEG begins and ends."""
    found, position = [], 2
    while data[position + 1] != 0xD9:
        is_scan = data[position + 1] == 0xDA
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if is_scan:
            start = position
            position = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]").search(data, start).start()
            found.append((start, position))
    return found


def smooth_jpeg(size: tuple[int, int], **options: Any) -> bytes:
    """Return a JPEG of a smooth picture, whose blocks take few bits."""
    x, y = np.meshgrid(*(np.arange(side) for side in size))
    grey = 127 + 60 * np.sin(x / 7) + 60 * np.cos(y / 5)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([grey, grey / 2, 255 - grey], axis=-1).clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", **options
    )
    return buffer.getvalue()


def half(data: bytes, share: float) -> bytes:
    """Return a JPEG whose coded data is cut, with an end marker."""
    start = data.index(b"\xff\xda") + 20
    return data[: start + int((len(data) - start) * share)].rstrip(b"\xff") + b"\xff\xd9"


@pytest.mark.parametrize("options", JPEG_OPTIONS)
@pytest.mark.parametrize("size", [(8, 8), (40, 24), (300, 200)])
def test_jpeg_without_the_last_bytes_of_a_scan(tmp_path, options, size):
    data = smooth_jpeg(size, **options)
    path = tmp_path / "a.jpg"
    for start, end in scans(data):
        for count in (1, 2, 3, 4):
            if count < end - start:
                path.write_bytes(data[:start] + data[start : end - count].rstrip(b"\xff") + data[end:])
                with pytest.raises(ImageError, match="truncated or damaged JPEG"):
                    load_image(path)
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as whole:
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(whole))


@pytest.mark.parametrize("options", JPEG_OPTIONS)
@pytest.mark.parametrize("size", [(24, 40), (120, 80), (320, 272)])
def test_jpeg_with_another_number_of_blocks_in_its_header(tmp_path, options, size):
    data = smooth_jpeg(size, **options)
    path = tmp_path / "a.jpg"
    frame = next(data.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data)
    width, height = size
    sides = [
        (width + 16, height),
        (width - 16, height),
        (width, height + 16),
        (width, height - 16),
        (width, 2 * height),
    ]
    headers = [(frame + 5, struct.pack(">HH", *reversed(side))) for side in sides]
    # 4:2:0 and 4:1:1 may have the same number of blocks, so that nothing tells them apart.
    headers += [(frame + 11, bytes([factors])) for factors in (0x11, 0x21, 0x22) if data[frame + 11] != factors]
    for position, value in headers:
        path.write_bytes(data[:position] + value + data[position + len(value) :])
        with pytest.raises(ImageError, match=r"a\.jpg: .*JPEG"):
            load_image(path)


def multi_picture(*kinds: int) -> bytes:
    """Return an MPO file of Pillow whose index gives other types to the pictures after the first (CIPA DC-007)."""
    buffer = io.BytesIO()
    picture = Image.linear_gradient("L")
    picture.save(buffer, "MPO", save_all=True, append_images=[picture.rotate(90)] * len(kinds))
    data = bytearray(buffer.getvalue())
    entry = data.index(b"MPF\0") + 4 + 50  # after the header and a directory of three entries
    for number, kind in enumerate(kinds, 1):
        data[entry + 16 * number : entry + 16 * number + 4] = struct.pack("<I", kind)
    return bytes(data)


@pytest.mark.parametrize("kinds", [(0,), (0x020002,), (0x010001, 0x020003)])
def test_several_pictures_in_a_jpeg_are_refused(tmp_path, kinds):
    path = tmp_path / "a.jpg"
    path.write_bytes(multi_picture(*kinds))
    with pytest.raises(ImageError, match=rf"JPEG with {len(kinds) + 1} pictures \(MPO\).*save each frame"):
        load_image(path)


def test_previews_in_a_jpeg_are_not_pictures(tmp_path):
    path = tmp_path / "a.mpo"
    path.write_bytes(multi_picture(0x010001, 0x010002))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(image))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("options", JPEG_OPTIONS)
def test_half_a_jpeg_with_an_end_marker(tmp_path, options, share):
    data = jpeg_bytes(**options)
    path = tmp_path / "a.jpg"
    path.write_bytes(half(data, share))
    with pytest.raises(ImageError, match=r"truncated.*copy the file again"):
        load_image(path)
    path.write_bytes(data + b"trailing\xff\xd8\xffbytes")
    with Image.open(io.BytesIO(data)) as whole:
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(whole))


def test_progressive_jpeg_without_its_last_scan(tmp_path):
    data = jpeg_bytes(progressive=True)
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: data.rindex(b"\xff\xda")] + b"\xff\xd9")
    with pytest.raises(ImageError, match="the last scans are missing"):
        load_image(path)


@pytest.mark.real_data
@pytest.mark.slow
def test_no_real_image_is_refused():
    folder = os.environ.get("PRECEPTOR_DATA")
    if folder is None:
        pytest.skip("needs PRECEPTOR_DATA")
    for path in sorted(Path(folder).rglob("*.jpg")):
        with Image.open(path) as image:
            plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
            np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(plain), err_msg=str(path))


def test_wrong_checksum_of_the_pixels_of_a_png(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    data = path.read_bytes()
    at = data.index(b"IDAT")
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    chunk = data[at : end - 1] + bytes([data[end - 1] ^ 1])  # Adler-32; the CRC of the chunk is right
    path.write_bytes(data[:at] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[end + 4 :])
    with pytest.raises(ImageError, match="wrong checksum or code in the image data"):
        load_image(path)


def test_each_flipped_bit_of_a_png_is_found(tmp_path):
    data = png(tmp_path / "a.png", GRADIENT).read_bytes()
    path = tmp_path / "b.png"
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        with pytest.raises(ImageError):
            load_image(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_other_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **({"compression": "tiff_adobe_deflate"} if suffix == "tif" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"a\.\w+: .*(truncated|damaged|broken|not an image)"):
        load_image(path)


def test_flipped_bits_of_a_deflated_tiff_are_found(tmp_path):
    path = tmp_path / "a.tif"
    noise = np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)
    Image.fromarray(noise).save(path, compression="tiff_adobe_deflate")
    with Image.open(path) as image:
        start, length = image.tag_v2[273][0], image.tag_v2[279][0]
    data = path.read_bytes()
    for position in range(start + 2, start + length, 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ImageError, match="damaged TIFF"):
            load_image(path)


COMPRESSIONS = ["tiff_lzw", "packbits", "tiff_adobe_deflate", "raw"]


def strips(data: bytes) -> list[tuple[int, int]]:
    """Return offset and length of the strips of a TIFF, by Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        return list(zip(image.tag_v2[273], image.tag_v2[279], strict=True))


def tiff_of(values: np.ndarray, compression: str, rows: int, **options: Any) -> bytes:
    """Return a TIFF with `rows` per strip, written by libtiff."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", compression=compression, tiffinfo={278: rows}, **options)
    return buffer.getvalue()


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(90), np.arange(70)).astype(np.uint8)
    return [
        smooth,
        rng.integers(0, 255, (90, 70), np.uint8),
        np.zeros((90, 70), np.uint8),
        np.stack([smooth] * 3, axis=-1),
        smooth.astype(np.uint16) * 100,
        rng.integers(0, 3, (400, 300), np.uint8),
    ]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("rows", [1, 7, 90, 400])
def test_tiff_of_every_compression_is_read(tmp_path, compression, rows):
    path = tmp_path / "a.tif"
    for values in pictures():
        path.write_bytes(tiff_of(values, compression, rows))
        expected = values if values.dtype == np.uint8 else stretched(values)
        np.testing.assert_array_equal(np.asarray(load_image(path)), expected)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_tiff_with_a_strip_that_is_cut_or_ends_in_zeros_is_refused(tmp_path, compression):
    path = tmp_path / "a.tif"
    for values in pictures():
        data = tiff_of(values, compression, 30)
        for offset, length in strips(data)[::2]:
            entry = data.index(struct.pack("<I", length), 8) if data.count(struct.pack("<I", length)) == 1 else None
            for count in (1, 2, 3, length // 2):
                if entry is not None and not (compression == "tiff_adobe_deflate" and count > length - 2):
                    path.write_bytes(data[:entry] + struct.pack("<I", length - count) + data[entry + 4 :])
                    with pytest.raises(ImageError, match=r"TIFF \(.*(strip|pixels)"):
                        load_image(path)
                # The last bytes of PackBits may be pixels, which have no checksum.
                shortest = {"raw": length, "packbits": length // 2}.get(compression, 3)
                if count >= shortest and any(data[offset + length - count : offset + length]):
                    end = offset + length
                    path.write_bytes(data[: end - count] + bytes(count) + data[end:])
                    with pytest.raises(ImageError, match="TIFF"):
                        load_image(path)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("change", [(256, 60), (256, 71), (257, 60), (257, 91), (278, 29), (278, 31)])
def test_tiff_whose_fields_imply_another_number_of_bytes_is_refused(tmp_path, compression, change):
    path = tmp_path / "a.tif"
    for values in pictures()[:3]:
        data = bytearray(tiff_of(values, compression, 30))
        (start,) = struct.unpack_from("<I", data, 4)
        for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
            tag, kind = struct.unpack_from("<HH", data, entry)
            if tag == change[0]:
                struct.pack_into("<H" if kind == 3 else "<I", data, entry + 8, change[1])
        path.write_bytes(data)
        with pytest.raises(ImageError, match="TIFF"):
            load_image(path)


def test_fax_coding_is_refused_because_it_cannot_be_checked(tmp_path):
    path = tmp_path / "a.tif"
    Image.new("1", (40, 30)).save(path, compression="group4")
    with pytest.raises(ImageError, match="TIFF with Compression 4 is not supported; save it as"):
        load_image(path)


# --- Fields that say how pixels are stored ---


def deep_png(values: np.ndarray, extra: bytes = b"") -> bytes:
    """Return a PNG with 16 bits per channel. All five filters are used, which Pillow cannot write."""
    height, channels = len(values), values.shape[2]
    raw = values.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    step = 2 * channels
    left = np.pad(raw, ((0, 0), (step, 0)))[:, :-step]
    up = np.pad(raw, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    paeth = np.select(
        [
            (abs(up - corner) <= abs(left - corner)) & (abs(up - corner) <= abs(left + up - 2 * corner)),
            abs(left - corner) <= abs(left + up - 2 * corner),
        ],
        [left, up],
        corner,
    )
    predictions = [np.zeros_like(raw), left, up, (left + up) // 2, paeth]
    rows = b"".join(bytes([i % 5]) + (raw[i] - predictions[i % 5][i]).astype(np.uint8).tobytes() for i in range(height))
    header = struct.pack(">IIBBBBB", values.shape[1], height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            extra,
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        ]
    )


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(float)
    return np.round((values - values.min()) / (values.max() - values.min()) * 255)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_is_stretched_like_16_bit_grey(tmp_path, channels):
    values = np.random.default_rng(0).integers(100, 4096, (11, 7, channels)).astype(np.uint16)  # 12-bit data
    colours = values if channels == 3 else values[..., :-1]
    if channels != 3:
        values[..., -1] = 65535
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(values))
    expected = stretched(colours)
    np.testing.assert_array_equal(np.asarray(load_image(path)), expected[..., 0] if channels == 2 else expected)
    if channels != 3:
        values[3:5, :, -1] = 0  # transparent values are neither shown nor part of the range
        values[3:5, :, :-1] = 65535
        path.write_bytes(deep_png(values))
        image = np.asarray(load_image(path))
        assert image[3:5].max() == 0
        assert image.max() == 255


def test_transparent_colour_of_a_16_bit_png(tmp_path):
    values = np.array([[[1, 2, 3], [1, 2, 4], [5, 5, 5]]], np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(values, png_chunk(b"tRNS", struct.pack(">3H", 5, 5, 5))))
    assert np.asarray(load_image(path)).tolist() == [[[0, 85, 170], [0, 85, 255], [0, 0, 0]]]


def tiff(values: np.ndarray, order: str, fields: dict[int, tuple[int, ...]], data: bytes | None = None) -> bytes:
    """Return an uncompressed TIFF. `fields` override the tags, `data` replaces the pixels."""
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes() if data is None else data
    samples = values.shape[2] if values.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags: dict[int, tuple[int, ...]] = {
        256: (values.shape[1],),
        257: (values.shape[0],),
        258: (values.dtype.itemsize * 8,) * samples,
        259: (1,),
        262: (2 if samples > 1 else 1,),
        273: (0,),
        277: (samples,),
        279: (len(pixels),),
        339: (kind,) * samples,
        **fields,
    }
    end = 8 + 2 + 12 * len(tags) + 4
    long = b"".join(struct.pack(f"{order}{len(v)}I", *v) for _, v in sorted(tags.items()) if len(v) > 1)
    tags[273] = (end + len(long),)
    entries, offset = b"", end
    for tag, numbers in sorted(tags.items()):
        single = len(numbers) == 1
        entries += struct.pack(f"{order}HHII", tag, 4, len(numbers), numbers[0] if single else offset)
        offset += 0 if single else 4 * len(numbers)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + long + pixels


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "i4", "f4", "f8", "i1"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_is_right_or_refused_by_the_name_of_the_field(tmp_path, order, kind, white_is_zero):
    values = np.random.default_rng(0).integers(0, 100, (5, 6)).astype(kind)
    values *= {"u4": 40_000_000, "i4": 20_000_000, "u2": 600, "i2": 300}.get(kind, 1)
    if kind[0] in "if":
        values -= values.dtype.type(30)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values, order, {262: (0 if white_is_zero else 1,)}))
    expected = values if kind == "u1" else stretched(values)
    supported = {"u1", "u2", "u4", "i2", "i4", "f4"} - ({"u4"} if order == ">" else set())
    if white_is_zero:
        supported = {"u1", "f4"} | ({"u2"} if order == "<" else set())
    if kind in supported:
        np.testing.assert_array_equal(np.asarray(load_image(path)), 255 - expected if white_is_zero else expected)
    else:
        with pytest.raises(ImageError, match=r"BitsPerSample \d+, SampleFormat \d"):
            load_image(path)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_tiff(tmp_path, order):
    values = np.random.default_rng(0).integers(100, 4096, (5, 6, 3)).astype(np.uint16)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values, order, {}))
    np.testing.assert_array_equal(np.asarray(load_image(path)), stretched(values))


def test_12_bit_tiff(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (5, 6)).astype(np.uint16)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values, "<", {258: (12,)}, packed))
    np.testing.assert_array_equal(np.asarray(load_image(path)), stretched(values))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({259: (7,)}, "Compression 7"),
        ({262: (6,)}, "PhotometricInterpretation 6"),
        ({258: (8, 8)}, "BitsPerSample 8 8"),
        ({339: (4,)}, "SampleFormat 4"),
        ({262: (3,), 320: tuple(range(256)) * 3}, "ColorMap"),
        ({277: (4,), 258: (8, 8, 8, 8), 262: (2,)}, "ExtraSamples missing"),
        ({279: (10,)}, "10 of 30 bytes of pixels"),
        ({279: (10**6,)}, "outside the file"),
        ({257: (0,)}, "RowsPerStrip|0 pixels"),
    ],
)
def test_tiff_fields_that_are_refused(tmp_path, fields, name):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(np.zeros((5, 6), np.uint8), "<", fields))
    with pytest.raises(ImageError, match=name):
        load_image(path)


def test_16_bit_tiff_agrees_with_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    values = np.random.default_rng(0).integers(-2000, 2000, (20, 30))
    path = tmp_path / "a.tif"
    for kind in (np.int16, np.uint16, np.uint32, np.int32, np.float32):
        for compressed in (False, True):
            written = sitk.GetImageFromArray(
                np.abs(values).astype(kind) if kind in (np.uint16, np.uint32) else values.astype(kind)
            )
            sitk.WriteImage(written, str(path), compressed)
            expected = stretched(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
            np.testing.assert_array_equal(np.asarray(load_image(path)), expected)


def test_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK").save(path, quality=95)
    assert np.abs(np.asarray(load_image(path)).astype(int) - [200, 30, 40]).max() <= 4


# --- Bounded work ---


def test_jpeg_with_many_scans_is_refused_before_decoding(tmp_path, monkeypatch):
    data = jpeg_bytes(progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    path = tmp_path / "a.jpg"
    path.write_bytes(data[:-2] + last * 200 + b"\xff\xd9")
    monkeypatch.setattr(images, "decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="96 x 96 pixels in 101 or more scans, which takes too long"):
        load_image(path)


def test_long_sides_are_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(huge_png(1, 70_000))
    with pytest.raises(ImageError, match="1 x 70000 pixels, a side longer than 65,535"):
        load_image(path)


def test_compressed_texts_and_profiles_are_not_expanded(tmp_path, monkeypatch):
    body = b"a\0\0" + zlib.compress(bytes(10_000_000))
    bombs = b"".join(png_chunk(kind, body) for kind in (b"zTXt", b"iCCP", b"iTXt"))
    data = huge_png(8, 8)
    path = tmp_path / "a.png"
    path.write_bytes(data[:33] + bombs + data[33:])
    for name in ("chunk_zTXt", "chunk_iCCP", "chunk_iTXt"):
        monkeypatch.setattr(PngImagePlugin.PngStream, name, lambda *_: pytest.fail("expanded"))
    assert load_image(path).size == (8, 8)


def test_tags_that_share_their_bytes_are_refused(tmp_path):
    values = np.zeros((5, 6), np.uint8)
    path = tmp_path / "a.tif"
    whole = tiff(values, "<", {})
    shared = {60000 + i: (0,) for i in range(50)}
    data = bytearray(tiff(values, "<", shared))
    for i in range(50):
        entry = data.index(struct.pack("<HH", 60000 + i, 4))
        data[entry : entry + 12] = struct.pack("<HHII", 60000 + i, 7, len(whole), 0)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="its tags overlap"):
        load_image(path)


# --- Palettes, transparency and incomplete image data of PNG ---


def indexed_png(values: np.ndarray, bits: int, colour: int, extra: bytes = b"", *, cut: int = 0) -> bytes:
    packed = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].reshape(len(values), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(packed, axis=1))
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows[: len(rows) - cut]))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_grey_is_compared_before_it_is_scaled_to_8_bits(tmp_path, bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (9, 13))
    values[0, :2] = 1, 0
    path = tmp_path / "a.png"
    path.write_bytes(indexed_png(values, bits, 0, png_chunk(b"tRNS", b"\0\1")))
    expected = np.where(values == 1, 0, values * 255 // (2**bits - 1))
    np.testing.assert_array_equal(np.asarray(load_image(path)), expected)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (b"", "a palette of 0 bytes"),
        (png_chunk(b"PLTE", bytes(11)), "a palette of 11 bytes"),
        (png_chunk(b"PLTE", bytes(6)), "a pixel has a colour that its palette lacks"),
        (png_chunk(b"PLTE", bytes(12)) * 2, "a chunk PLTE that is doubled"),
        (
            png_chunk(b"tRNS", b"\0") + png_chunk(b"PLTE", bytes(12)),
            "a chunk PLTE that is doubled or at the wrong place",
        ),
    ],
)
def test_palette_that_does_not_give_all_colours_is_refused(tmp_path, extra, reason):
    path = tmp_path / "a.png"
    path.write_bytes(indexed_png(np.arange(4)[None], 2, 3, extra))
    with pytest.raises(ImageError, match=reason):
        load_image(path)


@pytest.mark.parametrize("cut", [1, 14, 60])
def test_png_with_valid_checksums_but_too_few_rows_is_refused(tmp_path, cut):
    path = tmp_path / "a.png"
    path.write_bytes(indexed_png(np.full((9, 13), 7), 8, 0, cut=cut))
    with pytest.raises(ImageError, match="less image data than its header says"):
        load_image(path)


def test_restart_intervals_out_of_order_are_refused(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path, restart_marker_blocks=1)
    path.write_bytes(path.read_bytes().replace(b"\xff\xd3", b"\xff\xd6", 1))
    with pytest.raises(ImageError, match=r"found marker 0xd6 instead of RST3"):
        load_image(path)


def test_panic_of_a_decoder_is_reported_as_a_broken_file(tmp_path, monkeypatch):
    """A decoder written in Rust raises an exception that is no subclass of Exception."""
    path = png(tmp_path / "a.png", GRADIENT)

    class PanicException(BaseException):
        pass

    def panic(*arguments, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(Image, "open", panic)
    with pytest.raises(ImageError, match="broken or truncated PNG"):
        load_image(path)


def test_control_characters_of_a_file_name_are_escaped(tmp_path):
    path = tmp_path / "a\n\x1b[31m\u202eb.png"
    path.write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert r"a\n\x1b[31m\u202eb.png: the file is empty" in str(caught.value)
    with pytest.raises(UserError, match=r"\\u202eb\.png \(t\.csv:2\)"):
        require_images({tmp_path / "\u202eb.png": "t.csv:2"}, tmp_path / "t.csv")


@pytest.mark.parametrize("target", ["loop.png", "gone.png"])
def test_link_that_leads_nowhere_is_reported_as_a_missing_image(tmp_path, target):
    (tmp_path / "loop.png").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"1 of 1 image files are missing.*\n.*loop\.png \(t\.csv:2\)"):
        require_images({tmp_path / "loop.png": "t.csv:2"}, tmp_path / "t.csv")
    with pytest.raises(ImageError, match=r"loop\.png: (too many levels of symbolic links|no such file or directory)"):
        load_image(tmp_path / "loop.png")


def bmp_with_palette(tmp_path: Path) -> bytes:
    """Return a BMP of 4 x 2 pixels with the colours 0 to 3 of a table of 4."""
    image = Image.fromarray(np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.save(tmp_path / "a.bmp")
    return (tmp_path / "a.bmp").read_bytes()


def test_bmp_with_a_colour_table_is_read(tmp_path):
    bmp_with_palette(tmp_path)
    assert np.asarray(load_image(tmp_path / "a.bmp"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bmp_of_every_mode_is_read(tmp_path, mode):
    Image.linear_gradient("L").convert(mode).save(tmp_path / "a.bmp")
    with Image.open(tmp_path / "a.bmp") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.bmp").convert("RGB")), expected)


def test_bmp_whose_pixels_lie_elsewhere_is_refused(tmp_path):
    data = bytearray(bmp_with_palette(tmp_path))
    start = int.from_bytes(data[10:14], "little")
    inside = data.copy()
    inside[10:14] = (start - 8).to_bytes(4, "little")
    (tmp_path / "inside.bmp").write_bytes(inside)
    with pytest.raises(ImageError, match="begin inside its colour table"):
        load_image(tmp_path / "inside.bmp")
    data[start] = 200 if int.from_bytes(data[28:30], "little") == 8 else 0x7F
    data[46:50] = (4).to_bytes(4, "little")
    (tmp_path / "beyond.bmp").write_bytes(data)
    with pytest.raises(ImageError, match="a pixel has a colour that its palette lacks"):
        load_image(tmp_path / "beyond.bmp")

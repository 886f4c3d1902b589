from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from preceptor.data.images import ImageError, content_hash, image_size, load_image, require_images, resolve_image
from preceptor.errors import UserError
from tests.data.dicom_files import dicom

GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def png(path: Path, array: np.ndarray, **save) -> Path:
    Image.fromarray(array).save(path, "PNG", **save)
    return path


def jpeg_bytes(side: int = 96, **save) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", **save)
    return buffer.getvalue()


# --- Pillow: what is read ---


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_png_keeps_its_pixels(tmp_path, mode):
    array = GRADIENT if mode == "L" else np.dstack([GRADIENT, GRADIENT[::-1], GRADIENT.T])
    image = load_image(png(tmp_path / "a.png", array))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), array)


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "tif", "webp"])
def test_other_formats_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (20, 10), (200, 20, 20)).save(path, lossless=True)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(image).astype(int) - [200, 20, 20]).max() <= 3


def test_16_bit_grey_is_stretched_over_8_bits(tmp_path):
    values = np.array([[1000, 1500], [2000, 3000]], dtype=np.uint16)
    image = load_image(png(tmp_path / "a.png", values))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), [[0, 64], [128, 255]])


def test_constant_16_bit_image_is_black(tmp_path):
    assert np.asarray(load_image(png(tmp_path / "a.png", np.full((3, 3), 700, dtype=np.uint16)))).max() == 0


def test_float_tiff_is_stretched_and_nan_refused(tmp_path):
    values = np.array([[-1.0, 0.0], [0.5, 1.0]], dtype=np.float32)
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path)), [[0, 128], [191, 255]])
    values[0, 0] = np.nan
    Image.fromarray(values).save(path)
    with pytest.raises(ImageError, match="not finite"):
        load_image(path)


def test_transparent_parts_become_black(tmp_path):
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3] = 255
    image = load_image(png(tmp_path / "a.png", rgba))
    assert image.mode == "RGB"
    assert np.asarray(image)[..., 0].tolist() == [[200, 200], [0, 0]]


def test_grey_with_alpha_stays_grey(tmp_path):
    image = load_image(png(tmp_path / "a.png", np.array([[[100, 255], [100, 0]]], dtype=np.uint8)))
    assert (image.mode, np.asarray(image).tolist()) == ("L", [[100, 0]])


def test_palette_gives_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    image.save(tmp_path / "b.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "b.png")).tolist() == [[[10, 20, 30], [0, 0, 0]]]


def test_one_bit_image(tmp_path):
    Image.fromarray(np.eye(3, dtype=bool)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.eye(3) * 255)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    Image.fromarray(GRADIENT[:4]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.rot90(GRADIENT[:4], -1))


def test_damaged_exif_has_no_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(GRADIENT[:4]).save(path, exif=exif)
    upright = load_image(path)
    path.write_bytes(path.read_bytes().replace(b"MM\0*", b"MM\1*"))  # no version of TIFF; Pillow ignores it, too
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.rot90(np.asarray(upright)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_size_is_that_of_the_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GRADIENT[:4]).save(path, exif=exif)
    assert image_size(path) == load_image(path).size == ((4, 8) if orientation > 4 else (8, 4))


def test_metadata_is_dropped(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", "Doe^Jane")
    png(tmp_path / "a.png", GRADIENT, pnginfo=info)
    assert load_image(tmp_path / "a.png").info == {}


# --- Pillow: what is refused ---


def test_missing_file_folder_and_empty_file(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty; copy"):
        load_image(tmp_path / "empty.png")


def test_text_named_png(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("Dear colleague, here is the image. " * 20)
    with pytest.raises(ImageError, match=r"a\.png: not an image.*known are PNG, JPEG"):
        load_image(path)


def test_gif_is_not_on_the_list(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "a.gif")
    with pytest.raises(ImageError, match="not an image that can be read"):
        load_image(tmp_path / "a.gif")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg(tmp_path, share, progressive):
    data = jpeg_bytes(progressive=progressive)
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: max(2, int(len(data) * share))])
    with pytest.raises(ImageError, match=r"(?i)a\.jpg: .*(truncated|not an image)"):
        load_image(path)


def test_jpeg_with_a_tail_of_zeros(tmp_path):
    data = jpeg_bytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    Image.open(path).load()  # Pillow alone accepts it, with grey rows
    with pytest.raises(ImageError, match="truncated JPEG"):
        load_image(path)


def test_jpeg_thumbnail_does_not_hide_the_truncation(tmp_path):
    data = jpeg_bytes()
    thumbnail = jpeg_bytes(16)
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = data[:2] + segment + data[2:]
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    assert load_image(path).size == (96, 96)
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    with pytest.raises(ImageError, match="truncated JPEG"):
        load_image(path)


@pytest.mark.parametrize("keep", [10, 40, 200])
def test_truncated_png(tmp_path, keep):
    path = png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ImageError, match=r"a\.png: "):
        load_image(path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    whole = [jpeg_bytes(24), png(tmp_path / "a.png", GRADIENT).read_bytes()]
    whole.append(dicom(tmp_path / "a.dcm", GRADIENT, WindowCenter=100, WindowWidth=50).read_bytes())
    path = tmp_path / "b"
    refused = 0
    for data in whole:
        for _ in range(60):
            broken = bytearray(data)
            for position in rng.integers(0, len(data), 8):
                broken[position] = rng.integers(0, 256)
            path.write_bytes(broken)
            try:
                load_image(path)
            except ImageError:
                refused += 1
    assert refused > 20


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("side", "reason"), [(9000, "9000 x 9000 pixels, more than"), (100_000, "100000 x 100000 pixels, more than")]
)
def test_pixel_ceiling_is_checked_before_decoding(tmp_path, monkeypatch, side, reason):
    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
    path = tmp_path / "a.png"
    path.write_bytes(huge_png(side, side))
    with pytest.raises(ImageError, match=reason):
        load_image(path)


def test_byte_ceiling_is_checked_before_reading(tmp_path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: reading it would exhaust the memory
    with pytest.raises(ImageError, match=r"1,099,511,627,776 bytes, more than the limit of 67,108,864"):
        load_image(path)
    small = png(tmp_path / "b.png", GRADIENT)
    assert load_image(small, max_bytes=small.stat().st_size, max_pixels=64).size == (8, 8)
    with pytest.raises(ImageError, match="8 x 8 pixels, more than the limit of 63"):
        load_image(small, max_pixels=63)


def test_several_frames_are_refused(tmp_path):
    frame = Image.fromarray(GRADIENT)
    for suffix in ("tif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        frame.save(path, save_all=True, append_images=[Image.fromarray(255 - GRADIENT)])
        with pytest.raises(ImageError, match="2 frames"):
            load_image(path)


def test_a_frame_besides_the_image_of_a_png_is_refused(tmp_path):
    """The animation control chunk may say one frame, which is not the image itself."""
    data = png(tmp_path / "a.png", GRADIENT).read_bytes()
    extra = png_chunk(b"acTL", struct.pack(">II", 1, 0))
    frame = png_chunk(b"fcTL", bytes(26)) + png_chunk(b"fdAT", bytes(4) + zlib.compress(bytes(72)))
    path = tmp_path / "b.png"
    path.write_bytes(data[:33] + extra + data[33:-12] + frame + data[-12:])
    with pytest.raises(ImageError, match="PNG with several frames"):
        load_image(path)


# --- hashes and names ---


def test_content_hash(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert content_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"x" * 3_000_000)
    assert content_hash(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    with pytest.raises(ImageError, match="no such file"):
        content_hash(tmp_path / "gone")


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", "C:\\a.png", "..\\a.png", "\\a.png"])
def test_names_outside_the_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"t\.csv:3: image .* leaves the folder"):
        resolve_image(tmp_path, name, "t.csv:3")


@pytest.mark.parametrize("name", ["", ".", "a\0b"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(UserError, match="not a file name"):
        resolve_image(tmp_path, name, "t.csv:3")


def test_names_inside_the_folder(tmp_path):
    assert resolve_image(tmp_path, "./a/b..c.png", "") == tmp_path / "a" / "b..c.png"


def test_missing_images_are_reported_together(tmp_path):
    (tmp_path / "0.png").touch()
    with pytest.raises(UserError) as caught:
        require_images({tmp_path / f"{i}.png": f"line {i}" for i in range(13)}, tmp_path / "t.csv")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 't.csv'}: 12 of 13 image files are missing")
    assert message.count(".png") == 10
    assert "10.png (line 10)" in message
    assert "and 2 more" in message


def test_backslashes_of_windows_are_named(tmp_path):
    (tmp_path / "i").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "i" / name).touch()
    places = {resolve_image(tmp_path, f"i\\{number}.png", ""): f"line {number}" for number in range(2)}
    with pytest.raises(UserError, match=r"2 of 2 image files are missing; write / in the place of .* 'i/0\.png'$"):
        require_images(places, tmp_path / "t.csv")
    with pytest.raises(UserError, match="3 of 3 image files are missing; copy them there"):
        require_images({**places, tmp_path / "i\\2.png": "line 2"}, tmp_path / "t.csv")

"""Burned-in text and identifying headers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from preceptor.auditing.burned_in import has_text
from preceptor.auditing.headers import DICOM_TAGS, identifying_tags
from tests.auditing.made import picture
from tests.data.dicom_files import dicom

NAME = "DOE^JANE 1957-03-01"


def scan(text: str = "", place: tuple[int, int] = (12, 10), side: int = 400) -> Image.Image:
    """Return a bright disc on black, as of a CT, with a text."""
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    draw.ellipse((90, 90, side - 90, side - 90), fill=120)
    draw.text(place, text, fill=255)
    return image


def test_text_in_a_corner_is_suspected() -> None:
    assert has_text(scan(NAME))
    assert has_text(scan(NAME, (250, 380)))
    assert has_text(Image.fromarray(255 - np.asarray(scan(NAME))))  # dark on bright


@pytest.mark.parametrize("image", [scan(), picture(0, 400), Image.new("L", (400, 400), 90), Image.new("L", (5, 5))])
def test_no_text_is_not_suspected(image: Image.Image) -> None:
    assert not has_text(image)


def test_text_in_the_middle_is_not_looked_for() -> None:
    assert not has_text(scan(NAME, (140, 195)))


def test_noise_is_not_text() -> None:
    noise = np.random.default_rng(0).normal(100, 60, (300, 300)).clip(0, 255).astype(np.uint8)
    assert not has_text(Image.fromarray(noise))


def test_exif_and_comments_are_named_and_never_quoted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = NAME  # ImageDescription
    exif[0x0112] = 1  # Orientation: how to show it, no identifier
    exif.get_ifd(0x8769)[0x9286] = NAME.encode()  # UserComment
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    path = tmp_path / "a.jpg"
    picture(0).save(path, exif=exif, comment=NAME.encode())
    assert identifying_tags(path) == ("EXIF GPSInfo", "EXIF ImageDescription", "EXIF UserComment", "JPEG comment")


def test_text_chunks_of_png_are_found_and_their_own_names_not_repeated(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Author", NAME)
    chunks.add_text(NAME[:8], "x")
    path = tmp_path / "a.png"
    picture(0).save(path, pnginfo=chunks)
    assert identifying_tags(path) == ("PNG author", "PNG text")


def test_a_file_without_them_has_none(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.bmp", "a.tiff", "a.webp"):
        picture(0).save(tmp_path / name)
        assert identifying_tags(tmp_path / name) == ()


def test_dicom_identifiers_that_are_filled_in(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = dicom(tmp_path / "a.dcm", pixels, PatientName=NAME, PatientID="", StudyDate="19570301", Modality="CT")
    found = identifying_tags(path)
    assert "DICOM PatientName" in found
    assert "DICOM StudyDate" in found
    assert "DICOM PatientID" not in found  # empty
    assert not any("Modality" in name for name in found)


def test_no_dicom_value_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value that pydicom converts passes through its element class; only that of Rows may."""
    import pydicom.filereader as reader

    seen: list[int] = []
    made = reader.RawDataElement

    def note(tag, vr, length, value, *rest):
        if value:
            seen.append(int(tag))
        return made(tag, vr, length, value, *rest)

    monkeypatch.setattr(reader, "RawDataElement", note)
    path = dicom(tmp_path / "a.dcm", np.zeros((8, 8), np.uint8), PatientName=NAME)
    identifying_tags(path)
    assert 0x00280010 in seen
    assert 0x00100010 not in seen


def test_the_names_are_dicoms() -> None:
    from pydicom.datadict import tag_for_keyword

    assert all(tag_for_keyword(name) is not None for name in DICOM_TAGS)
    assert list(DICOM_TAGS) == sorted(DICOM_TAGS)

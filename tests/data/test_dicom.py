from __future__ import annotations

import io
import re
import struct
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.data import dicom as dicom_renderer
from preceptor.data import dicom_header
from preceptor.data.images import ImageError, image_size, load_image
from tests.data.dicom_files import dicom, dicom_paths, reference

GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_image_size_of_dicom(tmp_path):
    assert image_size(dicom(tmp_path / "a.dcm", GRADIENT[:4])) == (8, 4)


def test_dicom_window_agrees_with_pydicom(tmp_path):
    from pydicom import dcmread
    from pydicom.pixels import apply_rescale, apply_windowing

    values = np.random.default_rng(0).integers(-1024, 3000, (32, 24)).astype(np.int16)
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        path = dicom(
            tmp_path / "a.dcm",
            values,
            RescaleSlope=2,
            RescaleIntercept=-100,
            WindowCenter=[40, 600],
            WindowWidth=[400, 1500],
            VOILUTFunction=function,
        )
        peer = dcmread(path)
        expected = apply_windowing(apply_rescale(peer.pixel_array, peer), peer)
        # pydicom maps the window onto the range of the stored values, rescaled.
        low, high = -(2**15) * 2 - 100, (2**15 - 1) * 2 - 100
        expected = (expected - low) / (high - low) * 255
        image = load_image(path)
        assert (image.mode, image.size) == ("L", (24, 32))
        assert np.abs(np.asarray(image) - expected).max() <= 0.51


def test_dicom_window_by_hand(tmp_path):
    # PS3.3 C.11.2.1.2.1, c = 10, w = 11: black up to 9.5 - 5, white above 9.5 + 5, linear between.
    path = dicom(
        tmp_path / "a.dcm", np.array([[0, 4, 7, 12, 15, 20]], dtype=np.uint16), WindowCenter=10, WindowWidth=11
    )
    expected = [0, 0, round(0.25 * 255), round(0.75 * 255), 255, 255]
    assert np.asarray(load_image(path)).tolist() == [expected]
    path = dicom(tmp_path / "a.dcm", np.array([[9, 10, 11]], dtype=np.uint16), WindowCenter=10.5, WindowWidth=1)
    assert np.asarray(load_image(path)).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 0, "WindowWidth": 0}, {"WindowCenter": "", "WindowWidth": ""}])
def test_dicom_without_a_usable_window_is_stretched(tmp_path, window):
    path = dicom(tmp_path / "a.dcm", np.array([[100, 350], [600, 1100]], dtype=np.uint16), **window)
    np.testing.assert_array_equal(np.asarray(load_image(path)), [[0, 64], [128, 255]])


def test_monochrome1_is_inverted(tmp_path):
    grey = np.asarray(load_image(dicom(tmp_path / "a.dcm", GRADIENT, WindowCenter=90, WindowWidth=120)))
    path = dicom(
        tmp_path / "b.dcm", GRADIENT, WindowCenter=90, WindowWidth=120, PhotometricInterpretation="MONOCHROME1"
    )
    np.testing.assert_array_equal(np.asarray(load_image(path)), 255 - grey)


def test_dicom_colour(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    path = dicom(tmp_path / "a.dcm", array, PhotometricInterpretation="RGB", **colour)
    np.testing.assert_array_equal(np.asarray(load_image(path)), array)
    ycbcr = np.asarray(Image.fromarray(array).convert("YCbCr"))
    path = dicom(tmp_path / "a.dcm", ycbcr, PhotometricInterpretation="YBR_FULL", **colour)
    assert np.abs(np.asarray(load_image(path)).astype(int) - array).max() <= 3
    path = dicom(tmp_path / "a.dcm", GRADIENT, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(ImageError, match="PaletteColorLookupTableDescriptor"):
        load_image(path)


def test_dicom_is_known_by_content(tmp_path):
    path = dicom(tmp_path / "slice.png", GRADIENT)
    assert load_image(path).size == (8, 8)
    liar = tmp_path / "a.dcm"
    Image.fromarray(GRADIENT).save(liar, "PNG")
    with pytest.raises(ImageError, match="named as DICOM, but has no DICM mark"):
        load_image(liar)


def test_dicom_refusals(tmp_path):
    frames = dicom(tmp_path / "a.dcm", np.zeros((8, 8), dtype=np.uint8), NumberOfFrames=3)
    with pytest.raises(ImageError, match=r"a\.dcm: multi-frame DICOM \(3 frames\).*save each frame"):
        load_image(frames)
    big = dicom(tmp_path / "b.dcm", GRADIENT, Rows=60_000, Columns=60_000)
    with pytest.raises(ImageError, match="60000 x 60000 pixels"):
        load_image(big)
    with pytest.raises(ImageError, match="without Rows"):
        load_image(dicom(tmp_path / "c.dcm", GRADIENT, drop=("Rows",)))


def test_truncated_dicom(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((64, 64), dtype=np.uint16))
    data = path.read_bytes()
    for keep in (132, 140, 200, len(data) - 4000, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(ImageError, match=r"a\.dcm: .*DICOM"):
            load_image(path)


def test_deflated_dicom_is_refused_before_inflating(tmp_path):
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    path = dicom(tmp_path / "a.dcm", np.zeros((8, 8), np.uint8), transfer_syntax=DeflatedExplicitVRLittleEndian)
    with pytest.raises(ImageError, match="deflated"):
        load_image(path)


def test_compressed_dicom(tmp_path):
    from pydicom import dcmread
    from pydicom.uid import JPEGLSLossless, RLELossless

    path = dicom(tmp_path / "a.dcm", GRADIENT, WindowCenter=128, WindowWidth=256)
    plain = np.asarray(load_image(path))
    dataset = dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    np.testing.assert_array_equal(np.asarray(load_image(path)), plain)

    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(path)
    with pytest.raises(ImageError, match="truncated DICOM"):
        load_image(path)


def test_compression_without_a_decoder_says_what_is_missing(tmp_path, monkeypatch):
    import pydicom.pixels
    from pydicom import dcmread
    from pydicom.uid import RLELossless

    path = dicom(tmp_path / "a.dcm", GRADIENT)
    dataset = dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)

    class Unavailable:
        is_available = False
        missing_dependencies = ("pylibjpeg - requires pylibjpeg",)

    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda _: Unavailable())
    with pytest.raises(ImageError, match=r"no decoder for RLE Lossless is installed \(pylibjpeg"):
        load_image(path)


def test_dicom_identifiers_are_not_parsed(tmp_path):
    path = dicom(tmp_path / "a.dcm", GRADIENT, WindowWidth=10, WindowCenter=5)
    dataset = dicom_header.parse(path.read_bytes())
    assert "PatientName" not in dataset
    assert "PatientID" not in dataset
    assert load_image(path).info == {}


@pytest.mark.parametrize(
    ("tag", "next_tag"),
    [(b"\x02\x00\x10\x00UI", b"\x28\x00\x02\x00US"), (b"\x28\x00\x50\x10DS", b"\xe0\x7f\x10\x00O")],
    ids=["transfer syntax", "window centre"],
)
def test_broken_lengths_bring_no_identifier_to_light(tmp_path, caplog, tag, next_tag):
    """pydicom takes the fields between for the value, and quotes them in its warning, log line and exception."""
    path = dicom(tmp_path / "a.dcm", GRADIENT, WindowWidth=10, WindowCenter=5)
    data = path.read_bytes().replace(b"\x28\x00\x51\x10DS", b"\x28\x00\x55\x10LO\x08\x00Doe^Jane\x28\x00\x51\x10DS")
    position = data.index(tag) + len(tag)
    length = data.index(next_tag, position) - position - 2
    path.write_bytes(data[:position] + struct.pack("<H", length) + data[position + 2 :])
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("DEBUG"):
        warnings.simplefilter("always")
        try:
            load_image(path)
        except ImageError as error:
            shown = "".join(traceback.format_exception(error))
    assert caught == []
    assert caplog.text == ""
    assert re.search("invalid WindowCenter|compression of an unknown kind", shown)
    assert "Doe" not in shown
    assert "4711" not in shown


# --- The standard ---


def row(path: Path) -> list[int]:
    return np.asarray(load_image(path)).ravel().tolist()


def table(first: int, entries: list[int], bits: int = 8):
    """Return the sequence of a look-up table."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return Sequence([item])


def test_modality_table_comes_before_the_window(tmp_path):
    # PS3.3 C.11.1.1.1: values below the first entry take the first, values above the last entry take the last.
    path = dicom(
        tmp_path / "a.dcm",
        np.array([[0, 10, 11, 12, 200]], np.uint8),
        ModalityLUTSequence=table(10, [300, 200, 100], 10),
        WindowCenter=200.5,
        WindowWidth=201,
    )
    assert row(path) == [255, 255, 128, 0, 0]


def test_voi_table_is_scaled_by_its_bits_and_preferred_to_the_window(tmp_path):
    pixels = np.array([[0, 1, 2, 3]], np.uint8)
    voi = table(1, [1023, 512, 0], 10)
    path = dicom(tmp_path / "a.dcm", pixels, VOILUTSequence=voi, WindowCenter=2, WindowWidth=4)
    assert row(path) == [255, 255, 128, 0]
    signed = np.array([[-3, -2, -1, 0]], np.int16)
    assert row(dicom(tmp_path / "a.dcm", signed, VOILUTSequence=table(-2, [1023, 512, 0], 10))) == [255, 255, 128, 0]


def test_table_of_8_bits_with_more_than_256_entries(tmp_path):
    """pydicom 3.0 keeps the index of an entry in the type of the entries, where it wraps around."""
    path = dicom(tmp_path / "a.dcm", np.array([[0, 256, 511]], np.uint16), VOILUTSequence=table(0, [7] * 511 + [99]))
    assert row(path) == [7, 7, 99]


@pytest.mark.parametrize(
    ("colour", "shape", "expected"),
    [
        ("MONOCHROME2", None, [0, 51, 255]),
        ("MONOCHROME2", "IDENTITY", [0, 51, 255]),
        ("MONOCHROME2", "INVERSE", [255, 204, 0]),
        ("MONOCHROME1", None, [255, 204, 0]),
        ("MONOCHROME1", "INVERSE", [255, 204, 0]),
    ],
)
def test_presentation(tmp_path, colour, shape, expected):
    fields = {"PresentationLUTShape": shape} if shape else {}
    pixels = np.array([[0, 1, 5]], np.uint8)
    assert row(dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation=colour, **fields)) == expected


@pytest.mark.parametrize(
    ("colour", "expected"), [("MONOCHROME2", [0, 0, 0, 128, 255]), ("MONOCHROME1", [0, 0, 255, 127, 0])]
)
def test_padding_is_black_and_does_not_set_the_range(tmp_path, colour, expected):
    pixels = np.array([[-2000, -1990, 100, 200, 300]], np.int16)
    padding = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}
    assert row(dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation=colour, **padding)) == expected


def test_padding_that_is_written_as_unsigned(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[-2000, 100, 300]], np.int16), PixelPaddingValue=-2000)
    data = path.read_bytes().replace(b"\x28\x00\x20\x01SS", b"\x28\x00\x20\x01US")
    path.write_bytes(data)
    assert row(path) == [0, 0, 255]


def test_image_of_padding_only(tmp_path):
    assert row(dicom(tmp_path / "a.dcm", np.full((1, 3), 9, np.uint8), PixelPaddingValue=9)) == [0, 0, 0]


def test_bits_above_bits_stored_are_not_part_of_the_value(tmp_path):
    unsigned = np.array([[0xF000, 0x8800, 0x0FFF]], np.uint16)  # overlays in the four high bits
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    assert row(dicom(tmp_path / "a.dcm", unsigned, BitsStored=12, HighBit=11, **window)) == [0, 128, 255]
    signed = np.array([[0x0800, 0x0000, 0x07FF]], np.uint16).view(np.int16)  # -2048, 0, 2047 without extended sign
    window["WindowCenter"] = 0
    assert row(dicom(tmp_path / "a.dcm", signed, BitsStored=12, HighBit=11, **window)) == [0, 128, 255]


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (1, 1)])
def test_pixel_data_that_is_longer_than_the_image_is_refused(tmp_path, size):
    pixels = np.array([[1, 2], [3, 4]], np.uint16)  # also as several frames, which pydicom makes of it
    with pytest.raises(ImageError, match=r"contradictory PixelData and Rows x Columns \(the data is longer\)"):
        load_image(dicom(tmp_path / "a.dcm", pixels, Rows=size[0], Columns=size[1]))


def test_high_bit_says_where_the_value_is(tmp_path):
    pixels = np.array([[0x000F, 0x8000, 0xFFF0]], np.uint16)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    assert row(dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=15, **window)) == [0, 128, 255]


def test_larger_values_than_bits_stored_in_compressed_data_are_refused(tmp_path):
    from pydicom import dcmread
    from pydicom.uid import RLELossless

    path = dicom(tmp_path / "a.dcm", np.array([[0, 5000]], np.uint16))
    dataset = dcmread(path)
    dataset.compress(RLELossless)
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.save_as(path)
    with pytest.raises(ImageError, match="BitsStored 12, but larger values"):
        load_image(path)


def test_palette(tmp_path):
    palette = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, entries in (("Red", [0, 257 * 10]), ("Green", [257 * 200, 65535]), ("Blue", [0, 0]))
        for part, value in (("Descriptor", [2, 4, 16]), ("Data", np.array(entries, "<u2").tobytes()))
    }
    path = dicom(
        tmp_path / "a.dcm", np.array([[0, 4, 5, 9]], np.uint8), PhotometricInterpretation="PALETTE COLOR", **palette
    )
    assert np.asarray(load_image(path)).tolist() == [[[0, 200, 0], [0, 200, 0], [10, 255, 0], [10, 255, 0]]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"RescaleSlope": 0, "RescaleIntercept": 5}, "RescaleSlope 0"),
        ({"RescaleSlope": 2}, "without RescaleIntercept"),
        (
            {"WindowCenter": 40, "WindowWidth": 0.5},
            "WindowWidth 0.5; with VOILUTFunction LINEAR, it must be at",
        ),
        ({"WindowCenter": 40, "WindowWidth": -3}, "WindowWidth -3"),
        ({"WindowCenter": 40, "WindowWidth": 0}, "WindowWidth 0"),
        ({"WindowCenter": [40, 50], "WindowWidth": 400}, "contradictory WindowCenter and WindowWidth"),
        ({"WindowCenter": 40}, "contradictory WindowCenter and WindowWidth"),
        ({"WindowCenter": 4, "WindowWidth": 4, "VOILUTFunction": "CUBIC"}, "VOILUTFunction"),
        ({"HighBit": 8}, "contradictory BitsAllocated and BitsStored and HighBit"),
        ({"BitsStored": 9}, "BitsStored"),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, "PresentationLUTShape"),
        ({"PresentationLUTShape": "LIN OD"}, "PresentationLUTShape"),
        ({"PixelPaddingRangeLimit": 4}, "PixelPaddingRangeLimit"),
        ({"ModalityLUTSequence": "table", "RescaleSlope": 1, "RescaleIntercept": 0}, "ModalityLUTSequence"),
        ({"ModalityLUTSequence": "short table"}, "LUTData in its ModalityLUTSequence"),
        ({"PixelPresentation": "COLOR"}, "PixelPresentation"),
        ({"drop": ("BitsStored",)}, "without BitsStored"),
        ({"drop": ("PixelRepresentation",)}, "without PixelRepresentation"),
    ],
)
def test_contradictions_are_refused_by_the_name_of_the_field(tmp_path, fields, reason):
    if kind := fields.get("ModalityLUTSequence"):
        sequence = table(0, [1, 2, 3])
        if kind == "short table":
            sequence[0].LUTDescriptor[0] = 4
        fields = {**fields, "ModalityLUTSequence": sequence}
    with pytest.raises(ImageError, match=re.escape(reason)):
        load_image(dicom(tmp_path / "a.dcm", GRADIENT, **fields))


def test_decimal_comma_is_refused_by_the_name_of_the_field(tmp_path):
    path = dicom(tmp_path / "a.dcm", GRADIENT, WindowCenter="40.5", WindowWidth="80")
    path.write_bytes(path.read_bytes().replace(b"40.5", b"40,5"))
    with pytest.raises(ImageError, match=r"a\.dcm: DICOM with an invalid WindowCenter; correct the header"):
        load_image(path)


@pytest.mark.parametrize(("rows", "columns", "samples"), [(16, 8, 1), (8, 16, 1), (8, 8, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_compressed_data_that_disagrees_with_the_header_is_not_decoded(
    tmp_path, monkeypatch, rows, columns, samples, kind
):
    from pydicom.encaps import encapsulate

    buffer = io.BytesIO()
    pixels = np.zeros((rows, columns, 3)[: 3 if samples == 3 else 2], np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **({"no_jp2": True} if kind == "JPEG2000" else {}))
    syntax = "1.2.840.10008.1.2.4.90" if kind == "JPEG2000" else "1.2.840.10008.1.2.4.50"
    path = tmp_path / "a.dcm"
    dicom(path, GRADIENT, transfer_syntax=syntax, pixel_data=encapsulate([buffer.getvalue()]))
    monkeypatch.setattr(dicom_renderer, "decode_pixels", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"\d in its compressed data|\d pixels, more than"):
        load_image(path)


def test_half_a_jpeg_in_a_dicom_is_refused(tmp_path):
    from pydicom.encaps import encapsulate

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    for data, refused in ((whole, False), (whole[: len(whole) // 2] + b"\xff\xd9", True)):
        path = tmp_path / "a.dcm"
        pixels = np.zeros((64, 64), np.uint8)
        dicom(path, pixels, transfer_syntax="1.2.840.10008.1.2.4.50", pixel_data=encapsulate([data]))
        if refused:
            with pytest.raises(ImageError, match="truncated"):
                load_image(path)
        else:
            load_image(path)


@pytest.mark.parametrize("count", [1, 2, 4, 100, 2000])
def test_jpeg_2000_in_a_dicom_that_lacks_its_last_bytes_is_refused(tmp_path, count):
    from pydicom.encaps import encapsulate

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, irreversible=False)
    whole = buffer.getvalue()
    path, syntax = tmp_path / "a.dcm", "1.2.840.10008.1.2.4.90"
    dicom(path, pixels, transfer_syntax=syntax, pixel_data=encapsulate([whole]))
    load_image(path)
    cut = whole[: -2 - count] + b"\xff\xd9"
    dicom(path, pixels, transfer_syntax=syntax, pixel_data=encapsulate([cut]))
    with pytest.raises(ImageError, match="another length than stated"):
        load_image(path)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
def test_lossless_jpeg_in_a_dicom_that_lacks_data_is_refused(tmp_path, capfd, share):
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames

    (path,) = (path for path in dicom_paths() if path.name == "JPEG-LL.dcm")
    data = pydicom.dcmread(path)
    frame = next(generate_frames(data.PixelData, number_of_frames=1)).rstrip(b"\0")
    load_image(path)
    data.PixelData = encapsulate([frame[: int(len(frame) * (1 - share))].rstrip(b"\xff") + b"\xff\xd9"])
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(ImageError, match="truncated or damaged DICOM"):
        load_image(tmp_path / "a.dcm")
    assert not capfd.readouterr().err


def test_run_lengths_that_expand_without_end_are_refused(tmp_path):
    from pydicom.encaps import encapsulate

    bomb = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2**22
    path = dicom(tmp_path / "a.dcm", GRADIENT, transfer_syntax="1.2.840.10008.1.2.5", pixel_data=encapsulate([bomb]))
    with pytest.raises(ImageError, match="run-length"):
        load_image(path)


@pytest.mark.slow
def test_files_of_pydicom_agree_with_its_own_functions():
    """Two of its functions are known to be wrong for a palette in big-endian order, which has a test of its own."""
    differences = {}
    for path in dicom_paths():
        try:
            image = load_image(path)
        except ImageError:
            continue
        differences[path.name] = float(np.abs(np.asarray(image) - reference(path)).max())
    swapped = differences.pop("OBXXXX1A_expb.dcm", 0)
    print(f"{len(differences)} files, largest difference {max(differences.values()):.3f} grey levels; {swapped=}")
    assert len(differences) >= 50
    assert max(differences.values()) <= 1


def test_palette_in_big_endian_order_gives_the_same_colours():
    paths = {path.name: path for path in dicom_paths()}
    if "OBXXXX1A_expb.dcm" not in paths:
        pytest.skip("needs pydicom-data")
    little, big = (np.asarray(load_image(paths[name])) for name in ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"))
    np.testing.assert_array_equal(little, big)


def test_pixel_data_of_several_times_the_size_is_refused(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((16, 16), np.uint8), Rows=8)
    with pytest.raises(ImageError, match="contradictory PixelData and Rows"):
        load_image(path)


def test_table_index_of_8_bit_values_is_exact(tmp_path):
    table_ = table(-5000, [0] * 5100 + [1023] + [0] * 50, 10)
    assert row(dicom(tmp_path / "a.dcm", np.array([[99, 100, 101]], np.int8), VOILUTSequence=table_)) == [0, 255, 0]


def test_first_value_of_a_voi_table_is_signed_if_the_rescaled_values_are(tmp_path):
    pixels = np.array([[0, 1, 2]], np.uint16)  # -1024, -1023 and -1022; 64512 is -1024 as 16 bits without sign
    path = dicom(
        tmp_path / "a.dcm",
        pixels,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        VOILUTSequence=table(64512, [0, 128, 255], 8),
    )
    assert row(path) == [0, 128, 255]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([0, 1, 0, *[1, 60000, 65535] * 300], "invalid SegmentedRed"),
        ([0, 1, 0, 2, 65535, 0, 0], "indirect segments in its SegmentedRed"),
    ],
)
def test_segmented_palettes_do_not_expand_without_bound(tmp_path, words, message):
    data = np.array(words, "<u2").tobytes()
    fields = {f"Segmented{c}PaletteColorLookupTableData": data for c in ("Red", "Green", "Blue")}
    fields |= {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")}
    path = dicom(tmp_path / "a.dcm", np.zeros((8, 8), np.uint8), PhotometricInterpretation="PALETTE COLOR", **fields)
    with pytest.raises(ImageError, match=message):
        load_image(path)


# --- Enhanced images with a single frame ---


def groups(**macros: dict):
    """Return a sequence with one item of functional groups, from their fields by the name of the group."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    item = Dataset()
    for sequence, fields in macros.items():
        inner = Dataset()
        for name, value in fields.items():
            setattr(inner, name, value)
        setattr(item, sequence, Sequence([inner]))
    return Sequence([item])


WINDOW = {"WindowCenter": "40", "WindowWidth": "400"}
RESCALE = {"RescaleSlope": "2", "RescaleIntercept": "-100", "RescaleType": "HU"}


@pytest.mark.parametrize("group", dicom_header.FUNCTIONAL_GROUPS)
def test_window_and_rescale_of_functional_groups_are_those_of_the_top_level(tmp_path, group):
    pixels = np.arange(-300, 300, dtype=np.int16).reshape(20, 30)
    plain = dicom(tmp_path / "plain.dcm", pixels, **WINDOW, **RESCALE)
    macros = groups(FrameVOILUTSequence=WINDOW, PixelValueTransformationSequence=RESCALE)
    enhanced = dicom(tmp_path / "enhanced.dcm", pixels, NumberOfFrames=1, **{group: macros})
    assert row(enhanced) == row(plain) != row(dicom(tmp_path / "none.dcm", pixels))


def test_groups_of_the_frame_replace_the_shared_ones(tmp_path):
    pixels = np.arange(-300, 300, dtype=np.int16).reshape(20, 30)
    shared, frame = groups(FrameVOILUTSequence=WINDOW), groups(FrameVOILUTSequence={**WINDOW, "WindowCenter": "90"})
    both = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": frame}
    expected = row(dicom(tmp_path / "plain.dcm", pixels, WindowCenter="90", WindowWidth="400"))
    assert row(dicom(tmp_path / "enhanced.dcm", pixels, NumberOfFrames=1, **both)) == expected


@pytest.mark.parametrize(("centre", "refused"), [("40", False), ("41", True)])
def test_a_window_of_the_top_level_that_differs_is_refused(tmp_path, centre, refused):
    path = dicom(
        tmp_path / "a.dcm",
        GRADIENT,
        WindowCenter=centre,
        WindowWidth="400",
        SharedFunctionalGroupsSequence=groups(FrameVOILUTSequence=WINDOW),
    )
    if not refused:
        load_image(path)
        return
    with pytest.raises(ImageError, match="contradictory WindowCenter and WindowCenter in its functional groups"):
        load_image(path)


def test_groups_of_several_frames_in_an_image_of_one_are_refused(tmp_path):
    frames = groups(FrameVOILUTSequence=WINDOW)
    frames.append(frames[0])
    path = dicom(tmp_path / "a.dcm", GRADIENT, NumberOfFrames=1, PerFrameFunctionalGroupsSequence=frames)
    with pytest.raises(ImageError, match="contradictory PerFrameFunctionalGroupsSequence and NumberOfFrames"):
        load_image(path)


@pytest.mark.parametrize(("factor", "refused"), [(1, True), (257, False)])
def test_a_palette_of_8_bit_values_that_states_16_bits_is_refused(tmp_path, factor, refused):
    entries = (np.arange(256) * factor).astype("<u2").tobytes()
    palette = {
        f"{name}PaletteColorLookupTable{part}": value
        for name in ("Red", "Green", "Blue")
        for part, value in (("Descriptor", [256, 0, 16]), ("Data", entries))
    }
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="PALETTE COLOR", **palette)
    if not refused:
        assert np.asarray(load_image(path))[..., 0].tolist() == pixels.tolist()
        return
    with pytest.raises(ImageError, match="16 bits in its RedPaletteColorLookupTableDescriptor, but only values below"):
        load_image(path)

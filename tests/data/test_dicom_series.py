"""DICOM series compared with SimpleITK, and series that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, FileDataset, dcmread
from pydicom.uid import EnhancedMRImageStorage, JPEG2000Lossless, MRImageStorage, RLELossless, generate_uid

from preceptor.data import dicom_series
from preceptor.data.dicom_series import holds_series, read_series
from preceptor.data.nifti import Geometry, VolumeError
from preceptor.data.types import Case, VolumeFile
from preceptor.data.volumes import load_case, save_mask
from tests.data.dicom_series_files import changed, enhanced_of, noise, slices_of, write_slices

sitk = pytest.importorskip("SimpleITK")

TURNED = (0.0, 0.96, 0.28, 0.0, -0.28, 0.96)  # sagittal, oblique
FLIPPED = (-1.0, 0, 0, 0, 1, 0)
CORONAL = (1.0, 0, 0, 0, 0, -1)


def of_sitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the volume (X, Y, Z) and the affine in RAS mm by SimpleITK."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return of_image(reader.Execute())


def of_image(image) -> tuple[np.ndarray, np.ndarray]:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine


def same_as_sitk(folder: Path) -> Geometry:
    voxels, grid = read_series(folder)
    theirs, affine = of_sitk(folder)
    assert grid.shape == voxels.shape == theirs.shape
    assert np.allclose(voxels, theirs, rtol=1e-6, atol=1e-4)
    assert np.allclose(grid.affine, affine, atol=1e-5)
    return grid


@pytest.mark.parametrize("orientation", [(1.0, 0, 0, 0, 1, 0), TURNED, FLIPPED, CORONAL])
@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_a_series_is_that_of_simpleitk(tmp_path, orientation, kind):
    slices = slices_of(noise(kind=kind) + kind(30000), orientation=orientation)
    for data in slices:
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
    grid = same_as_sitk(write_slices(tmp_path / "a", slices))
    assert sorted(np.linalg.norm(grid.affine[:3, :3], axis=0)) == pytest.approx([0.5, 1.5, 3])
    assert grid.voxel_volume == pytest.approx(0.5 * 1.5 * 3)


def test_each_slice_has_its_own_rescale(tmp_path):
    slices = slices_of(noise(), kind=MRImageStorage)
    for number, data in enumerate(slices):
        data.RescaleSlope, data.RescaleIntercept = 0.5 + number, 10 * number
    voxels, _ = read_series(write_slices(tmp_path / "a", slices))
    expected = noise().astype(float) * (0.5 + np.arange(5))[:, None, None] + 10 * np.arange(5)[:, None, None]
    assert np.allclose(voxels, expected.transpose(2, 1, 0))


def test_bits_above_bits_stored_are_not_values(tmp_path):
    values = noise() % 2048
    slices = slices_of((values | 0x3000).astype(np.uint16))
    for data in slices:
        data.BitsStored, data.HighBit = 12, 11
    assert np.array_equal(read_series(write_slices(tmp_path / "a", slices))[0], values.transpose(2, 1, 0))
    signed = noise().astype(np.int16) % 2048 - 1024
    slices = slices_of(signed & 0x0FFF)
    for data in slices:
        data.BitsStored, data.HighBit = 12, 11
    assert np.array_equal(read_series(write_slices(tmp_path / "b", slices))[0], signed.transpose(2, 1, 0))


def test_padding_gets_the_smallest_value(tmp_path):
    values = noise() + 5
    values[:, 0, 0] = -2000
    slices = slices_of(values)
    for data in slices:
        data.PixelPaddingValue = -2000
        data["PixelPaddingValue"].VR = "SS"
    voxels, grid = read_series(write_slices(tmp_path / "a", slices))
    expected = noise() + 5
    others = np.ones(expected.shape, bool)
    others[:, 0, 0] = False
    expected[~others] = expected[others].min()
    assert np.array_equal(voxels, expected.transpose(2, 1, 0))
    assert "5 padding pixels" in grid.remarks[0]


def test_a_modality_lut_is_applied(tmp_path):
    from pydicom.dataset import Dataset

    slices = slices_of((noise() % 8).astype(np.uint16))
    table = np.arange(0, 800, 100, dtype=np.uint16)[::-1]
    for data in slices:
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType = [8, 0, 16], "US"
        item["LUTDescriptor"].VR = "US"
        item.add_new("LUTData", "OW", table.tobytes())
        data.ModalityLUTSequence = [item]
    voxels, _ = read_series(write_slices(tmp_path / "a", slices))
    assert np.array_equal(voxels, table[noise() % 8].transpose(2, 1, 0))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_series(tmp_path, syntax):
    pytest.importorskip("openjpeg")
    values = noise((3, 64, 48))
    slices = slices_of(values.astype(np.uint16))
    for data in slices:
        data.compress(syntax)
    assert np.array_equal(read_series(write_slices(tmp_path / "a", slices))[0], values.transpose(2, 1, 0))


def test_masks_go_back_to_the_grid_of_the_series(tmp_path):
    folder = write_slices(tmp_path / "t1", slices_of(noise(), orientation=TURNED))
    loaded = load_case(Case("c", {"t1": VolumeFile(folder)}, None, "c", "test"))
    save_mask(tmp_path / "out.nii.gz", (loaded.images["t1"] > 1000).astype(np.uint8), loaded)
    ours, affine = of_image(sitk.ReadImage(str(tmp_path / "out.nii.gz")))
    theirs, expected = of_sitk(folder)
    assert np.allclose(affine, expected, atol=1e-4)
    assert np.array_equal(ours, theirs > 1000)
    # A NIfTI file that SimpleITK writes from the series is on the same grid.
    sitk.WriteImage(sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))), tmp_path / "t2.nii.gz")
    both = Case("c", {"t1": VolumeFile(folder), "t2": VolumeFile(tmp_path / "t2.nii.gz")}, None, "c", "test")
    again = load_case(both)
    assert np.array_equal(again.images["t1"], again.images["t2"])


def spoil(how: str) -> list:
    slices = slices_of(noise())
    if how == "two series":
        return slices + slices_of(noise(seed=1), origin=(0, 0, 0))
    if how == "gap":
        del slices[2]
    if how == "copy":
        changed(slices, 3, {"ImagePositionPatient": slices[2].ImagePositionPatient})
    if how == "orientation":
        changed(slices, 3, {"ImageOrientationPatient": list(TURNED)})
    if how == "size":
        changed(slices, 3, {"Rows": 4, "Columns": 6})
    if how == "pixel size":
        changed(slices, 3, {"PixelSpacing": [2.0, 2.0]})
    if how == "localizer":
        changed(slices, 3, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    if how == "tilt":
        changed(slices, 3, {"GantryDetectorTilt": 15})
    if how == "shear":
        for number, data in enumerate(slices):
            data.ImagePositionPatient = [-20, -30 + 0.8 * number, 40 + 3 * number]
    if how == "small shear":
        for number, data in enumerate(slices):
            data.ImagePositionPatient = [-20, -30 + 0.02 * number, 40 + 3 * number]
    if how == "no position":
        changed(slices, 3, {"ImagePositionPatient": None})
    if how == "colour":
        changed(slices, 3, {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0})
    if how == "inverted":
        changed(slices, 3, {"PhotometricInterpretation": "MONOCHROME1"})
    if how == "frames":
        for data in slices:
            data.SOPClassUID, data.NumberOfFrames = EnhancedMRImageStorage, 2
    if how == "slope":
        changed(slices, 3, {"RescaleSlope": 0, "RescaleIntercept": 0})
    if how == "high bit":
        changed(slices, 3, {"BitsStored": 12})
    if how == "short":
        changed(slices, 3, {"PixelData": slices[3].PixelData[:-4]})
    if how == "modality":
        changed(slices, 3, {"Modality": "PT"})
    if how == "echo":
        changed(slices, 3, {"EchoTime": 90})
    if how == "dose":
        changed(slices, 3, {"Modality": "RTDOSE"})
    if how == "float":
        changed(slices, 3, {"PixelData": None, "FloatPixelData": b"\0" * 96})
    if how == "one":
        del slices[1:]
    return slices


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("two series", r"contains 2 DICOM series \(10 files\); move each series to its own folder"),
        ("gap", r"are 6 mm apart, other slices 3 mm, so that slices are missing"),
        ("copy", "are at the same position"),
        ("orientation", "different orientations"),
        ("size", r"has 4 x 6 pixels, but IM0003.dcm has 6 x 4"),
        ("pixel size", "different pixel sizes"),
        ("localizer", r"a localizer \(ImageType\)"),
        ("tilt", r"tilted by 15 degrees \(GantryDetectorTilt\)"),
        ("shear", r"shifted sideways by up to 3.2 mm \(tilted gantry\)"),
        ("small shear", r"shifted sideways by up to 0.08 mm"),
        ("no position", "without ImagePositionPatient has no place in space"),
        ("colour", "in colour is not read"),
        ("inverted", "MONOCHROME1"),
        ("frames", "Enhanced MR Image Storage"),
        ("slope", "RescaleSlope and RescaleIntercept are not a scale"),
        ("high bit", "HighBit 15 with BitsStored 12"),
        ("short", "broken or truncated DICOM"),
        ("modality", "different Modality; move each volume to its own folder"),
        ("echo", "different EchoTime; move each volume"),
        ("dose", "an object of the kind RTDOSE is not an image"),
        ("float", "DICOM without PixelData"),
        ("one", "are not a volume"),
    ],
)
def test_what_is_not_a_box_of_slices_is_refused(tmp_path, how, message):
    folder = write_slices(tmp_path / "a", spoil(how))
    with pytest.raises(VolumeError, match=message) as caught:
        read_series(folder)
    text = str(caught.value)
    assert "DOE" not in text
    assert "4711" not in text
    assert str(tmp_path) in text


ORDER = [2, 0, 3, 1, 4]


def enhanced(**options: Any) -> FileDataset:
    values = np.random.default_rng(0).integers(0, 999, (5, 6, 7)).astype(np.uint16)
    return enhanced_of(slices_of(values, kind=MRImageStorage, **options), ORDER)


@pytest.mark.parametrize("orientation", [(1.0, 0, 0, 0, 1, 0), TURNED, FLIPPED, CORONAL])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_an_enhanced_image_is_the_volume_of_its_frames(tmp_path, orientation, syntax):
    values = np.random.default_rng(0).integers(0, 999, (5, 40, 36)).astype(np.uint16)
    slices = slices_of(values, orientation=orientation, kind=MRImageStorage)
    data = enhanced_of(slices, ORDER)
    if syntax:
        data.compress(syntax)
    volume, geometry = read_series(write_slices(tmp_path / "enhanced", [data]))
    expected, affine = of_sitk(write_slices(tmp_path / "slices", slices))
    np.testing.assert_array_equal(volume, expected.astype(int) * 2 - 7)
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-5)


def test_an_enhanced_image_agrees_with_simpleitk(tmp_path):
    volume, _ = read_series(write_slices(tmp_path / "enhanced", [enhanced()]))
    read = of_image(sitk.ReadImage(str(next((tmp_path / "enhanced").iterdir()))))[0]
    # SimpleITK takes the frames in the order of the file.
    np.testing.assert_array_equal(volume[..., ORDER], read)


def without_a_frame(data: FileDataset) -> None:
    del data.PerFrameFunctionalGroupsSequence[0]


def cut(data: FileDataset) -> None:
    data.PixelData = data.PixelData[:-84]


def two_stacks(data: FileDataset) -> None:
    data.PerFrameFunctionalGroupsSequence[0].FrameContentSequence[0].StackID = "2"


def turned_frame(data: FileDataset) -> None:
    data.PerFrameFunctionalGroupsSequence[0].PlaneOrientationSequence = [Dataset()]
    data.PerFrameFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = list(CORONAL)


def moved_frame(data: FileDataset) -> None:
    position = data.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0].ImagePositionPatient
    position[2] += 3


def no_place(data: FileDataset) -> None:
    del data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_frame, "5 frames, but functional groups for 4"),
        (cut, "PixelData has not the size of 5 frames"),
        (two_stacks, "2 stacks of frames in one file"),
        (turned_frame, "different orientations"),
        (moved_frame, "6 mm apart, other slices 3 mm"),
        (no_place, "without ImagePositionPatient has no place in space"),
    ],
)
def test_an_enhanced_image_that_is_no_box_is_refused(tmp_path, change, message):
    data = enhanced()
    change(data)
    with pytest.raises(VolumeError, match=message):
        read_series(write_slices(tmp_path / "enhanced", [data]))


def first_ten(count: int = 10, **fields: int) -> list[Any]:
    """Return the slices at the first positions of ten, numbered from the first."""
    slices = slices_of(np.random.default_rng(0).integers(0, 99, (10, 6, 5)).astype(np.int16))
    for number, data in enumerate(slices, 1):
        data.InstanceNumber = number
        for name, value in fields.items():
            setattr(data, name, value)
    return slices[:count]


@pytest.mark.parametrize(
    ("slices", "remark"),
    [
        (first_ten()[2:], "the InstanceNumber of 8 slices runs from 3 to 10, so that slices may be missing"),
        (first_ten()[::2], "the InstanceNumber of 5 slices runs from 1 to 9, so that slices may be missing"),
        (first_ten(8, ImagesInAcquisition=10), "8 slices, but ImagesInAcquisition says 10; slices are missing, or"),
        (first_ten(NumberOfTemporalPositions=3), "one volume of a series with 3 times"),
    ],
)
def test_slices_that_may_be_missing_at_the_ends_are_a_remark(tmp_path, slices, remark):
    _, geometry = read_series(write_slices(tmp_path / "series", slices))
    assert [found for found in geometry.remarks if found.startswith(remark)] == list(geometry.remarks)
    assert geometry.remarks


def test_fewer_slices_than_stated_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="9 slices, but NumberOfSlices says 10, so that slices are missing"):
        read_series(write_slices(tmp_path / "series", first_ten(9, NumberOfSlices=10)))


def test_a_whole_series_has_no_remarks(tmp_path):
    whole = first_ten(ImagesInAcquisition=10, NumberOfSlices=10, NumberOfTemporalPositions=1)
    assert read_series(write_slices(tmp_path / "series", whole))[1].remarks == ()


def test_other_files_and_limits(tmp_path, monkeypatch):
    folder = write_slices(tmp_path / "a", slices_of(noise()), lambda number: f"IM{number}")
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert holds_series(folder)
    assert read_series(folder)[1].remarks == ("2 files that are not DICOM were ignored: DICOMDIR, notes.txt",)
    with pytest.raises(VolumeError, match="120 voxels are more than the limit of 100"):
        read_series(folder, max_voxels=100)
    monkeypatch.setattr(dicom_series, "MAX_FILES", 4)
    with pytest.raises(VolumeError, match="5 files are more than the limit of 4"):
        read_series(folder)
    monkeypatch.undo()
    (folder / "IM9").write_text("x")
    with pytest.raises(VolumeError, match="IM9: not a DICOM file"):
        read_series(folder)


def test_only_geometry_and_pixels_are_parsed(tmp_path):
    folder = write_slices(tmp_path / "a", slices_of(noise()))
    tags = {element.keyword for element in dcmread(next(folder.iterdir()), specific_tags=dicom_series._PIXEL_FIELDS)}
    assert not tags & {"PatientName", "PatientID", "SeriesDescription", "StudyInstanceUID"}


def test_a_flipped_byte_of_a_header_never_raises_anything_else(tmp_path):
    """Whatever a header holds: the series is read, or refused with a sentence without header values."""
    folder = write_slices(tmp_path / "a", slices_of(noise((3, 4, 4))))
    file = sorted(folder.iterdir())[0]
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    messages: list[str] = []
    for _ in range(60):
        data = bytearray(whole)
        place = int(random.integers(132, len(data)))
        data[place] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
        try:
            read_series(folder)
        except VolumeError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("DOE" in message for message in messages)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm"])
def test_slices_with_headers_of_scanners(tmp_path, name):
    """Three copies of a slice of pydicom's data, moved along its normal."""
    from pydicom.data import get_testdata_file

    for number in range(3):
        data = dcmread(get_testdata_file(name, download=False))
        row, column = np.array(data.ImageOrientationPatient).reshape(2, 3)
        place = np.array(data.ImagePositionPatient) + 2.5 * number * np.cross(row, column)
        data.ImagePositionPatient = [float(f"{value:.8g}") for value in place]
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.save_as(tmp_path / f"{2 - number}.dcm")
    assert same_as_sitk(tmp_path).spacing[0] == pytest.approx(2.5, abs=1e-4)


def test_a_new_uid_for_every_slice_is_not_one_series(tmp_path):
    slices = slices_of(noise())
    for data in slices:
        data.SeriesInstanceUID = generate_uid()
    with pytest.raises(VolumeError, match="contains 5 DICOM series"):
        read_series(write_slices(tmp_path / "a", slices))


def test_series_that_is_split_into_subfolders_is_not_read_in_part(tmp_path):
    slices = slices_of(noise())
    folder = write_slices(tmp_path / "t1", slices[:3])
    write_slices(folder / "more", slices[3:])
    with pytest.raises(VolumeError, match="t1 and its folder more both contain DICOM files"):
        read_series(folder)

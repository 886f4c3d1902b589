"""DICOM Segmentation objects read back with highdicom and with dcmqi, against the masks that were written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import MRImageStorage, generate_uid

from preceptor import api
from preceptor.data.dicom_seg import is_lesion, write_dicom_seg
from preceptor.data.dicom_series import read_series
from preceptor.errors import UserError
from tests.data.dicom_series_files import enhanced_of, noise, slices_of, write_slices
from tests.fuzz.model_folders import templates

hd = pytest.importorskip("highdicom")

STRAIGHT = (1.0, 0, 0, 0, 1, 0)
TURNED = (0.0, 0.96, 0.28, 0.0, -0.28, 0.96)
FLIPPED = (-1.0, 0, 0, 0, 1, 0)
CORONAL = (1.0, 0, 0, 0, 0, -1)
REGIONS = {"et": "labels 4", "wt": "labels 1, 2, 4"}


def write_series(folder: Path, shape: tuple[int, int, int] = (5, 6, 4), **options) -> Path:
    """Write a series of one study with the fields that real ones have."""
    slices = slices_of(noise(shape), kind=MRImageStorage, **options)
    study, frame_of_reference = generate_uid(), generate_uid()
    for data in slices:
        data.StudyInstanceUID, data.FrameOfReferenceUID = study, frame_of_reference
        data.PatientID, data.PatientBirthDate, data.PatientSex = "HOSP_4711", "19700101", "F"
        data.AccessionNumber = "ACC_17"
        data.StudyDate, data.PatientAge = "20200202", "050Y"
    return write_slices(folder, slices)


def random_masks(series: Path) -> np.ndarray:
    """Return overlapping masks (2, X, Y, Z) of a series; some slices are empty."""
    volume, _ = read_series(series)
    masks = np.random.default_rng(1).random((2, *volume.shape)) > 0.6
    masks[:, :, :, 1] = False
    return masks


def positions(mask: np.ndarray, affine: np.ndarray) -> set[tuple[float, ...]]:
    """Return the places in mm (left, posterior, superior) of the voxels of a mask."""
    indices = np.argwhere(mask)
    places = np.c_[indices, np.ones(len(indices))] @ affine.T
    return {tuple(row) for row in (np.round(places[:, :3], 2) + 0.0)}


@pytest.mark.parametrize("orientation", [STRAIGHT, TURNED, FLIPPED, CORONAL])
def test_highdicom_reads_the_masks_at_their_places(tmp_path: Path, orientation) -> None:
    series = write_series(tmp_path / "a", orientation=orientation)
    masks, (_, grid) = random_masks(series), read_series(series)
    write_dicom_seg(tmp_path / "a.dcm", masks, REGIONS, series)
    found = hd.seg.segread(tmp_path / "a.dcm")
    volume = found.get_volume(combine_segments=False)
    to_lps = np.diag([-1.0, -1, 1, 1]) @ grid.affine
    for number, label in enumerate(REGIONS):
        assert found.get_segment_description(number + 1).segment_label == label
        assert positions(volume.array[..., number], volume.affine) == positions(masks[number], to_lps)
    sources = {dcmread(file).SOPInstanceUID for file in series.iterdir()}
    assert {uids[2] for uids in found.get_source_image_uids()} <= sources


def test_dcmqi_reads_the_masks_at_their_places(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    tool = shutil.which("segimage2itkimage") or str(Path(shutil.which("python") or "").parent / "segimage2itkimage")
    if not Path(tool).exists():
        pytest.skip("dcmqi is not installed")
    series = write_series(tmp_path / "a", orientation=TURNED)
    masks, (_, grid) = random_masks(series), read_series(series)
    write_dicom_seg(tmp_path / "a.dcm", masks, REGIONS, series)
    (tmp_path / "out").mkdir()
    command = [tool, "--inputDICOM", tmp_path / "a.dcm", "--outputDirectory", tmp_path / "out", "--outputType", "nii"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    to_lps = np.diag([-1.0, -1, 1, 1]) @ grid.affine
    for number in range(2):
        (file,) = (tmp_path / "out").glob(f"*{number + 1}.nii.gz")
        image = sitk.ReadImage(str(file))
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        theirs = sitk.GetArrayFromImage(image).transpose(2, 1, 0) > 0
        assert positions(theirs, affine) == positions(masks[number], to_lps)


def test_fields_of_the_patient_are_copied_on_request_only(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a")
    masks = random_masks(series)
    write_dicom_seg(tmp_path / "empty.dcm", masks, REGIONS, series)
    write_dicom_seg(tmp_path / "copied.dcm", masks, REGIONS, series, copy_patient=True)
    source = dcmread(next(series.iterdir()))
    empty, copied = dcmread(tmp_path / "empty.dcm"), dcmread(tmp_path / "copied.dcm")
    assert copied.PatientName == source.PatientName
    assert (copied.PatientID, copied.PatientBirthDate, copied.AccessionNumber) == ("HOSP_4711", "19700101", "ACC_17")
    assert (empty.PatientBirthDate, empty.PatientSex, empty.StudyDate) == ("", "", "")
    assert empty.StudyInstanceUID == source.StudyInstanceUID
    content = (tmp_path / "empty.dcm").read_bytes()
    for text in (b"DOE", b"HOSP_4711", b"ACC_17", b"050Y"):
        assert text not in content


def rewrite(series: Path, **fields) -> None:
    """Set fields of all slices; None deletes a field."""
    for file in series.iterdir():
        data = dcmread(file)
        for name, value in fields.items():
            if value is None:
                del data[name]
            else:
                setattr(data, name, value)
        data.save_as(file)


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO-IR 100", "Müller^Jörg"),  # misspelt
        ("ISO_IR 100", "Müller^Jörg"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Διονυσιος"),
    ],
)
def test_copied_texts_keep_their_characters(tmp_path: Path, character_set, name: str) -> None:
    series = write_series(tmp_path / "a")
    rewrite(series, SpecificCharacterSet=character_set, PatientName=name)
    write_dicom_seg(
        tmp_path / "a.dcm", random_masks(series), {"肝": "labels 1", "wt": "labels 2"}, series, copy_patient=True
    )
    found = hd.seg.segread(tmp_path / "a.dcm")
    assert (str(found.PatientName), found.SpecificCharacterSet) == (name, "ISO_IR 192")
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == ["肝", "wt"]


@pytest.mark.parametrize("character_set", [None, "NO SUCH SET"])
def test_characters_that_nobody_can_know_are_copied_as_bytes(tmp_path: Path, character_set: str | None) -> None:
    series = write_series(tmp_path / "a")
    written = "Müller^".encode()
    fields = {} if character_set is None else {"SpecificCharacterSet": character_set}
    rewrite(series, PatientName=written, **fields)
    write_dicom_seg(tmp_path / "a.dcm", random_masks(series), REGIONS, series, copy_patient=True)
    found = dcmread(tmp_path / "a.dcm")
    assert "SpecificCharacterSet" not in found
    assert found.get_item("PatientName").value.rstrip() == written
    with pytest.raises(UserError, match="names of regions need one"):
        write_dicom_seg(tmp_path / "b.dcm", random_masks(series)[:1], {"肝": "labels 1"}, series, copy_patient=True)


def test_fields_of_the_patient_are_copied_as_they_are_and_never_quoted(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a")
    rewrite(series, PatientBirthDate="1970-01-01", PatientSex="m", PatientWeight="70.25")
    for file in series.iterdir():
        file.write_bytes(file.read_bytes().replace(b"70.25", b"70,25"))
    write_dicom_seg(tmp_path / "a.dcm", random_masks(series), REGIONS, series, copy_patient=True)
    found = hd.seg.segread(tmp_path / "a.dcm")
    assert (found.PatientBirthDate, found.PatientSex, found.PatientWeight) == ("1970-01-01", "m", "70,25")
    rewrite(series, SpecificCharacterSet="ISO_IR 192", PatientName=b"D\xfcrer^ALBRECHT")
    with pytest.raises(UserError, match="PatientName is not written in the SpecificCharacterSet") as caught:
        write_dicom_seg(tmp_path / "b.dcm", random_masks(series), REGIONS, series, copy_patient=True)
    assert "ALBRECHT" not in str(caught.value)


def test_regions_are_lesions_by_their_names_only(tmp_path: Path) -> None:
    lesions = ["et", "TC", "wt", "tumor", "liver_tumour", "white matter lesions", "Lesion1"]
    others = ["liver", "whole", "1", "edema", "peritumoral", "tumorous_liver"]
    assert [name for name in (*lesions, *others) if is_lesion(name)] == lesions
    series = write_series(tmp_path / "a")
    write_dicom_seg(tmp_path / "a.dcm", random_masks(series), {"liver": "labels 1", "tumor": "labels 2"}, series)
    names = ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence")
    codes = [[segment[name][0].CodeValue for name in names] for segment in dcmread(tmp_path / "a.dcm").SegmentSequence]
    assert codes == [["85756007", "85756007"], ["49755003", "52988006"]]  # SNOMED CT: tissue; lesion


@pytest.mark.parametrize("thickness", [None, ""])
def test_a_series_without_a_thickness_of_slices(tmp_path: Path, thickness: str | None) -> None:
    series = write_series(tmp_path / "a", spacing=(1.5, 0.5, 2.5))
    rewrite(series, SliceThickness=thickness)
    write_dicom_seg(tmp_path / "a.dcm", random_masks(series), REGIONS, series)
    found = hd.seg.segread(tmp_path / "a.dcm")
    measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == 2.5
    assert found.get_volume(combine_segments=False).spacing[0] == pytest.approx(2.5)


def test_an_enhanced_file_with_frames_in_another_order(tmp_path: Path) -> None:
    slices = slices_of(noise((5, 6, 4)), kind=MRImageStorage)
    data = enhanced_of(slices, [3, 0, 4, 1, 2])
    data.FrameOfReferenceUID = generate_uid()
    folder = tmp_path / "a"
    folder.mkdir()
    data.save_as(folder / "a.dcm", enforce_file_format=True)
    masks, (_, grid) = random_masks(folder), read_series(folder)
    write_dicom_seg(tmp_path / "a.dcm", masks, REGIONS, folder)
    volume = hd.seg.segread(tmp_path / "a.dcm").get_volume(combine_segments=False)
    to_lps = np.diag([-1.0, -1, 1, 1]) @ grid.affine
    assert positions(volume.array[..., 0], volume.affine) == positions(masks[0], to_lps)


def test_an_empty_mask_is_written(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a")
    write_dicom_seg(tmp_path / "a.dcm", np.zeros_like(random_masks(series)), REGIONS, series)
    assert not hd.seg.segread(tmp_path / "a.dcm").get_volume(combine_segments=False).array.any()


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a")
    with pytest.raises(UserError, match=r"must end in \.dcm"):
        write_dicom_seg(tmp_path / "a.nii", random_masks(series), REGIONS, series)
    rewrite(series, FrameOfReferenceUID=None)
    with pytest.raises(UserError, match=r"cannot refer to it, because \S+ has no FrameOfReferenceUID"):
        write_dicom_seg(tmp_path / "a.dcm", random_masks(series), REGIONS, series)
    other = write_slices(tmp_path / "b", slices_of(noise((5, 6, 4))))  # each with its own study
    rewrite(other, FrameOfReferenceUID=generate_uid())
    with pytest.raises(UserError, match="its slices have 5 different StudyInstanceUID"):
        write_dicom_seg(tmp_path / "a.dcm", random_masks(other), REGIONS, other)


@pytest.mark.slow
def test_predict_writes_the_object_beside_the_label_map(tmp_path: Path) -> None:
    series = write_series(tmp_path / "flair", shape=(16, 16, 16), orientation=CORONAL)
    options = {"files": {"flair": series}, "output": tmp_path / "out", "dicom_seg": True}
    (row,) = api.predict(templates() / "segmentation", **options)
    import nibabel

    label = nibabel.load(row["mask"])
    volume = hd.seg.segread(row["dicom_seg"]).get_volume(combine_segments=False)
    to_lps = np.diag([-1.0, -1, 1, 1]) @ label.affine
    assert positions(volume.array[..., 0], volume.affine) == positions(label.get_fdata() == 1, to_lps)
    options |= {"files": {"flair": templates() / "p0_flair.nii"}, "output": tmp_path / "other"}
    with pytest.raises(UserError, match="no DICOM series"):
        api.predict(templates() / "segmentation", **options)
    assert not (tmp_path / "other").exists(), "asked before anything is segmented"


def test_highdicom_is_asked_for_before_anything_is_segmented(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    options = {"files": {"flair": templates() / "p0_flair.nii"}, "output": tmp_path / "out", "dicom_seg": True}
    with pytest.raises(UserError, match=r"pip install 'preceptor\[dicom-seg\]'"):
        api.predict(templates() / "segmentation", **options)
    assert not (tmp_path / "out").exists()

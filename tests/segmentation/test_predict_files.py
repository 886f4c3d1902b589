"""`preceptor predict` of a segmentation model: which files it reads, and that it writes over none but its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

import preceptor
from preceptor.cli.inference import format_ml, show_case
from preceptor.data.dicom_seg import write_dicom_seg
from preceptor.data.dicom_series import read_series
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import VolumeError
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.errors import UserError
from preceptor.files import sha256
from preceptor.pipeline.predictions import Origin
from preceptor.segmentation import predict as predict_module
from preceptor.segmentation.config import EvaluationConfig
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings
from preceptor.segmentation.evaluate import reference_masks
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.predict import Segmentation, SegmentationModel
from preceptor.segmentation.prediction_files import STARTED
from preceptor.segmentation.score import score_file
from tests.command_line import call
from tests.data.dicom_series_files import noise, slices_of, write_slices
from tests.data.volume_files import LPS, head, lesion, save

MARK = "SECRET"


def made_model(modalities: tuple[str, ...] = ("flair", "t1"), **preparation) -> SegmentationModel:
    """Return a network of random weights."""
    network = MultimodalUNet(MultimodalUNetConfig(modalities, ("whole",), channels=(2, 2, 4)), seed=0)
    config = {
        "regions": {"whole": [1]},
        "preparation": {"patch_size": [16, 16, 16], "intensity": "zscore", "spacing": None} | preparation,
        "inference": EvaluationConfig().model_dump(mode="json"),
        "validation": {"flair": {"whole": 0.5}, "flair+t1": {"whole": 0.75}},
        "data": {"validation": 4},
    }
    return SegmentationModel(network, config)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made_model().save_pretrained(folder)
    return folder


def ids(model: Path, tmp_path: Path, **inputs) -> list[str]:
    return [row["id"] for row in preceptor.predict(model, output=tmp_path / "out", **inputs)]


# Files in the output


@pytest.mark.parametrize("ending", ["_seg.nii.gz", "_prob.nii.gz", "_seg.dcm"])
def test_no_file_of_the_user_is_written_over(model, tmp_path, monkeypatch, ending):
    case = tmp_path / "p1"
    save(case / "p1_flair.nii.gz", head(0))
    (case / f"p1{ending}").write_bytes(b"by an expert")
    monkeypatch.chdir(case)
    for _ in range(2):  # the folder is the output by default
        code, out, err = call("predict", str(model), "--case", "p1_flair.nii.gz")
        assert code == 2, out
        assert f"p1{ending} exists and is not a prediction of this output; give another --output" in err
    assert (case / f"p1{ending}").read_bytes() == b"by an expert"


def test_all_files_are_checked_before_a_case_is_segmented(model, tmp_path, monkeypatch):
    for number in range(3):
        save(tmp_path / "cases" / f"p{number}_flair.nii.gz", head(number))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p2_seg.nii.gz").write_bytes(b"by an expert")
    monkeypatch.setattr(SegmentationModel, "segment", lambda *a, **k: pytest.fail("a case was segmented"))
    with pytest.raises(UserError, match=r"p2_seg.nii.gz exists"):
        ids(model, tmp_path, case=tmp_path / "cases")


def test_a_call_without_output_writes_over_nothing(model, tmp_path, monkeypatch):
    image = save(tmp_path / "p1_flair.nii.gz", head(0))
    monkeypatch.chdir(tmp_path)
    rows = preceptor.predict(model, files={"flair": image})
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in written} == {image.name, "p1_flair_seg.nii.gz", "predictions.csv"}
    assert preceptor.predict(model, files={"flair": image}) == rows
    assert {path: path.read_bytes() for path in written} == written
    (tmp_path / "predictions.csv").unlink()
    with pytest.raises(UserError, match=r"p1_flair_seg.nii.gz exists"):
        preceptor.predict(model, files={"flair": image})
    assert (tmp_path / "p1_flair_seg.nii.gz").read_bytes() == written[tmp_path / "p1_flair_seg.nii.gz"]


def test_a_table_without_output_is_resumed(model, tmp_path, monkeypatch):
    save(tmp_path / "p1_flair.nii.gz", head(0))
    (tmp_path / "t.csv").write_text("case,flair\np1,p1_flair.nii.gz\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, out, err = call("predict", str(model), "--table", "t.csv", "--json")
        assert code == 0, err
        (row,) = json.loads(out)
        assert (row["id"], row["mask"]) == ("p1", "p1_seg.nii.gz")
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["p0_t1.nii.gz", "link.nii.gz", "sub/../p0_t1.nii.gz"])
@pytest.mark.parametrize("write", ["save", "save_probabilities"])
def test_no_result_is_written_over_an_image_of_its_case(model, tmp_path, name, write):
    image = save(tmp_path / "p0_t1.nii.gz", head(0))
    (tmp_path / "link.nii.gz").symlink_to(image)
    (tmp_path / "sub").mkdir()
    before, found = image.read_bytes(), preceptor.load(model).segment({"t1": image})
    with pytest.raises(UserError, match=r"\.nii\.gz is an image of case p0_t1, which would be lost; give another path"):
        getattr(found, write)(tmp_path / name)
    assert image.read_bytes() == before
    for _ in range(2):  # its own result may be written again
        assert getattr(found, write)(str(tmp_path / "result.nii.gz")) == tmp_path / "result.nii.gz"


def test_no_object_is_written_over_a_slice_of_its_series(model, tmp_path):
    pytest.importorskip("highdicom")
    series = identified_series(tmp_path / "series", noise((20, 22, 24)))
    slices = {path: path.read_bytes() for path in series.iterdir()}
    found = preceptor.load(model).segment({"t1": series})
    for path in (next(iter(slices)), series):
        with pytest.raises(UserError, match=r"is an image of case .*, which would be lost"):
            found.save_dicom_seg(path)
    assert {path: path.read_bytes() for path in series.iterdir()} == slices
    assert found.save_dicom_seg(tmp_path / "seg.dcm").is_file()


@pytest.mark.parametrize("killed", ["_first", "_row", "_mask"])
def test_a_killed_call_is_resumed(model, tmp_path, monkeypatch, killed):
    for number in range(2):
        save(tmp_path / "cases" / f"p{number}_flair.nii.gz", head(number))
    expected = ids(model, tmp_path, case=tmp_path / "cases")
    table, masks = tmp_path / "out" / "predictions.csv", sorted((tmp_path / "out").glob("*.nii.gz"))
    content = [mask.read_bytes() for mask in masks]
    lines = table.read_bytes().splitlines(keepends=True)
    if killed == "_first":  # after the first label map was written and before its row
        table.write_bytes(b"")
        masks[1].unlink()
        (tmp_path / "out" / STARTED).write_text('{"case": "p0", "files": null}')
    else:
        table.write_bytes(b"".join(lines[:2]))
        files = {masks[1].name: sha256(masks[1])}
        (tmp_path / "out" / STARTED).write_text(json.dumps({"case": "p1", "files": files}))
        if killed == "_mask":
            masks[1].unlink()
    assert ids(model, tmp_path, case=tmp_path / "cases") == expected
    assert [mask.read_bytes()[10:] for mask in masks] == [each[10:] for each in content]  # without the time of gzip
    assert table.read_bytes().splitlines(keepends=True) == lines
    assert not (tmp_path / "out" / STARTED).exists()


@pytest.mark.parametrize("failing", ["probabilities", "row"])
def test_a_failed_call_leaves_complete_cases_alone(model, tmp_path, monkeypatch, failing):
    for number in range(2):
        save(tmp_path / "cases" / f"p{number}_flair.nii.gz", head(number))
    inputs = {"case": tmp_path / "cases", "probabilities": True}

    def fail(*_):
        if len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "row":
            patch.setattr(Origin, "columns", lambda *_: fail() or {"model": "", "options": "", "input": ""})
        else:
            patch.setattr(Segmentation, "save_probabilities", lambda _, path: fail() or Path(path).touch() or path)
        with pytest.raises(OSError, match="No space left"):
            preceptor.predict(model, output=tmp_path / "out", **inputs)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"p0_seg.nii.gz", "p0_prob.nii.gz", "predictions.csv"}


def test_a_corrected_label_map_is_not_written_over_without_its_row(model, tmp_path):
    save(tmp_path / "p0_flair.nii.gz", head(0))
    ids(model, tmp_path, case=tmp_path / "p0_flair.nii.gz")
    (tmp_path / "out" / "predictions.csv").unlink()
    mask = save(tmp_path / "out" / "p0_seg.nii.gz", lesion())
    corrected = mask.read_bytes()
    with pytest.raises(UserError, match=r"p0_seg.nii.gz exists"):
        ids(model, tmp_path, case=tmp_path / "p0_flair.nii.gz")
    assert mask.read_bytes() == corrected


def test_a_row_without_its_label_map_is_reported(model, tmp_path):
    save(tmp_path / "p0_flair.nii.gz", head(0))
    ids(model, tmp_path, case=tmp_path / "p0_flair.nii.gz")
    (tmp_path / "out" / "p0_seg.nii.gz").unlink()
    with pytest.raises(UserError, match=r"has a prediction of p0, but .*out/p0_seg.nii.gz does not exist; restore"):
        ids(model, tmp_path, case=tmp_path / "p0_flair.nii.gz")


# Cases in a folder or a table


def test_cases_beside_and_in_folders_are_all_segmented(model, tmp_path):
    root = tmp_path / "mix"
    save(root / "p0_t1.nii.gz", head(0))
    for number in (1, 2):
        save(root / f"p{number}" / f"p{number}_t1.nii.gz", head(number))
    assert ids(model, tmp_path, case=root) == ["p0", "p1", "p2"]
    with pytest.raises(UserError, match=r"contains p0_t1.nii.gz, and its subfolders contain p1/p1_t1.nii.gz, p2/p2_t1"):
        preceptor.load(model).segment(root)


def test_other_volumes_below_a_case_are_a_remark(model, tmp_path):
    save(tmp_path / "p0" / "p0_t1.nii.gz", head(0))
    save(tmp_path / "p0" / "atlas" / "regions.nii.gz", head(1))
    write_slices(tmp_path / "p0" / "flair", slices_of(np.ascontiguousarray(head(2).T[:, ::1, ::1])))
    save(tmp_path / "p0" / "p0_t1.nii.gz", np.asarray(head(3)), read_series(tmp_path / "p0" / "flair")[1].affine)
    (row,) = preceptor.predict(model, case=tmp_path / "p0", output=tmp_path / "out")
    assert (row["id"], row["modalities"]) == ("p0", "flair+t1")
    assert "Not used, by their names: atlas/regions.nii.gz." in row["warnings"]


def decathlon(root: Path, test: list | None) -> Path:
    content = {"modality": {"0": "T1w", "1": "FLAIR"}, "labels": {"0": "background", "1": "x"}}
    entry = {"image": "./imagesTr/A_1.nii.gz", "label": "./labelsTr/A_1.nii.gz"}
    content |= {"training": [entry]} | ({} if test is None else {"test": test})
    root.mkdir()
    (root / "dataset.json").write_text(json.dumps(content))
    for seed, name in enumerate(("imagesTr/A_1", "imagesTs/B_2", "imagesTs/B_3")):
        save(root / f"{name}.nii.gz", np.stack([head(seed), head(seed + 10)], -1))
    save(root / "labelsTr" / "A_1.nii.gz", lesion(values=(1,)))
    return root


def test_test_cases_of_a_decathlon_are_segmented(model, tmp_path):
    root = decathlon(tmp_path / "data", ["./imagesTs/B_2.nii.gz"])
    first, *rest = preceptor.predict(model, case=root, output=tmp_path / "a")
    assert (first["id"], first["modalities"], rest) == ("B_2", "flair+t1", [])
    assert "imagesTs/B_3.nii.gz" in first["warnings"]
    assert "training cases of dataset.json (1) were left out" in first["warnings"]
    assert ids(model, tmp_path, case=decathlon(tmp_path / "unlisted", None)) == ["B_2", "B_3"]
    for folder, expected in (("imagesTs", ["B_2", "B_3"]), ("imagesTr", ["A_1"])):
        rows = preceptor.predict(model, case=root / folder, output=tmp_path / folder)
        assert [row["id"] for row in rows] == expected
    for file in (root / "imagesTs").iterdir():
        file.unlink()
    (root / "dataset.json").write_text((root / "dataset.json").read_text().replace('["./imagesTs/B_2.nii.gz"]', "[]"))
    (row,) = preceptor.predict(model, case=root, output=tmp_path / "b")
    assert row["id"] == "A_1"
    assert "has no test cases, so the training cases were predicted" in row["warnings"]


@pytest.mark.parametrize("names", [("FLAIR", "T1w"), ("t2f", "t1n"), ("FLAIR", "t1")])
@pytest.mark.parametrize("layout", ["decathlon", "nnU-Net"])
def test_modalities_may_have_an_alias_as_their_name(tmp_path, names, layout):
    """The channels are T1w and FLAIR; the results are those of a network with the canonical names."""
    root = decathlon(tmp_path / "data", ["imagesTs/B_2.nii.gz"] if layout == "decathlon" else None)
    (root / "imagesTs" / "B_3.nii.gz").unlink()
    case = root / "imagesTs" / "B_2.nii.gz"
    if layout == "nnU-Net":
        for channel in (0, 1):
            save(root / "imagesTs" / f"B_2_000{channel}.nii.gz", np.asarray(nibabel.load(case).dataobj)[..., channel])
        case.unlink()
    places = [root, root / "imagesTs", root / "imagesTr"] + [case] * (layout == "decathlon")
    for number, place in enumerate(places):
        probabilities = []
        for modalities in (names, ("flair", "t1")):
            folder = tmp_path / f"{number}-{modalities[0]}"
            made_model(modalities).save_pretrained(folder / "model")
            (row,) = preceptor.predict(folder / "model", case=place, output=folder / "out", probabilities=True)
            assert (row["modalities"], row["missing"]) == ("+".join(modalities), "")
            probabilities.append(np.asarray(nibabel.load(row["probabilities"]).dataobj))
        np.testing.assert_array_equal(*probabilities)


def test_a_network_for_one_channel_under_an_alias(tmp_path):
    made_model(("T1W",)).save_pretrained(tmp_path / "model")
    rows = preceptor.predict(tmp_path / "model", case=decathlon(tmp_path / "data", None), output=tmp_path / "out")
    assert [(row["id"], row["modalities"]) for row in rows] == [("B_2", "T1W"), ("B_3", "T1W")]
    made_model(("CT",)).save_pretrained(tmp_path / "ct")
    with pytest.raises(UserError, match="contains no case with any of the modalities CT"):
        preceptor.predict(tmp_path / "ct", case=tmp_path / "data", output=tmp_path / "none")
    content = (tmp_path / "data" / "dataset.json").read_text()
    (tmp_path / "data" / "dataset.json").write_text(content.replace("FLAIR", "CT"))
    rows = preceptor.predict(tmp_path / "ct", case=tmp_path / "data", output=tmp_path / "ct-out")
    assert [row["modalities"] for row in rows] == ["CT", "CT"]


def test_volumes_in_other_formats_are_named(model, tmp_path):
    case = tmp_path / "p1"
    save(case / "p1_t1.nii.gz", head(0))
    for name in ("p1_t1.img", "p1_adc.nrrd", "p1_seg.MHA", "notes.txt"):
        (case / name).write_text("")
    (case / "extra").mkdir()
    (case / "extra" / "p1_t2.mgz").write_text("")
    (row,) = preceptor.predict(model, case=case, output=tmp_path / "out")
    assert "formats are not read: p1_adc.nrrd, p1_seg.MHA, p1_t1.img, p1_t2.mgz." in row["warnings"]
    assert row["missing"] == "flair"
    for name in ("p1_flair.nrrd", "p1-FLAIR.MHA", "flair.img", "p1_t2_flair.hdr", "extra/p1_flair.mgz"):
        (case / name).write_text("")
        message = rf"{Path(name).name} is named as flair, but is .* not read; convert it to \.nii\.gz"
        with pytest.raises(UserError, match=message):
            preceptor.predict(model, case=case, output=tmp_path / "none")
        (case / name).unlink()
    (case / "p1_flair.mha.gz").write_text("")
    save(case / "p1_flair.nii.gz", head(1))
    row = preceptor.load(model).segment(case)
    assert row.missing == ()
    assert any("p1_flair.mha.gz" in warning for warning in row.warnings)


def test_channels_of_nnunet_are_one_case(model, tmp_path):
    root = decathlon(tmp_path / "data", [])
    for file in (root / "imagesTs").iterdir():
        file.unlink()
    for channel in (0, 1):
        save(root / "imagesTs" / f"B_2_000{channel}.nii.gz", head(channel))
    for folder in (root, root / "imagesTs"):
        (row,) = preceptor.predict(model, case=folder, output=tmp_path / folder.name)
        assert (row["id"], row["modalities"]) == ("B_2", "flair+t1")


def test_the_order_of_channels_that_nothing_names_is_a_warning(model, tmp_path):
    path = save(tmp_path / "x.nii.gz", np.stack([head(0), head(1)], -1))
    assert any("taken as flair, t1, in the order of" in text for text in preceptor.load(model).segment(path).warnings)


def test_channels_may_be_the_fifth_dimension(model, tmp_path):
    """ITK writes (X, Y, Z, 1, C)."""
    plain = decathlon(tmp_path / "plain", ["imagesTs/B_2.nii.gz"])
    itk = decathlon(tmp_path / "itk", ["imagesTs/B_2.nii.gz"])
    for file in itk.rglob("images*/*.nii.gz"):
        save(file, np.asarray(nibabel.load(file).dataobj)[..., None, :])
    for inside in ("", "imagesTs", "imagesTs/B_2.nii.gz"):
        masks = []
        for root in (plain, itk):
            (row, *_) = preceptor.predict(model, case=root / inside, output=tmp_path / f"out-{root.name}{len(inside)}")
            assert (row["id"], row["modalities"]) == ("B_2", "flair+t1")
            masks.append(np.asarray(nibabel.load(row["mask"]).dataobj))
        np.testing.assert_array_equal(*masks)


def test_one_image_for_two_modalities_is_refused(model, tmp_path):
    a, b = (save(tmp_path / f"{name}.nii.gz", head(0)) for name in "ab")
    b.write_bytes(a.read_bytes())
    for files in ({"flair": a, "t1": a}, {"flair": a, "t1": b}):
        with pytest.raises(UserError, match="t1 of case a is the same image as flair"):
            preceptor.load(model).segment(files)


def test_label_maps_of_a_table_are_not_read(model, tmp_path):
    save(tmp_path / "a.nii.gz", head(0))
    (tmp_path / "t.csv").write_text("case,t1,mask\nx,a.nii.gz,none_seg.nii.gz\n")
    assert ids(model, tmp_path, table=tmp_path / "t.csv") == ["x"]


@pytest.mark.parametrize("name", ["../../escape", "/tmp/escape", "..", "a\\b"])
def test_a_case_of_a_table_stays_in_the_output(model, tmp_path, name):
    save(tmp_path / "a.nii.gz", head(0))
    (tmp_path / "t.csv").write_text(f"case,t1\n{name},a.nii.gz\n")
    with pytest.raises(UserError, match=r"t.csv:2: case contains a slash") as error:
        preceptor.predict(model, table=tmp_path / "t.csv", output=tmp_path / "x" / "y")
    assert "escape" not in str(error.value)
    assert not list(tmp_path.rglob("*_seg.nii.gz"))


# Limits


def test_a_model_reads_the_size_that_it_was_trained_with(tmp_path, monkeypatch):
    image = save(tmp_path / "a.nii.gz", head(0))
    monkeypatch.setattr(predict_module, "MAX_VOXELS", 1000)
    with pytest.raises(VolumeError, match="more than the limit of 1000"):
        made_model().segment({"t1": image})
    assert made_model(max_voxels=2000).segment({"t1": image}).mask.shape == (10, 14, 12)
    four_d = save(tmp_path / "b.nii.gz", np.stack([head(0), head(1)], -1))
    assert made_model(max_voxels=4000).segment(four_d).modalities == "flair+t1"


def test_references_are_read_by_the_limit_of_the_recipe(tmp_path):
    images = {"t1": VolumeFile(save(tmp_path / "a_t1.nii.gz", head(0)))}
    case = Case("a", images, VolumeFile(save(tmp_path / "a_seg.nii.gz", lesion(values=(1,)))), "a", "test")
    data = SegmentationDataset("x", "y", tmp_path, [case], modalities=("t1",), regions={"whole": (1,)})
    settings = VolumeSettings(patch_size=(8, 8, 8), spacing=(2, 2, 2))
    assert settings.max_voxels == MAX_VOXELS
    examples = VolumeExamples([case], data, settings)
    whole = examples.whole(0)
    assert reference_masks(examples, 0, whole).shape == (1, 10, 14, 12)
    examples.settings = replace(settings, max_voxels=1000)
    with pytest.raises(VolumeError, match="more than the limit of 1000"):
        reference_masks(examples, 0, whole)


def test_scores_have_the_limit_of_the_recipe(tmp_path):
    for number in range(4):
        save(tmp_path / "cases" / f"p{number}_t1.nii.gz", head(number))
        save(tmp_path / "cases" / f"p{number}_seg.nii.gz", lesion(values=(1,)))
        save(tmp_path / "masks" / f"p{number}.nii.gz", lesion(values=(1,)))
    recipe = tmp_path / "r.yaml"
    text = "name: r\ntask: segmentation\ndata: {name: volumes, root: cases, modalities: [t1], max_voxels: LIMIT, "
    text += "validation_fraction: 0.25, test_fraction: 0.25}\n"
    recipe.write_text(text.replace("root: cases", f"root: {tmp_path / 'cases'}").replace("LIMIT", "2000"))
    protocol = "volumes/by-patient/A"
    assert score_file(tmp_path / "masks", protocol, root=recipe).results["protocols"][protocol]["n"] == 1
    recipe.write_text(text.replace("root: cases", f"root: {tmp_path / 'cases'}").replace("LIMIT", "1000"))
    with pytest.raises(VolumeError, match="more than the limit of 1000"):  # also while the regions are inferred
        score_file(tmp_path / "masks", protocol, root=recipe)


# DICOM segmentations

IDENTIFIERS = {
    "PN": ("OtherPatientNames", "ResponsiblePerson", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy"),
    "PN2": ("ConsultingPhysicianName", "ReferringPhysicianName", "OperatorsName", "PatientName", "PatientBirthName"),
    "LO": ("PatientID", "IssuerOfPatientID", "AdmittingDiagnosesDescription", "AdmissionID", "ServiceEpisodeID"),
    "LO2": ("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialSubjectID", "RequestingService"),
    "LO3": ("InstitutionName", "StudyDescription", "SeriesDescription", "PatientAddress", "PositionReferenceIndicator"),
    "SH": ("Occupation", "AccessionNumber", "StudyID", "StationName", "EthnicGroup", "ProtocolName"),
    "LT": ("PatientComments", "AdditionalPatientHistory", "ImageComments"),
}


def identified_series(folder: Path, volume: np.ndarray) -> Path:
    """Write a series with identifiers of many kinds, also in sequences."""
    slices = slices_of(volume)
    study, frame_of_reference = generate_uid(), generate_uid()
    for data in slices:
        data.StudyInstanceUID, data.FrameOfReferenceUID = study, frame_of_reference
        for names in IDENTIFIERS.values():
            for name in names:
                setattr(data, name, f"{MARK}{name}"[:16])
        data.PatientBirthDate, data.PatientBirthTime, data.PatientAge = "19110203", "040506", "099Y"
        data.StudyDate, data.StudyTime = "19110203", "040506"
        for sequence in ("OtherPatientIDsSequence", "ProcedureCodeSequence", "RequestAttributesSequence"):
            item = Dataset()
            item.PatientID, item.CodeMeaning = f"{MARK}ID", f"{MARK}CODE"
            setattr(data, sequence, [item])
    return write_slices(folder, slices)


def test_an_object_without_the_patient_has_no_identifier(tmp_path):
    pytest.importorskip("highdicom")
    series = identified_series(tmp_path / "a", noise((5, 6, 4)))
    masks = np.ones((1, 4, 6, 5), bool)
    write_dicom_seg(tmp_path / "a.dcm", masks, {"Ödem": "labels 1"}, series)
    written = dcmread(tmp_path / "a.dcm")
    for element in written.iterall():  # also those in sequences
        for trace in (MARK, "19110203", "040506", "099Y"):
            assert element.VR == "SQ" or trace not in str(element.value), element.keyword
    assert (written.PatientName, written.PatientID, written.StudyDate) == ("", "", "")
    assert written.StudyInstanceUID == dcmread(next(series.iterdir())).StudyInstanceUID
    assert written.SegmentSequence[0].SegmentLabel == "Ödem"
    write_dicom_seg(tmp_path / "b.dcm", masks, {"x": "labels 1"}, series, copy_patient=True)
    assert MARK in str(dcmread(tmp_path / "b.dcm").OtherPatientNames)


@pytest.mark.parametrize("nifti", ["flair", "t1"])
def test_an_object_has_the_place_of_the_label_map_for_either_order_of_modalities(tmp_path, nifti):
    hd = pytest.importorskip("highdicom")
    series = identified_series(tmp_path / "series", noise((20, 22, 24)))
    voxels, grid = read_series(series)
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels.astype(np.float32) + 1, grid.affine))
    assert nibabel.aff2axcodes(grid.affine) != nibabel.aff2axcodes(image.affine)
    nibabel.save(image, tmp_path / "image.nii.gz")
    other = "t1" if nifti == "flair" else "flair"
    found = made_model().segment({nifti: tmp_path / "image.nii.gz", other: series})
    label = np.zeros_like(found.mask)
    label[5:15, 6:9, 2:5] = 1
    found = replace(found, mask=label)
    volume = hd.seg.segread(found.save_dicom_seg(tmp_path / "a.dcm")).get_volume(combine_segments=False)
    mask = nibabel.load(found.save(tmp_path / "a.nii.gz"))
    places = [
        (affine @ np.r_[np.argwhere(array).mean(0), 1])[:3]
        for array, affine in ((volume.array[..., 0], volume.affine), (np.asarray(mask.dataobj), LPS @ mask.affine))
    ]
    assert np.allclose(*places, atol=1e-3)
    assert volume.array.sum() == label.sum()


def test_a_mask_of_a_few_small_voxels_has_a_volume(tmp_path: Path, monkeypatch, capsys) -> None:
    """9 voxels of 0.05 mm are 1.125e-6 ml."""
    network = made_model()
    affine = np.diag([0.05, 0.05, 0.05, 1.0])
    file = save(tmp_path / "c_flair.nii.gz", head(1), affine)

    def predicted(network, case, config, window, only):
        found = torch.zeros(1, *(side.stop - side.start for side in case.box))
        found[0, 1, 1:4, 1:4] = 1
        return {only[0]: found}

    monkeypatch.setattr(predict_module, "predict_case", predicted)
    result = network.segment({"flair": file})
    assert result.volumes_ml == {"whole": 1.125e-6}
    show_case({"id": "c", "modalities": "flair", "missing": "t1", "whole_ml": 1.125e-6, "b_ml": 0.0, "c_ml": 12.345})
    assert "volumes in ml: whole 1.1e-06, b 0.00, c 12.35" in capsys.readouterr().out.replace("12.34,", "12.35,")


@pytest.mark.parametrize(("volume", "text"), [(0, "0.00"), (0.1, "0.10"), (0.0996, "0.1"), (0.004, "0.004")])
def test_volumes_are_never_shown_as_0(volume, text) -> None:
    assert format_ml(volume) == text


def test_other_names_of_modalities(tmp_path: Path) -> None:
    files = {"FLAIR": save(tmp_path / "a.nii.gz", head(1)), "T1w": save(tmp_path / "b.nii.gz", head(2))}
    assert made_model().segment(files).modalities == "flair+t1"
    assert made_model(("T2f", "t1n")).segment(files).modalities == "T2f+t1n"
    for given, message in (
        ({**files, "t1n": tmp_path / "b.nii.gz"}, r"'T1w' and 't1n' are the same modality; give one of them"),
        ({"t1c": tmp_path / "b.nii.gz"}, r"t1c is not a modality of this network; it knows flair, t1"),
    ):
        with pytest.raises(UserError, match=message):
            made_model().segment(given)

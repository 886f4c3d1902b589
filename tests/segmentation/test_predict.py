"""`preceptor predict` of a segmentation model: any modalities, the grid of the source, and mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from preceptor.data.dicom_series import read_series
from tests.command_line import call
from tests.data.dicom_series_files import noise, slices_of, write_slices

pytestmark = pytest.mark.slow


def complete_case(trained: Path) -> Path:
    """Return the folder of a case with all four modalities and its label map."""
    folders = sorted(path for path in (trained / "run" / "data").iterdir() if path.is_dir())
    return next(folder for folder in folders if len(list(folder.glob("*.nii.gz"))) == 5)


@pytest.mark.parametrize("given", [("flair",), ("t1ce", "t2"), ("flair", "t1", "t1ce", "t2")])
def test_any_modalities_give_a_label_map_on_the_grid_of_the_source(trained: Path, tmp_path: Path, given) -> None:
    case, output = tmp_path / "case", tmp_path / "out"
    case.mkdir()
    for modality in given:
        image = nibabel.load(next(complete_case(trained).glob(f"*_{modality}.nii.gz")))
        # Another orientation and voxel size than those of the network.
        turned = np.flip(np.asarray(image.dataobj).transpose(1, 0, 2), 0)
        affine = np.array([[0, 2.0, 0, 5], [-1.5, 0, 0, 7], [0, 0, 1.0, -3], [0, 0, 0, 1]])
        nibabel.save(nibabel.Nifti1Image(turned, affine), case / f"head_{modality}.nii.gz")
    arguments = ["--case", str(case), "--output", str(output), "--probabilities", "--json"]
    code, out, err = call("predict", str(trained / "run"), *arguments)
    assert code == 0, err
    (row,) = json.loads(out)
    with (output / "predictions.csv").open() as lines:
        assert {key: str(value) for key, value in row.items()} == next(csv.DictReader(lines))
    assert row["id"] == "head"
    assert row["modalities"] == "+".join(given)
    assert set(filter(None, row["missing"].split("+"))) == {"flair", "t1", "t1ce", "t2"} - set(given)
    assert all(0 <= row[f"{region}_expected_dice"] <= 1 for region in ("et", "tc", "wt"))
    assert row["mask"] == str(output / "head_seg.nii.gz")
    mask = nibabel.load(row["mask"])
    label = np.asarray(mask.dataobj)
    assert label.shape == turned.shape
    assert np.allclose(mask.affine, affine)
    assert set(np.unique(label)) <= {0, 1, 2, 4}
    # Volumes are counted in the label map that is saved; a voxel has 3 mm3.
    for region, labels in (("et", [4]), ("tc", [1, 4]), ("wt", [1, 2, 4])):
        assert row[f"{region}_ml"] == pytest.approx(np.isin(label, labels).sum() * 3 / 1000, abs=0.006)
    probabilities = nibabel.load(row["probabilities"])
    assert probabilities.shape == (*turned.shape, 3)
    values = probabilities.get_fdata()
    assert 0 <= values.min() <= values.max() <= 1


def test_one_case_is_described_without_json(trained: Path, tmp_path: Path) -> None:
    file = next(complete_case(trained).glob("*_t2.nii.gz"))
    code, out, err = call("predict", str(trained / "run"), f"t2={file}", "--output", str(tmp_path / "out"), "--post")
    assert code == 0, err
    assert "segmented from t2; missing: flair+t1+t1ce" in out
    assert list((tmp_path / "out").glob("*_seg.nii.gz"))


def damage(case: Path, how: str) -> None:
    """Make the T2 image of a case unusable."""
    file = next(case.glob("*_t2.nii.gz"))
    image = nibabel.load(file)
    values, affine = np.asarray(image.dataobj).astype(np.float32), image.affine.copy()
    if how == "affine":
        affine[0, 3] += 4
    elif how == "shape":
        values = values[:-2]
    elif how == "nan":
        values[3, 3, 3] = np.nan
    elif how == "flat":
        values = values[..., 0]
    nibabel.save(nibabel.Nifti1Image(values, affine), file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:300])
    elif how == "unknown":
        for other in case.glob("*.nii.gz"):
            other.rename(case / other.name.replace("_t", "_x").replace("_flair", "_y"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("affine", "_t2.nii.gz"),
        ("shape", "resample"),
        ("nan", "NaN"),
        ("flat", "3-D"),
        ("truncated", "_t2.nii.gz"),
        ("unknown", "modalit"),
    ],
)
def test_a_damaged_case_is_an_error_of_one_sentence(trained: Path, tmp_path: Path, how, message) -> None:
    case, output = tmp_path / "case", tmp_path / "out"
    shutil.copytree(complete_case(trained), case)
    damage(case, how)
    code, out, err = call("predict", str(trained / "run"), "--case", str(case), "--output", str(output))
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in err
    assert not list(output.glob("*.nii.gz"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "{case}", "--image", "{image}", "--question", "where?"], "one of"),
        (["--case", "/nowhere/case"], "/nowhere/case"),
        (["flair={image}", "flair={image}"], "twice"),
        (["pet={image}"], "pet is not a modality of this network"),
    ],
)
def test_inputs_that_do_not_fit_the_model(trained: Path, tmp_path: Path, arguments, message) -> None:
    case = complete_case(trained)
    image = next(case.glob("*_t2.nii.gz"))
    texts = [argument.format(case=case, image=image) for argument in arguments]
    code, _, err = call("predict", str(trained / "run"), *texts, "--output", str(tmp_path / "out"))
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_series_is_segmented_on_its_grid(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p1"
    for seed, name in enumerate(("t1", "T1_Gd")):
        slices = slices_of(noise((20, 22, 24), seed), orientation=(0.0, 0.96, 0.28, 0.0, -0.28, 0.96))
        write_slices(folder / name, slices)
    for expected, arguments in (
        ("t1", [f"t1={folder / 't1'}"]),
        ("t1ce", [f"t1ce={folder / 'T1_Gd'}"]),
        ("t1+t1ce", ["--case", str(folder)]),
    ):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        code, out, err = call("predict", str(trained / "run"), *arguments, "--output", str(output), "--json")
        assert code == 0, err
        (row,) = json.loads(out)
        assert row["id"] == "p1"
        assert row["modalities"] == expected
        mask = nibabel.load(row["mask"])
        _, grid = read_series(folder / "t1")
        assert mask.shape == grid.shape == (24, 22, 20)
        assert np.allclose(mask.affine, grid.affine, atol=1e-4)
        found = np.isin(np.asarray(mask.dataobj), [1, 2, 4]).sum() * grid.voxel_volume / 1000
        assert row["wt_ml"] == pytest.approx(found, abs=0.006)
    table = tmp_path / "cases.csv"
    table.write_text("case,t1\na,p1/t1\nb,p1/T1_Gd\n")
    code, out, err = call(
        "predict", str(trained / "run"), "--table", str(table), "--output", str(tmp_path / "o"), "--json"
    )
    assert code == 0, err
    assert [row["id"] for row in json.loads(out)] == ["a", "b"]


def test_a_table_of_questions_is_not_one_of_cases(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,image,question\na,x.png,what?\n")
    code, _, err = call("predict", str(trained / "run"), "--table", str(tmp_path / "q.csv"), "--output", str(tmp_path))
    assert code == 2
    assert "no column 'case'" in err
    assert "weights" not in err


def test_doubts_about_a_header_are_warnings(trained: Path, tmp_path: Path) -> None:
    image = nibabel.load(next(complete_case(trained).glob("*_t2.nii.gz")))
    image.set_sform(image.affine, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "a_t2.nii.gz")
    code, out, err = call(
        "predict", str(trained / "run"), f"t2={tmp_path / 'a_t2.nii.gz'}", "--output", str(tmp_path), "--json"
    )
    assert code == 0, err
    assert "neither sform nor qform" in json.loads(out)[0]["warnings"]

"""A case with whatever modalities it has, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from preceptor.cli.app import main

pytestmark = pytest.mark.slow


def whole_case(trained: Path) -> Path:
    folders = sorted(path for path in (trained / "run" / "data").iterdir() if path.is_dir())
    return next(folder for folder in folders if len(list(folder.glob("*.nii.gz"))) == 5)


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["preceptor", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("kept", [("flair",), ("t1ce", "t2"), ("flair", "t1", "t1ce", "t2")])
def test_any_subset_gives_a_mask_on_the_source_grid(trained, tmp_path, monkeypatch, capsys, kept):
    source = whole_case(trained)
    case = tmp_path / "case"
    case.mkdir()
    for modality in kept:
        file = next(source.glob(f"*_{modality}.nii.gz"))
        image = nibabel.load(file)
        # Another orientation and voxel size than the network knows: the mask must come back on this grid.
        turned = np.flip(np.asarray(image.dataobj).transpose(1, 0, 2), 0)
        affine = np.array([[0, 2.0, 0, 5], [-1.5, 0, 0, 7], [0, 0, 1.0, -3], [0, 0, 0, 1]])
        nibabel.save(nibabel.Nifti1Image(turned, affine), case / f"kept_{modality}.nii.gz")
    code, out, err = call(
        monkeypatch,
        capsys,
        "predict",
        str(trained / "run"),
        "--case",
        str(case),
        "--output",
        str(tmp_path / "out"),
        "--probabilities",
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["subset"] == "+".join(kept)
    assert set(found["missing"]) == {"flair", "t1", "t1ce", "t2"} - set(kept)
    assert set(found["validation"]["dice"]) == {"et", "tc", "wt"}
    mask = nibabel.load(tmp_path / "out" / "kept_seg.nii.gz")
    assert mask.shape == turned.shape
    assert np.allclose(mask.affine, affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2, 4}
    probabilities = nibabel.load(tmp_path / "out" / "kept_prob.nii.gz")
    assert probabilities.shape == (*turned.shape, 3)
    values = probabilities.get_fdata()
    assert 0 <= values.min() <= values.max() <= 1
    voxels = float((values[..., 2] >= 0.5).sum())
    assert found["volume_ml"]["wt"] == pytest.approx(voxels * 3.0 / 1000, abs=0.01)


def test_words_for_people(trained, tmp_path, monkeypatch, capsys):
    source = whole_case(trained)
    code, out, err = call(
        monkeypatch,
        capsys,
        "predict",
        str(trained / "run"),
        "--case",
        str(next(source.glob("*_t2.nii.gz"))),
        "--output",
        str(tmp_path),
        "--post",
    )
    assert code == 0, err
    assert "missing: flair, t1, t1ce" in out
    assert "validation cases" in out
    assert "With all modalities it was" in out


def broken(case: Path, how: str) -> None:
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
    ("how", "said"),
    [
        ("affine", "its grid is not that of"),
        ("shape", "resample"),
        ("nan", "NaN"),
        ("flat", "3-D"),
        ("truncated", "_t2.nii.gz"),
        ("unknown", "modalit"),
    ],
)
def test_wrong_cases_are_errors_of_one_sentence(trained, tmp_path, monkeypatch, capsys, how, said):
    case = tmp_path / "case"
    shutil.copytree(whole_case(trained), case)
    broken(case, how)
    code, out, err = call(
        monkeypatch, capsys, "predict", str(trained / "run"), "--case", str(case), "--output", str(tmp_path / "out")
    )
    assert code == 2, out + err
    assert said in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--case", "{case}", "--image", "x.png"], "not several"), (["--case", "/nowhere/case"], "/nowhere/case")],
)
def test_wrong_calls(trained, monkeypatch, capsys, arguments, said):
    arguments = [argument.format(case=whole_case(trained)) for argument in arguments]
    code, _, err = call(monkeypatch, capsys, "predict", str(trained / "run"), *arguments)
    assert code == 2
    assert said in err

"""`preceptor doctor` on every data set by its shipped recipe."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from preceptor.api import check as check_run
from preceptor.errors import UserError
from tests.data.vqa import test_parquet, test_slake, test_vqa_med_2019, test_vqa_rad


def vqa_rad(root: Path) -> Path:
    test_vqa_rad.release(root)
    for number, file in enumerate(sorted((root / test_vqa_rad.IMAGES).iterdir())):
        Image.new("L", (8, 8), number).save(file)
    return root


def slake(root: Path) -> Path:
    root.mkdir()
    return test_slake.release(root, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)


def path_vqa(root: Path) -> Path:
    test_parquet.hub(root)
    test_parquet.write_table(root / "data" / "validation-0.parquet", [(test_parquet.png(30), "how?", "well")])
    return root


MADE = {
    "mhkd-vqa-rad": vqa_rad,
    "mhkd-vqa-med-2019": test_vqa_med_2019.release,
    "mhkd-slake-en": slake,
    "mhkd-path-vqa": path_vqa,
}


@pytest.mark.parametrize("recipe", MADE)
def test_doctor_reads_each_data_set_and_finds_the_broken_image(tmp_path, recipe):
    root = MADE[recipe](tmp_path / "made")
    overrides = [f"data.root={root}", f"output={tmp_path / 'run'}"]
    report = check_run(recipe, overrides)
    assert [f for f in report["findings"] if f["severity"] == "error"] == []
    assert f"mhkd-{report['name']}" in (recipe, recipe.removesuffix("-en"))
    assert all(report["rows"][part] for part in ("train", "test"))
    broken = sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png"))[0]
    broken.write_bytes(b"\x00" * broken.stat().st_size)
    errors = [f for f in check_run(recipe, overrides)["findings"] if f["severity"] == "error"]
    assert [f["file"] for f in errors] == [broken.name]
    if recipe == "mhkd-path-vqa":  # images out of parquet files are copies: without it, it is written again
        broken.unlink()
        assert not [f for f in check_run(recipe, overrides)["findings"] if f["severity"] == "error"]


@pytest.mark.parametrize("recipe", MADE)
def test_a_wrong_folder_and_none_at_all_are_named(tmp_path, recipe, monkeypatch):
    monkeypatch.delenv("PRECEPTOR_DATA", raising=False)
    with pytest.raises(UserError, match=r"give data\.root=FOLDER .*or set PRECEPTOR_DATA"):
        check_run(recipe, [f"output={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"data\.root=.*none does not exist"):
        check_run(recipe, [f"data.root={tmp_path / 'none'}", f"output={tmp_path / 'run'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no|contains 0|nor its data"):
        check_run(recipe, [f"data.root={tmp_path / 'empty'}", f"output={tmp_path / 'run'}"])


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "rows", "images"),
    [
        ("mhkd-vqa-rad", 1797 + 983 - 7 + 451, 314),
        ("mhkd-vqa-med-2019", 14_792, 3_700),
        ("mhkd-slake-en", 7_032, 642),
    ],
)
def test_doctor_finds_nothing_broken_in_the_real_files(tmp_path, recipe, rows, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_run(recipe, [f"output={tmp_path}"])
    assert [f for f in report["findings"] if f["severity"] == "error"] == []
    assert (sum(report["rows"].values()), report["images"]) == (rows, images)

"""Weights that were trained on test images are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.api import evaluate, run_recipe
from preceptor.data.provenance import PROVENANCE_FILE, read_provenance
from preceptor.errors import UserError
from preceptor.tasks import load_recipe
from preceptor.vqa.config import VqaRecipe
from tests.auditing.made import picture, row, write_table
from tests.fault.tiny import write_recipe


def table(folder: Path, splits: dict[str, list[int]], side: int) -> Path:
    folder.mkdir()
    rows = []
    for split, numbers in splits.items():
        for number in numbers:
            picture(number, 128).resize((side, side)).save(folder / f"{number}.png")
            rows += [row(f"{split}-{number}-{n}", f"{number}.png", split, f"Question {n}?", f"a{n}") for n in range(3)]
    return write_table(folder, rows)


def tiny(folder: Path, output: str, root: Path, *overrides: str) -> VqaRecipe:
    common = ["data.name=table", f"data.root={root}", "teacher.train.epochs=1", f"output={folder / output}"]
    return load_recipe(str(write_recipe(folder)), [*common, *overrides])


@pytest.mark.slow
def test_transfer_refuses_known_test_images_until_they_are_excluded(tmp_path: Path) -> None:
    first = table(tmp_path / "first", {"train": list(range(8)), "validation": [8], "test": [9]}, 100)
    second = table(tmp_path / "second", {"train": [20, 21, 22], "validation": [23], "test": [5, 24]}, 80)
    run_recipe(tiny(tmp_path, "pre", first))
    sources = read_provenance(tmp_path / "pre" / "model")
    assert sources is not None
    assert [len(source.images) for source in sources] == [9]

    begin = "teacher.model.init={}".format
    with pytest.raises(
        UserError, match=r"teacher\.model\.init=.* 1 of the 2 test images .*test-5-0.*exclude_images_of"
    ):
        run_recipe(tiny(tmp_path, "fine", second, begin(tmp_path / "pre")))
    assert not (tmp_path / "fine" / "model").exists()
    taught = ["stages=[distilled]", f"method.teaching.runs=[{tmp_path / 'pre'}]"]
    with pytest.raises(UserError, match=r"method\.teaching\.runs\[0\]=.* 1 of the 2 test images"):
        run_recipe(tiny(tmp_path, "taught", second, *taught))
    scored = evaluate(tmp_path / "pre", {"data.root": second}, output=tmp_path / "scores")
    assert any("trained on 1 of the test images" in note for note in scored["notes"])

    run_recipe(tiny(tmp_path, "pre2", first, f"data.exclude_images_of=[{second}]"))
    results = run_recipe(tiny(tmp_path, "fine2", second, begin(tmp_path / "pre2")))
    assert not any("Not checked" in note for note in results["notes"])
    # The images of the earlier weights are passed on, so that a third run checks them all.
    inherited = read_provenance(tmp_path / "fine2" / "model")
    assert inherited is not None
    assert sorted(len(source.images) for source in inherited) == [4, 8]
    third = table(tmp_path / "third", {"train": [30, 31], "validation": [32], "test": [2]}, 90)
    with pytest.raises(UserError, match="1 of the 1 test images"):
        run_recipe(tiny(tmp_path, "third-run", third, begin(tmp_path / "fine2")))

    (tmp_path / "pre2" / "model" / PROVENANCE_FILE).unlink()
    results = run_recipe(tiny(tmp_path, "fine3", second, begin(tmp_path / "pre2")))
    assert any("Not checked: teacher.model.init" in note for note in results["notes"])


@pytest.mark.slow
def test_a_run_may_start_from_an_earlier_one_on_the_same_data(tmp_path: Path) -> None:
    """Also if the splits of the data set share images, as those of VQA-RAD do."""
    shared = table(tmp_path / "shared", {"train": [0, 1, 2], "validation": [3], "test": [4]}, 100)
    text = shared.read_text("utf-8").replace("test-4-2,4.png", "test-4-2,0.png")
    shared.write_text(text, "utf-8")
    run_recipe(tiny(tmp_path, "once", shared))
    run_recipe(tiny(tmp_path, "again", shared, f"teacher.model.init={tmp_path / 'once'}"))
    document = json.loads((tmp_path / "again" / "model" / PROVENANCE_FILE).read_text("utf-8"))
    assert len(document["sources"]) == 1

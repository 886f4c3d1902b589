from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.data import provenance
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError
from preceptor.pipeline.run import contaminated
from preceptor.vqa.config import DataConfig, VqaRecipe
from preceptor.vqa.data import read_data
from preceptor.vqa.experiment import VqaExperiment
from tests.auditing.made import picture, row, write_table


def table(folder: Path, seeds: dict[str, list[int]], side: int, **save) -> Path:
    """Write a table about the pictures of the given seeds, by part."""
    folder.mkdir()
    rows = []
    for part, numbers in seeds.items():
        for number in numbers:
            name = f"patient-{number}.{save.get('format', 'png')}"
            picture(number, 256).resize((side, side)).save(folder / name, **save)
            rows.append(row(f"{part}-{number}", name, part))
    return write_table(folder, rows)


def experiment(path: Path, data: Dataset[Sample] | None = None) -> VqaExperiment:
    """Return the experiment of a table."""
    recipe = VqaRecipe(name="tiny", output=str(path.parent / "run"), data={"name": "table", "root": str(path)})
    return VqaExperiment(recipe, data or read_table(path))


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    return table(tmp_path / "one", {"train": list(range(8)), "validation": [8, 9], "test": [10]}, 200)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Its test shares images 3 and 9 with training and validation of the other, as JPEG in another size."""
    return table(tmp_path / "two", {"train": [20, 21, 4], "validation": [22], "test": [3, 9, 23]}, 180, format="jpeg")


def test_test_images_known_from_elsewhere_are_found(pretraining: Path, target: Path) -> None:
    source = experiment(pretraining).training_images()
    assert len(source.images) == 10
    assert contaminated(experiment(target), [source]) == (["test-3", "test-9"], 2)


def test_the_same_data_set_and_split_is_not_asked(pretraining: Path) -> None:
    data = read_table(pretraining)
    name, split, rows = experiment(pretraining).training_images().key
    images = dict(provenance.hash_images(sample.image for sample in data.split("test")).values())
    assert contaminated(experiment(pretraining), [provenance.Source(name, split, rows, images)]) == ([], 0)
    for other in (("x", split, rows), (name, "x", rows), (name, split, "x")):
        assert contaminated(experiment(pretraining), [provenance.Source(*other, images)]) == (["test-10"], 1)


def test_excluded_images_leave_training_and_validation(pretraining: Path, target: Path, tmp_path: Path) -> None:
    config = DataConfig(name="table", root=str(pretraining), exclude_images_of=[str(target)])
    data = read_data(config, tmp_path / "run" / "data")
    assert {s.id for s in data.samples} == {f"train-{n}" for n in (0, 1, 2, 4, 5, 6, 7)} | {"validation-8", "test-10"}
    assert any(note.startswith("Left out of training and validation: 2 images (2 questions)") for note in data.notes)
    assert contaminated(experiment(target), [experiment(pretraining, data).training_images()]) == ([], 0)
    assert (tmp_path / "run" / provenance.CACHE).is_file()


def test_of_a_folder_every_image_is_excluded(pretraining: Path, target: Path, tmp_path: Path) -> None:
    (target.parent / "questions.csv").unlink()
    config = DataConfig(name="table", root=str(pretraining), exclude_images_of=[str(target.parent)])
    data = read_data(config, tmp_path / "data")
    assert "train-4" not in {s.id for s in data.samples}
    assert len(data.samples) == 11 - 3


@pytest.mark.parametrize(("entry", "says"), [("vqa-rat", "did you mean 'vqa-rad'"), ("vqa-rad/leaky", "leaky")])
def test_an_unknown_entry_is_refused(
    entry: str, says: str, pretraining: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_DATA", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(says)):
        read_data(DataConfig(name="table", root=str(pretraining), exclude_images_of=[entry]), tmp_path / "data")


def test_a_folder_without_images_is_refused(pretraining: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no image files"):
        read_data(
            DataConfig(name="table", root=str(pretraining), exclude_images_of=[str(tmp_path / "empty")]), tmp_path / "d"
        )


def test_the_file_holds_hashes_alone_and_comes_back(pretraining: Path, target: Path, tmp_path: Path) -> None:
    sources = [experiment(path).training_images() for path in (pretraining, target)]
    provenance.write_provenance(tmp_path, sources)
    text = (tmp_path / provenance.PROVENANCE_FILE).read_text("utf-8")
    assert "patient" not in text
    assert "train-" not in text
    assert provenance.read_provenance(tmp_path) == sources
    digests = [list(source["images"]) for source in json.loads(text)["sources"]]
    assert all(found == sorted(found) for found in digests)
    assert provenance.read_provenance(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"sources": [{}]}',
        '{"sources": [{"data": "a", "variant": "", "test_sha256": "", "images": {"ab": "12"}}]}',
    ],
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / provenance.PROVENANCE_FILE).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        provenance.read_provenance(tmp_path)


def test_sources_of_one_data_set_are_merged() -> None:
    one, two = provenance.Source("a", "", "x", {"2": "p"}), provenance.Source("a", "", "x", {"1": "q"})
    other = provenance.Source("a", "", "y", {"3": "r"})
    assert provenance.merge([one, other, two]) == [provenance.Source("a", "", "x", {"1": "q", "2": "p"}), other]


def test_the_cache_saves_decoding_and_a_damaged_one_is_made_again(
    pretraining: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.json"
    paths = sorted(pretraining.parent.glob("*.png"))
    first = provenance.hash_images(paths, cache)
    cache.write_text(cache.read_text()[:50])
    assert provenance.hash_images(paths, cache) == first
    monkeypatch.setattr(provenance, "load_image", lambda *_, **__: pytest.fail("decoded again"))
    assert provenance.hash_images(paths, cache) == first


def test_broken_are_left_out_and_blank_ones_known_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"x")
    for name, grey in (("a", 3), ("b", 200)):
        Image.fromarray(np.full((40, 40), grey, np.uint8)).save(tmp_path / f"{name}.png")
    found = provenance.hash_images(sorted(tmp_path.glob("*.png")))
    assert sorted(path.name for path in found) == ["a.png", "b.png"]
    only_a = dict([found[tmp_path / "a.png"]])
    assert provenance.match_images(found, only_a) == {tmp_path / "a.png"}

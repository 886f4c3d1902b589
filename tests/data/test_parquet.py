from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from preceptor.config import DataConfig
from preceptor.data.read import read_data
from preceptor.errors import UserError


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[tuple[bytes, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{"image": {"bytes": image, "path": None}, "question": q, "answer": a} for image, q, a in rows]
    parquet.write_table(pa.Table.from_pylist(table), path)


def hub(root: Path) -> Path:
    write(root / "data" / "train-00000-of-00002-ab.parquet", [(png(n), f"what {n}?", "liver") for n in range(6)])
    write(root / "data" / "train-00001-of-00002-cd.parquet", [(png(0), "is it?", "Yes "), (png(9), "is it?", "no")])
    write(root / "data" / "test-00000-of-00001-ef.parquet", [(png(20), "where?", "left"), (png(1), "is it?", "no")])
    return root


def test_images_are_written_once_and_the_same_image_is_one_group(tmp_path):
    root = hub(tmp_path / "hub")
    data = read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path / "scratch")
    assert (data.name, data.split, len(data.samples)) == ("path-vqa", "official", 10)
    by_id = {sample.id: sample for sample in data.samples}
    assert by_id["train-6"].image == by_id["train-0"].image
    assert by_id["train-6"].answers == ("Yes",)
    assert by_id["train-6"].answer_type == "closed"
    assert by_id["test-0"].answer_type == "open"
    assert len(list((root / "extracted-images").iterdir())) == 8
    assert all(sample.image.read_bytes().startswith(b"\x89PNG") for sample in data.samples)
    # The test part's second image is a training image: the reader finds it and says so.
    assert data.leaking
    assert any("1 of 8 images" in note for note in data.notes)
    assert data.part("validation")
    before = {path: path.stat().st_mtime_ns for path in (root / "extracted-images").iterdir()}
    assert data.fingerprint() == read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path).fingerprint()
    assert before == {path: path.stat().st_mtime_ns for path in (root / "extracted-images").iterdir()}


def test_vqa_rad_from_the_hub(tmp_path):
    data = read_data(DataConfig(name="vqa-rad", split="hub", root=str(hub(tmp_path))), tmp_path)
    assert (data.name, data.split) == ("vqa-rad", "hub")
    assert any("no question frames" in note for note in data.notes)


def test_an_official_validation_part_is_kept(tmp_path):
    root = hub(tmp_path)
    write(root / "data" / "validation-00000-of-00001.parquet", [(png(77), "how?", "well")])
    data = read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)
    assert [sample.id for sample in data.part("validation")] == ["validation-0"]
    assert len(data.part("train")) == 8


def test_faults_are_named(tmp_path):
    config = DataConfig(name="path-vqa", root=str(hub(tmp_path)))
    test_file = tmp_path / "data" / "test-00000-of-00001-ef.parquet"
    whole = test_file.read_bytes()
    test_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"test-00000-of-00001-ef\.parquet cannot be read as parquet"):
        read_data(config, tmp_path)
    parquet.write_table(pa.Table.from_pylist([{"image": {"bytes": b"x"}, "query": "a", "answer": "b"}]), test_file)
    with pytest.raises(UserError, match="has no column 'question'"):
        read_data(config, tmp_path)
    write(test_file, [(b"", "a", "b")])
    with pytest.raises(UserError, match="row 0: the image column holds no bytes"):
        read_data(config, tmp_path)
    write(test_file, [(png(1), "a", " ")])
    with pytest.raises(UserError, match="row 0: the question or the answer is empty"):
        read_data(config, tmp_path)
    write(test_file, [(png(1), "a", "b")])
    with pytest.raises(UserError, match=r"more than the ceiling of 10; raise data\.max_image_bytes"):
        read_data(DataConfig(name="path-vqa", root=str(tmp_path), max_image_bytes=10), tmp_path)
    test_file.unlink()
    with pytest.raises(UserError, match=r"has no test-\*\.parquet"):
        read_data(config, tmp_path)


def test_settings_of_other_data_sets_are_refused(tmp_path):
    for setting in ({"split": "clean"}, {"language": "en"}, {"validation_by": "question"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(setting))}="):
            read_data(DataConfig(name="path-vqa", root=str(tmp_path), **setting), tmp_path)
    with pytest.raises(UserError, match=r"data\.split='cleen' of slake is not known; did you mean 'clean'"):
        read_data(DataConfig(name="slake", split="cleen", root=str(tmp_path)), tmp_path)

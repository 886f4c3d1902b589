from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preceptor.data.vqa.slake import read_slake
from preceptor.errors import UserError
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data


def row(qid: int, image: int, language: str = "en", **fields: Any) -> dict[str, Any]:
    return {
        "qid": qid,
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": f"What is {qid}?",
        "answer": "Liver",
        "q_lang": language,
        "answer_type": "OPEN",
        "content_type": "Organ",
        "location": "Abdomen",
        "modality": "CT",
        "base_type": "vqa",
        **fields,
    }


def release(root: Path, train: list[dict], validate: list[dict], test: list[dict]) -> Path:
    for name, rows in (("train", train), ("validate", validate), ("test", test)):
        (root / f"{name}.json").write_text(json.dumps(rows), "utf-8")
        for entry in rows:
            image = root / "imgs" / entry["img_name"]
            if not image.exists() and ".." not in entry["img_name"]:
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), entry["img_id"]).save(image)
    return root


TRAIN = [row(0, 1), row(1, 2), row(2, 3, "zh"), row(3, 4, "zh"), row(4, 5, answer="  ")]
VALIDATE = [row(5, 6), row(6, 1, "zh")]
TEST = [row(7, 7, answer_type="CLOSED ", answer="Yes"), row(8, 3), row(9, 2, "zh")]


def counts(data) -> tuple[int, ...]:
    return tuple(len(data.split(part)) for part in ("train", "validation", "test"))


def test_a_language_is_read_alone_and_its_rows_keep_what_protocols_need(tmp_path):
    data = read_slake(release(tmp_path, TRAIN, VALIDATE, TEST))
    assert counts(data) == (2, 1, 2)
    sample = data.split("test")[0]
    assert (sample.answer_type, sample.question_type, sample.tags["language"]) == ("closed", "Organ", "en")
    assert (data.variant, data.leaking) == ("en", False)
    assert "1 training or validation row(s) without an answer" in data.notes[0]
    assert data.notes[1].startswith("1 of the 2 test images are training images in Chinese")
    chinese = read_slake(tmp_path, language="zh")
    assert counts(chinese) == (2, 1, 1)
    assert chinese.notes[0].startswith("1 of the 1 test images are training images in English")
    assert read_slake(tmp_path, variant="published").variant == "en"  # nothing is shared within a language


def test_both_languages_leave_out_what_the_other_holds_out(tmp_path):
    data = read_slake(release(tmp_path, TRAIN, VALIDATE, TEST), language="both")
    # qid 0 (image 1 validates in Chinese), 1 (image 2 is tested in Chinese), 2 (image 3 is tested in English) go.
    assert [s.id for s in data.split("train")] == ["3"]
    assert counts(data) == (1, 2, 3)
    assert not data.leaking
    assert "2 of the test images" in " ".join(data.notes)
    leaking = read_slake(tmp_path, language="both", variant="published")
    assert counts(leaking) == (4, 2, 3)
    assert leaking.leaking
    assert leaking.variant == "both-published"


def test_an_image_under_two_names_is_one_group(tmp_path):
    root = release(tmp_path, TRAIN, VALIDATE, TEST)
    copies = {"train": root / "imgs" / "xmlab2" / "source.jpg", "test": root / "imgs" / "xmlab7" / "source.jpg"}
    copies["test"].write_bytes(copies["train"].read_bytes())
    data = read_slake(root)
    # The test row stays, and the training row about the same picture goes.
    assert counts(data) == (1, 1, 2)
    assert not data.leaking
    assert read_slake(root, variant="published").leaking


def test_text_that_is_not_utf_8_is_named(tmp_path):
    root = release(tmp_path, TRAIN, VALIDATE, TEST)
    (root / "train.json").write_bytes(json.dumps(TRAIN).replace("Liver", "Lib\xe9r").encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.json:1: byte 0xe9 is not UTF-8"):
        read_slake(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer_type": "BOTH"}, "answer_type 'BOTH' is not known"),
        ({"q_lang": "de"}, "q_lang 'de' is not known"),
        ({"question": ""}, "the id, the question or the answer is missing"),
        ({"qid": 8}, "qid '8' occurs twice"),
        ({"img_name": "../../a.jpg"}, "leaves the folder"),
        ({"img_name": "", "img_id": 9}, "image '' is not a file name"),
    ],
)
def test_a_broken_row_is_named(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read_slake(release(tmp_path, TRAIN, VALIDATE, [*TEST, row(10, 7) | change]))


def test_broken_files_are_named(tmp_path):
    root = release(tmp_path, TRAIN, VALIDATE, TEST)
    with pytest.raises(UserError, match="language 'cn' is not known"):
        read_slake(root, language="cn")  # type: ignore[arg-type]
    whole = (root / "test.json").read_text()
    (root / "test.json").write_text(whole[:-20])
    with pytest.raises(UserError, match=r"test\.json cannot be read as JSON"):
        read_slake(root)
    entry = dict(TEST[0])
    del entry["content_type"]
    (root / "test.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match="entry 1 lacks content_type"):
        read_slake(root)
    (root / "test.json").write_text(json.dumps(TEST))
    (root / "imgs" / "xmlab3" / "source.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 5 image files are missing(.|\n)*xmlab3/source.jpg \(test.json, qid 8\)"):
        read_slake(root)
    (root / "test.json").unlink()
    with pytest.raises(UserError, match=r"lacks test\.json"):
        read_slake(root)


def test_the_name_of_the_validation_file_on_the_hub(tmp_path):
    root = release(tmp_path, TRAIN, VALIDATE, TEST)
    expected = read_slake(root).samples
    (root / "validate.json").rename(root / "validation.json")
    data = read_slake(root)
    assert data.samples == expected
    assert [f.file.name for f in data.findings if "but the release has 2,099" in f.reason] == ["validation.json"]
    (root / "validate.json").write_text("[]")
    with pytest.raises(UserError, match=r"contains validate\.json and validation\.json; keep the one of your release"):
        read_slake(root)


@pytest.mark.real_data
def test_the_real_files(tmp_path):
    english = read_data(DataConfig(name="slake"), tmp_path)
    assert counts(english) == (4_918, 1_053, 1_061)  # one of 4,919 training rows has no answer
    assert [s.answer_type for s in english.split("test")].count("closed") == 416
    chinese = read_data(DataConfig(name="slake", language="zh"), tmp_path)
    assert counts(chinese) == (4_916, 1_046, 1_033)
    for data in (english, chinese):
        assert [len({s.group for s in data.split(p)}) for p in ("train", "validation", "test")] == [450, 96, 96]
        assert not data.leaking
    shared = {s.group for s in english.split("test")} & {s.group for s in chinese.split("train")}
    assert len(shared) == 72
    assert any(note.startswith("72 of the 96 test images are training images in Chinese") for note in english.notes)
    assert any(note.startswith("70 of the 96 test images are training images in English") for note in chinese.notes)
    kinds = {"Modality", "Plane", "Organ", "Abnormality", "Position", "Size", "Color", "Shape", "Quantity", "KG"}
    assert {s.question_type for s in english.samples} == kinds
    assert {s.tags["modality"] for s in english.samples} == {"CT", "MRI", "X-Ray"}
    both = read_data(DataConfig(name="slake", language="both"), tmp_path)
    assert not both.leaking
    published = read_data(DataConfig(name="slake", language="both", variant="published"), tmp_path)
    assert published.leaking
    assert counts(published) == (4_918 + 4_916, 1_053 + 1_046, 1_061 + 1_033)
    # Whatever is shared between the languages: 72 images one way, 70 the other.
    trained = {s.group for s in published.split("train")}
    assert len({s.group for s in published.split("test")} & trained) == 142
    for part, stricter in (("train", ("validation", "test")), ("validation", ("test",))):
        held = {s.group for other in stricter for s in both.split(other)}
        assert not held & {s.group for s in both.split(part)}

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from preceptor.data.grounding.box_formats import find_boxes, mark_boxes, without_boxes, write_box, write_reference
from preceptor.errors import UserError
from preceptor.grounding.sources import read_dialogues
from tests.data.grounding.test_readers import RECORDS, write


def jsonl(folder: Path, records: list[dict]) -> Path:
    for name in {record["image"] for record in records if "image" in record}:
        Image.new("L", (8, 8)).save(folder / name)
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_file_of_ones_own_may_lack_answers(tmp_path):
    def turn(question: str, *answer: str) -> list[dict]:
        return [{"from": "human", "value": question}, *({"from": "gpt", "value": text} for text in answer)]

    records = [
        {"image": "ct_1.png", "conversations": turn("What?", "A liver.")},
        {"image": "ct_2.png", "conversations": turn("What?")},
        {"image": "ct_3.png", "conversations": turn("What?", "A lung.") + turn("Where?")},
        {"image": "ct_4.png", "conversations": turn("What?") + turn("Where?", "Left.")},
        {"image": "ct_5.png", "conversations": [{"from": "system", "value": "Be brief."}, *turn("A?"), *turn("B?")]},
    ]
    data = read_dialogues(str(jsonl(tmp_path, records)))
    assert [d.split for d in data.samples].count("unlabelled") == 4
    assert data.samples[0].split in ("train", "validation", "test")
    assert [d.turns for d in data.samples[1:]] == [
        (("What?", ""),),
        (("What?", "A lung."), ("Where?", "")),
        (("What?", ""), ("Where?", "Left.")),
        (("A?", ""), ("B?", "")),
    ]


def test_unlabelled_records_need_no_split_beside_those_that_have_one(tmp_path):
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A liver."}]
    records = [{"image": "a.png", "conversations": said, "split": "test"}]
    records.append({"image": "b.png", "conversations": said[:1]})
    data = read_dialogues(str(jsonl(tmp_path, records)))
    assert [d.split for d in data.samples] == ["test", "unlabelled"]
    records.append({"image": "c.png", "conversations": said})
    with pytest.raises(UserError, match="some records have a split"):
        read_dialogues(str(jsonl(tmp_path, records)))


def test_answers_without_a_question_are_still_wrong(tmp_path):
    for said in (["gpt"], ["human", "gpt", "gpt"]):
        records = [{"image": "a.png", "conversations": [{"from": who, "value": "x"} for who in said]}]
        with pytest.raises(UserError, match="questions and answers must alternate"):
            read_dialogues(str(jsonl(tmp_path, records)))


def test_a_folder_of_images_is_asked_about(tmp_path):
    for name in ("mr_2.png", "sub/ct_1.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    data = read_dialogues(str(tmp_path), questions=["What?", "Where?"])
    assert [(d.id, d.modality, d.split) for d in data.samples] == [
        ("mr_2.png", "mr", "unlabelled"),
        ("sub/ct_1.jpg", "ct", "unlabelled"),
    ]
    assert {d.turns for d in data.samples} == {(("What?", ""), ("Where?", ""))}
    with pytest.raises(UserError, match="give the questions to ask about each with --question"):
        read_dialogues(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="contains no image files"):
        read_dialogues(str(tmp_path / "none"), questions=["?"])


def test_named_sets(tmp_path, monkeypatch):
    write(tmp_path / "med_grit", RECORDS)
    assert len(read_dialogues("med-grit", tmp_path / "med_grit").split("train")) == 4
    monkeypatch.setenv("PRECEPTOR_DATA", str(tmp_path))
    assert len(read_dialogues("med-grit").samples) == 4
    (tmp_path / "med_grit" / "images").mkdir()
    with pytest.raises(UserError, match="image files are missing"):
        read_dialogues("med-grit")
    with pytest.raises(UserError, match=r"contains no train\.json"):
        read_dialogues("med-grit", tmp_path)
    monkeypatch.delenv("PRECEPTOR_DATA")
    with pytest.raises(
        UserError, match=r"folder of slake-grounding is not known; .* --root FOLDER, or set PRECEPTOR_DATA"
    ):
        read_dialogues("slake-grounding")
    with pytest.raises(UserError, match="did you mean 'med-grit'"):
        read_dialogues("med-grid")
    with pytest.raises(UserError, match="does not exist"):
        read_dialogues(str(tmp_path / "none.jsonl"))


def test_boxes_are_marked_again_and_left_out():
    text = f"{write_reference('liver')} at {write_box((1, 2, 30, 40))} and {write_box((5, 6, 7, 8))}"
    bare = "liver at (1,2),(30,40) and (5,6),(7,8)"
    assert mark_boxes(bare) == f"liver at {write_box((1, 2, 30, 40))} and {write_box((5, 6, 7, 8))}"
    assert find_boxes(mark_boxes(bare)) == find_boxes(text)
    assert mark_boxes(text) == text
    assert mark_boxes("nothing (1,2)") == "nothing (1,2)"
    assert without_boxes(text) == without_boxes(bare) == "liver at and"

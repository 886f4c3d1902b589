from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.grounding.boxes import validate_box
from preceptor.data.grounding.med_grit import modality_of, read_med_grit, task_of
from preceptor.data.grounding.sharegpt import read_sharegpt
from preceptor.data.grounding.slake import CHINESE, read_slake_grounding
from preceptor.errors import UserError
from tests.data.vqa import test_slake

RECORDS = [
    {"id": "ct_1", "conversations": [["Where is the liver?", "<ref>liver</ref><box>(1,2),(30,40)</box>"]]},
    {"id": "mr_2", "conversations": [["What is in <box>(1,2),(30,40)</box>?", "left kidney"]]},
    {"id": "x_3", "conversations": [["Describe <box>(1,2),(30,40)</box>.", "The lung is clear and of a normal size."]]},
    {"id": "PET_4", "conversations": [["Is it normal?", "Yes"], ["Why?", "Nothing is bright."]]},
]


def write(folder: Path, records) -> dict:
    folder.mkdir(exist_ok=True)
    file = folder / "train.json"
    file.write_text(json.dumps(records))
    for record in records:
        if isinstance(record, dict) and isinstance(record.get("id"), str) and "/" not in record["id"]:
            (folder / f"{record['id']}.png").write_bytes(b"x")
    return {"train": file}


def test_tasks_and_modalities(tmp_path):
    data = read_med_grit(write(tmp_path, RECORDS), tmp_path)
    assert [d.task for d in data.samples] == ["vg", "roc", "rc", "mia"]
    assert [d.modality for d in data.samples] == ["ct", "mr", "x", "pet"]
    assert data.samples[3].turns == (("Is it normal?", "Yes"), ("Why?", "Nothing is bright."))
    assert data.split("train") == data.samples
    assert data.faults == {}
    assert modality_of("sub/Fundus_a_b") == "fundus"
    assert task_of([("hello", "there")]) == "mia"


def test_faulty_boxes_by_policy(tmp_path):
    bad = [
        *RECORDS,
        {"id": "ct_5", "conversations": [["Where?", "<box>(30,40),(1,2)</box>"]]},
        {"id": "ct_6", "conversations": [["Where?", "<box>left</box>"]]},
    ]
    files = write(tmp_path, bad)
    with pytest.raises(UserError, match=r"record 4: box .* is swapped corners"):
        read_med_grit(files, tmp_path)
    data = read_med_grit(files, tmp_path, boxes="repair")
    assert data.faults == {"swapped corners": 1, "unreadable": 1}
    assert data.samples[-1].turns == (("Where?", "<box>(1,2),(30,40)</box>"),)
    assert len(data.samples) == 5
    assert "1 of 6 records" in data.notes[0]
    assert len(read_med_grit(files, tmp_path, boxes="drop").samples) == 4


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"conversations": []}, "'id'"),
        ({"id": "../x", "conversations": [["a", "b"]]}, "leaves the folder"),
        ({"id": "a", "conversations": [["a"]]}, "pairs"),
        ({"id": "a", "conversations": [["a", " "]]}, "without empty texts"),
        ("text", "object"),
    ],
)
def test_broken_records(tmp_path, record, said):
    with pytest.raises(UserError, match=f"record 1: .*{said}"):
        read_med_grit(write(tmp_path, [RECORDS[0], record]), tmp_path)


def test_a_missing_image_is_named(tmp_path):
    files = write(tmp_path, RECORDS)
    (tmp_path / "mr_2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 image files are missing(.|\n)*mr_2.png \(.*record 1\)"):
        read_med_grit(files, tmp_path)
    assert len(read_med_grit(files, tmp_path, require=False).samples) == 4


@pytest.mark.real_data
@pytest.mark.parametrize("language", ["en", "zh"])
def test_slake_in_four_tasks(language):
    root = Path(os.environ["PRECEPTOR_DATA"]) / "slake"
    data = read_slake_grounding(root, language=language)
    tasks = Counter(d.task for d in data.samples)
    assert tasks["roc"] == tasks["rc"] > tasks["vg"] > 1000
    assert tasks["mia"] > 6900
    assert len({d.id for d in data.samples}) == len(data.samples)
    parts_of_image: dict[str, set] = {}
    for d in data.samples:
        parts_of_image.setdefault(d.group, set()).add(d.split)
        texts = " ".join(text for turn in d.turns for text in turn)
        boxes = find_boxes(texts, bare=False)
        assert bool(boxes) == (d.task != "mia")
        assert all(found.box is not None and validate_box(found.box) == [] for found in boxes)
        assert d.modality in ("ct", "mr", "x")
    assert all(len(parts) == 1 for parts in parts_of_image.values())
    assert data.fingerprint() == read_slake_grounding(root, language=language).fingerprint()
    if language == "zh":
        names = {
            json_name
            for file in root.rglob("detection.json")
            for row in json.loads(file.read_text())
            for json_name in row
        }
        assert names <= set(CHINESE)


def test_a_broken_detection_file_is_named(tmp_path):
    root = test_slake.release(tmp_path, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)
    image = sorted(root.rglob("source.jpg"))[0]
    (image.parent / "detection.json").write_text('[{"Liver": [1, 2, 3]}]')
    with pytest.raises(UserError, match=r"detection\.json is invalid"):
        read_slake_grounding(root)


@pytest.mark.parametrize(("orientation", "refused"), [(1, False), (6, True)])
def test_boxes_of_turned_images_are_refused(tmp_path, orientation, refused):
    root = test_slake.release(tmp_path, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)
    image = sorted(root.rglob("source.jpg"))[0]
    with Image.open(image) as opened:
        exif = opened.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        opened.save(image, exif=exif)
    read_slake_grounding(root)  # no boxes
    (image.parent / "detection.json").write_text('[{"Liver": [1, 2, 3, 1]}]')
    if not refused:
        assert any(d.task == "vg" for d in read_slake_grounding(root).samples)
        return
    with pytest.raises(UserError, match=r"source\.jpg: the EXIF field Orientation is 6"):
        read_slake_grounding(root)


def test_med_grit_counts_marks_and_other_boxes(tmp_path):
    marked = {"id": "ct_1", "conversations": [["<image>\nWhere?", "<box>(1,2),(3,4)</box>"]]}
    assert read_med_grit(write(tmp_path, [marked]), tmp_path).samples[0].turns[0][0] == "Where?"
    for text, message in (("<img>Where?", "'<img>' is not known"), ("<image><image>?", "2 marks <image> and 1 images")):
        bad = {"id": "ct_1", "conversations": [[text, "x"]]}
        with pytest.raises(UserError, match=message):
            read_med_grit(write(tmp_path, [bad]), tmp_path)
    other = {"id": "ct_1", "conversations": [["Where?", '[{"bbox_2d": [1, 2, 3, 4]}]']]}
    (finding,) = read_med_grit(write(tmp_path, [other]), tmp_path).findings
    assert "1 records contain numbers that may be boxes" in finding.reason


def write_turns(folder: Path, records: list, name: str = "mine.json") -> Path:
    for record in records:
        images = record.get("images", []) if isinstance(record, dict) else []
        for image in images if isinstance(images, list) else []:
            (folder / Path(image).name).write_bytes(Path(image).name.encode())
    file = folder / name
    lines = "\n".join(json.dumps(record) for record in records)
    file.write_text(lines if name.endswith("l") else json.dumps(records))
    return file


def turns(number: int, **more) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": f"<image>\nWhere is it, {number}?"},
            {"from": "gpt", "value": "<|box_start|>(1,2),(3,4)<|box_end|>"},
        ],
        "images": [f"ct_{number}.png"],
        **more,
    }


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_sharegpt_divides_by_image(tmp_path, name):
    records = [turns(n % 20, id=f"r{n}") for n in range(60)]
    data = read_sharegpt(write_turns(tmp_path, records, name))
    assert data.samples[0].turns == (("Where is it, 0?", "<|box_start|>(1,2),(3,4)<|box_end|>"),)
    assert {(d.task, d.modality) for d in data.samples} == {("vg", "ct")}
    parts = {d.group: {e.split for e in data.samples if e.group == d.group} for d in data.samples}
    assert all(len(found) == 1 for found in parts.values())
    assert [len(data.split(part)) for part in ("train", "validation", "test")] == [48, 6, 6]


def test_messages_systems_and_given_splits(tmp_path):
    record = {
        "messages": [
            {"role": "system", "content": "You are a radiologist."},
            {"role": "user", "content": "<image>Normal?"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "split": "val",
        "task": "mia",
        "modality": "mr",
        "images": ["a.png"],
    }
    (dialogue,) = read_sharegpt(write_turns(tmp_path, [record])).samples
    assert dialogue.system == "You are a radiologist."
    assert dialogue.turns == (("Normal?", "Yes"), ("Sure?", "Yes."))
    assert (dialogue.split, dialogue.modality, dialogue.images) == ("validation", "mr", (tmp_path / "a.png",))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "'conversations' or 'messages'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "must alternate"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "has no answer"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "is not a turn"),
        (turns(0, task="vqa"), "task 'vqa' is not known"),
        (turns(0, split="trian"), "did you mean 'train'"),
        ({**turns(0), "images": ["../x.png"]}, "stay"),
        ({**turns(0), "images": 3}, "list of file names"),
        ("text", "instead of a JSON object"),
    ],
)
def test_broken_sharegpt(tmp_path, record, said):
    good = turns(1, split="test") if isinstance(record, dict) and "split" in record else turns(1)
    with pytest.raises(UserError, match=f"record 1: .*{said}"):
        read_sharegpt(write_turns(tmp_path, [good, record]))

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


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '[{"Liver": [NaN, 10, 20, 30]}]',
        '[{"Liver": [1, 10, Infinity, 30]}]',
        '[{"Liver": [1' + "0" * 400 + ", 10, 20, 30]}]",
        '[{"Liver": [true, 1, 2, 3]}]',
        '[{"Liver": ["1", "1", "2", "3"]}]',
        '[{"Liver": "1234"}]',
        '["Liver"]',
    ],
)
def test_detection_files_without_four_numbers_are_refused(tmp_path, content):
    root = test_slake.release(tmp_path, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)
    (root / "imgs" / "xmlab1" / "detection.json").write_text(content)
    with pytest.raises(UserError, match=r"xmlab1/detection\.json is invalid \(.*take the file as released"):
        read_slake_grounding(root)


@pytest.mark.parametrize(("box", "refused"), [("0.1, 0.1, 0.2, 0.3", True), ("0, 0, 1, 1", False)])
def test_boxes_of_slake_are_in_pixels(tmp_path, box, refused):
    root = test_slake.release(tmp_path, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)
    (root / "imgs" / "xmlab1" / "detection.json").write_text(f'[{{"Liver": [{box}]}}]')
    if refused:
        with pytest.raises(UserError, match=r"detection\.json: box 0.1, 0.1, 0.2, 0.3 has values in 0 to 1.*in pixels"):
            read_slake_grounding(root)
        return
    (dialogue,) = (d for d in read_slake_grounding(root).samples if d.task == "vg")
    assert find_boxes(dialogue.turns[0][1])[0].box == (0, 0, 125, 125)  # the images have 8 x 8 pixels


def test_slake_without_detection_files_is_refused_or_a_finding(tmp_path):
    root = test_slake.release(tmp_path, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)
    with pytest.raises(UserError, match=r"no image has a detection\.json"):
        read_slake_grounding(root)
    (root / "imgs" / "xmlab1" / "detection.json").write_text('[{"Liver": [1, 2, 3, 1]}]')
    reasons = [finding.reason for finding in read_slake_grounding(root).findings]
    # The English questions are about images 1, 2, 3, 6 and 7.
    assert "4 of 5 images have no detection.json, but all released images have one: xmlab2, xmlab3, xmlab6, xmlab7" in (
        reasons
    )
    assert "train.json has 5 rows, but the release has 9,835" in reasons


@pytest.mark.real_data
def test_slake_as_released_has_no_finding():
    assert read_slake_grounding(Path(os.environ["PRECEPTOR_DATA"]) / "slake").findings == []


@pytest.mark.parametrize(("orientation", "refused"), [(1, False), (6, True)])
def test_boxes_of_turned_images_are_refused(tmp_path, orientation, refused):
    root = test_slake.release(tmp_path, test_slake.TRAIN, test_slake.VALIDATE, test_slake.TEST)
    image = sorted(root.rglob("source.jpg"))[0]
    with Image.open(image) as opened:
        exif = opened.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        opened.save(image, exif=exif)
    (image.parent / "detection.json").write_text("[]")
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


@pytest.mark.parametrize("policy", ["refuse", "repair", "drop"])
@pytest.mark.parametrize("box", ["<box>(0.10,0.2),(0.50,0.7)</box>", "<box>[[0.1,0.2,0.5,0.7]]</box>"])
def test_boxes_of_med_grit_are_in_thousandths(tmp_path, box, policy):
    records = [*RECORDS, {"id": "ct_00", "conversations": [["Where is <ref>liver</ref>?", f"<ref>liver</ref>{box}"]]}]
    with pytest.raises(UserError, match=r"record 4: box 0.1, 0.2, 0.5, 0.7 has values in 0 to 1.*write boxes in thous"):
        read_med_grit(write(tmp_path, records), tmp_path, boxes=policy)


@pytest.mark.parametrize(
    "text", ["<box>(0,0),(1,1)</box>", "<box>(0.5,2.5),(30.5,40)</box>", "p = [0.1, 0.2, 0.5, 0.7]"]
)
def test_small_boxes_and_other_fractions_of_med_grit_are_read(tmp_path, text):
    records = [{"id": "ct_1", "conversations": [["Where?", text]]}]
    assert read_med_grit(write(tmp_path, records), tmp_path).samples[0].turns == (("Where?", text),)


@pytest.mark.parametrize("policy", ["repair", "drop"])
def test_no_policy_hides_boxes_of_med_grit_in_another_unit(tmp_path, policy):
    records = [
        {"id": f"ct_{n}", "conversations": [["Where?", f"<box>({n},20),(1400,1300)</box>"]]}  # pixels
        for n in range(4)
    ]
    with pytest.raises(UserError, match=r"train\.json: 4 of 4 boxes leave their image.*thousandths"):
        read_med_grit(write(tmp_path, records), tmp_path, boxes=policy)


@pytest.mark.parametrize(
    ("corners", "count", "doubt"),
    [
        ((90, 95), 4, "upper left tenth"),  # per cent
        ((390, 290), 10, "inside the images in pixels, too"),
        ((390, 310), 10, None),
        ((390, 290), 9, None),
    ],
)
def test_boxes_of_med_grit_that_may_be_in_another_unit_are_a_warning(tmp_path, corners, count, doubt):
    names = [f"ct_{n}" for n in range(count)]
    records = [
        {"id": name, "conversations": [["Where?", f"<box>({n},20),({corners[0]},{corners[1]})</box>"]]}
        for n, name in enumerate(names)
    ]
    files = write(tmp_path, records)
    for number, name in enumerate(names):
        Image.new("L", (400, 300), number).save(tmp_path / f"{name}.png")
    findings = read_med_grit(files, tmp_path).findings
    assert [doubt in finding.reason and finding.severity == "warning" for finding in findings] == [True] * bool(doubt)


@pytest.mark.parametrize(
    ("answer", "task"),
    [
        ("left lower lobe of the lung", "roc"),
        ("This is the left lower lobe of the lung.", "rc"),
        ("右肺下叶", "roc"),
        ("慢性阻塞性肺疾病", "roc"),
        ("マンモグラフィー", "roc"),
        ("肝脏的形态和大小正常，没有发现异常信号。", "rc"),  # noqa: RUF001
        ("この領域には肝臓が写っており、形は正常です。", "rc"),
        ("ここにはかんぞうがみえますがいじょうはありません", "rc"),
    ],
)
def test_long_answers_without_spaces_are_descriptions(answer, task):
    assert task_of([("What is in <box>(1,2),(30,40)</box>?", answer)]) == task


@pytest.mark.parametrize(
    ("name", "modality"),
    [("0000", "unknown"), ("ct", "unknown"), ("_1", "unknown"), ("CT_1_2", "ct"), ("a_b/7", "unknown")],
)
def test_the_modality_of_a_name_ends_at_an_underscore(name, modality):
    assert modality_of(name) == modality


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([f"p{n}_1" for n in range(8)], True),
        ([f"p{n}_{slice}" for n in range(4) for slice in range(3)], True),
        ([f"{n:04}" for n in range(8)], False),
        ([f"{name}_{n}" for name in ("oct", "mammography", "histology", "ct") for n in range(2)], False),
        ([f"{name}_1" for name in ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")], False),
    ],
)
def test_as_many_modalities_as_images_are_a_finding(tmp_path, names, found):
    records = [{"id": name, "conversations": [["Is it normal?", "Yes"]]} for name in names]
    findings = read_med_grit(write(tmp_path, records), tmp_path).findings
    assert ["modalities that are not known" in finding.reason for finding in findings] == [True] * found


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

"""Dialogues are read as they are written: marks, boxes, keys and roles are counted, and nothing is dropped silently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preceptor.data.grounding.box_formats import find_boxes, write, write_box
from preceptor.data.grounding.image_marks import split_at_images
from preceptor.data.grounding.sharegpt import read_sharegpt
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError

BOX = write_box((100, 200, 300, 400))


def image(folder: Path, name: str, size: tuple[int, int] = (640, 480)) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        picture = Image.new("L", size)
        picture.putdata(list(name.encode()))  # no two images have the same content
        picture.save(path)
    return name


def talk(question: str = "Where?", answer: str = BOX, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def read(folder: Path, *records: Any, name: str = "mine.json", **options: Any):
    for record in records:
        names = record.get("images", record.get("image", [])) if isinstance(record, dict) else []
        for one in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
            if isinstance(one, str):
                image(folder, one)
    file = folder / name
    lines = "\n".join(map(json.dumps, records))
    file.write_text(lines if name.endswith("l") else json.dumps(records), "utf-8")
    return read_sharegpt(file, **options)


# Boxes

KNOWN = {
    "xyxy-unit": "[0.1, 0.2, 0.3, 0.4]",
    "gemma": '[{"box_2d": [200, 100, 400, 300], "label": "liver"}]',
    "florence": "liver<loc_100><loc_200><loc_300><loc_400>",
    "paligemma": "<loc0205><loc0102><loc0410><loc0307> liver",
    "qwen2-vl": "<ref>liver</ref><box>[[100, 200, 300, 400]]</box>",
}


@pytest.mark.parametrize("format", KNOWN)
def test_boxes_in_any_format_are_stored_in_one(tmp_path, format):
    data = read(tmp_path, talk(answer=f"It is {KNOWN[format]}.", image="a.png"))
    (dialogue,) = data.samples
    assert dialogue.task == "vg"
    (found,) = find_boxes(dialogue.turns[0][1])
    assert found.box == pytest.approx((100, 200, 300, 400), abs=1)
    assert data.notes == [note for note in data.notes if f"1 boxes were read in the format {format}" in note]


def test_values_of_the_whole_file_decide(tmp_path):
    low, high = talk(answer="[100, 200, 300, 400]", image="a.png"), talk(answer="[1, 2, 900, 950]", image="b.png")
    with pytest.raises(
        UserError, match=r"values up to 400 fit xyxy-thousandths and xyxy-pixels and xywh-thousandths; name it with"
    ):
        read(tmp_path, low)
    first, _ = read(tmp_path, low, high).samples
    assert first.turns[0][1] == BOX, "a box of 950 is outside 640 x 480 pixels, so that all are in thousandths"
    (dialogue,) = read(tmp_path, low, box_format="xyxy-pixels").samples
    assert dialogue.turns[0][1] == write([(1000 * 100 / 640, 1000 * 200 / 480, 1000 * 300 / 640, 1000 * 400 / 480)])
    (dialogue,) = read(tmp_path, low, box_format="none").samples
    assert (dialogue.task, dialogue.turns[0][1]) == ("mia", "[100, 200, 300, 400]")


def test_pixels_of_qwen2_5_vl_are_those_of_the_resized_image(tmp_path):
    record = talk(answer='[{"bbox_2d": [64, 96, 322, 476], "label": "liver"}]', image="a.png")  # 640 x 480: 644 x 476
    (dialogue,) = read(tmp_path, record, box_format="qwen2.5-vl").samples
    assert dialogue.turns[0][1] == write([(99.4, 201.7, 500, 1000)], "liver")


def test_boxes_in_pixels_need_one_image(tmp_path):
    image(tmp_path, "a.png", (100, 100)), image(tmp_path, "b.png", (200, 100))
    with pytest.raises(UserError, match=r"record 0: boxes in pixels need the size of one image, .* images of 2 sizes"):
        read(tmp_path, talk(answer="[1, 2, 3, 4]", images=["a.png", "b.png"]), box_format="xyxy-pixels")


def test_turned_images_have_the_size_of_the_upright_one(tmp_path):
    picture = Image.new("L", (200, 100))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    record = talk(answer="[10, 20, 50, 100]", image="a.jpg")
    (dialogue,) = read(tmp_path, record, box_format="xyxy-pixels").samples
    assert dialogue.turns[0][1] == write_box((100, 100, 500, 500))


@pytest.mark.parametrize(
    "answer", ['{"bbox_2d": [1, 2, 3', '{"point_2d": [1, 2]}', "<box>(1,2),(3", '{"bbox_2d": [1, 2, 990]}']
)
def test_unreadable_boxes_are_faults(tmp_path, answer):
    records = [talk(answer=answer, image="a.png"), talk(image="b.png")]
    with pytest.raises(UserError, match=r"record 0: .* is not a box that can be read"):
        read(tmp_path, *records)
    data = read(tmp_path, *records, boxes="drop")
    assert (len(data.samples), data.faults) == (1, {"unreadable": 1})


# Marks


def test_marks_before_the_text_are_the_default_position(tmp_path):
    records = [
        talk("<image>\nWhere?", image="a.png"),
        talk("Where?", image="b.png"),
        talk("<image> <image>\nWhere?", images=["c.png", "d.png"]),
    ]
    assert [dialogue.turns[0][0] for dialogue in read(tmp_path, *records).samples] == ["Where?"] * 3


def test_other_positions_are_kept(tmp_path):
    record = talk("First <image> then <image>?", "Yes", images=["a.png", "b.png"])
    (dialogue,) = read(tmp_path, record).samples
    a, b = dialogue.images
    assert split_at_images([q for q, _ in dialogue.turns], dialogue.images) == [["First ", a, " then ", b, "?"]]
    later = talk("Hello", "Yes?", image="a.png")
    later["conversations"] += talk("<image>And now?", "No.")["conversations"]
    (dialogue,) = read(tmp_path, later).samples
    assert split_at_images([q for q, _ in dialogue.turns], dialogue.images) == [["Hello"], [a, "And now?"]]
    assert split_at_images(["A?", "B?"], (a, b)) == [[a, b, "A?"], ["B?"]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk("<image>Where?"), "1 marks <image> and 0 images"),
        (talk("<image><image>Where?", image="a.png"), "2 marks <image> and 1 images"),
        (talk("<image>Where?", images=["a.png", "b.png"]), "1 marks <image> and 2 images"),
        (talk("<image>Where?", "here <image>", image="a.png"), "an answer contains <image>"),
        *(
            (talk(f"{mark}Where?", image="a.png"), "the mark .* is not known")
            for mark in (
                "<img>a.png</img>",
                "<|vision_start|><|image_pad|><|vision_end|>",
                "<|image_pad|>",
                "[IMG]",
                "<image_1>",
                "<|image_1|>",
                "<video>",
                "<audio>",
                "<Image>",
                "<start_of_image>",
                "<image_placeholder>",
                "<IMG_CONTEXT>",
                "<bbox>",
            )
        ),
    ],
)
def test_marks_are_counted(tmp_path, record, message):
    with pytest.raises(UserError, match=f"record 0: .*{message}"):
        read(tmp_path, record)


# Keys and types


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"img": "a.png"}, "the key 'img' is not known"),
        ({"image_path": "a.png"}, "the key 'image_path' is not known"),
        ({"image_file": "a.png"}, "the key 'image_file' is not known"),
        ({"images_path": ["a.png"]}, "the key 'images_path' is not known"),
        ({"imageUrl": "http://x/a.png"}, "the key 'imageUrl' is not known"),
        ({"xray": "a.PNG"}, "the key 'xray' is not known"),
        ({"videos": ["a.mp4"]}, "the key 'videos' is not known"),
        ({"history": [["a", "b"]]}, "the key 'history' is not known"),
        ({"tools": "[]x"}, "the key 'tools' is not known"),
        ({"objects": {"bbox": [[1, 2, 3, 4]]}}, "0 marks <bbox> and 1 entries of objects.bbox"),
        ({"image": "a.png", "images": ["a.png"]}, "'image' and 'images'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "one non-empty list"),
        ({"id": ["a"]}, "id is a list"),
        ({"id": True}, "id is true"),
        ({"group": {"a": 1}}, "group is a structure"),
        ({"group": 1.5}, "group is a number that is not whole"),
        ({"split": 1}, "split '1' is not known"),
        ({"task": "vqa"}, "task 'vqa' is not known"),
        ({"modality": ["ct"]}, r"modality is \[\"ct\"\]"),
        ({"image": {"path": "a.png"}}, "must be a list of file names"),
        ({"images": [["a.png"]]}, "must be a list of file names"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, more, message):
    with pytest.raises(UserError, match=f"record 0: .*{message}"):
        read(tmp_path, talk(answer="Yes") | more)


def test_other_keys_are_listed(tmp_path):
    record = talk(image="a.png", source="web", image_id=7, score=0.5, videos=[], tools=None)
    record["conversations"][0]["loss"] = 0
    (finding,) = read(tmp_path, record, talk(image="b.png", source="x")).findings
    assert finding.severity == "warning"
    assert finding.reason.endswith(
        "not read: image_id (1), loss of a message (1), score (1), source (2), tools (1), videos (1)"
    )


ORGANS = {"options": ["kidney", "lung", "liver"]}
SINGLE = {"option_A": "kidney", "option_B": "lung"}


@pytest.mark.parametrize(
    "options", [ORGANS, SINGLE, {"choices": {"A": "kidney", "B": "lung"}}, {"options": "lung|liver"}]
)
@pytest.mark.parametrize("answer", ["B", "(b)", "B.", "1"])
def test_labels_of_options_that_the_question_lacks_are_an_error(tmp_path, options, answer):
    other = talk("Which organ, e.g. the lung?", "It is the lung.", image="b.png", **options)
    data = read(tmp_path, talk("Which organ?", answer, image="a.png", id="q7", **options), other)
    (error,) = [finding for finding in data.findings if finding.severity == "error"]
    assert error.sample_ids == ("q7",)
    assert error.reason.startswith(f"the answers of 1 of 2 dialogues, such as '{answer}', are letters or numbers of ")
    assert error.reason.endswith("write the text of the option as the answer, or all options into the question")


@pytest.mark.parametrize(
    ("question", "answer", "options"),
    [
        ("Which organ?\nA: kidney\nB: lung\nC: liver", "B", ORGANS),
        ("Which organ: (A) a kidney (B) a lung (C) the liver?", "B", ORGANS),
        ("Kidney, lung or liver?", "2", ORGANS),
        ("Which organ?", "lung", ORGANS),
        ("Which blood group?", "B", {"options": ["A", "B", "AB"]}),
        ("How many lesions?", "2", {"options": ["1", "2", "3"]}),
        ("Which organ?", "E", ORGANS),
        ("Which blood group?", "B", {}),
    ],
)
def test_other_letters_are_answers(tmp_path, question, answer, options):
    data = read(tmp_path, talk(question, answer, image="a.png", **options))
    assert not [finding for finding in data.findings if finding.severity == "error"]


def test_options_in_the_system_message_are_explained(tmp_path):
    more = {"image": "a.png", "system": "Answer with A) kidney, B) lung or C) liver.", **ORGANS}
    assert not [f for f in read(tmp_path, talk("Which organ?", "B", **more)).findings if f.severity == "error"]


@pytest.mark.parametrize("key", ["Split", "Group", "groups", "Modality", "Task", "ID"])
def test_a_key_that_is_nearly_named_as_a_known_one_is_refused(tmp_path, key):
    with pytest.raises(UserError, match=rf"record 0: unknown column '{key}'; did you mean '\w+'\?"):
        read(tmp_path, talk(image="a.png", **{key: "train"}))


@pytest.mark.parametrize("key", ["set", "phase"])
def test_a_key_of_split_names_that_is_not_read_is_an_error(tmp_path, key):
    records = [talk(image=f"{number}.png", **{key: ("train", "test")[number % 2]}) for number in range(8)]
    (finding,) = read(tmp_path, *records).findings
    assert finding.severity == "error"
    assert finding.reason == f"column '{key}' contains names of splits and is not read; rename it to split"
    # One value for all records is not a split of them.
    (finding,) = read(tmp_path, *(talk(image=f"{n}.png", **{key: "train"}) for n in range(8))).findings
    assert finding.severity == "warning"


def test_groups_of_cases_in_other_words_are_a_warning(tmp_path):
    data = read(tmp_path, *(talk(image=f"{number}.png", case_group=f"c{number % 4}") for number in range(40)))
    assert any("column 'case_group' may name examinations or patients" in finding.reason for finding in data.findings)


def test_merged_groups_are_a_note(tmp_path):
    data = read(tmp_path, *(talk(images=[f"{n}.png", f"{n + 1}.png"]) for n in range(12)))
    assert {d.split for d in data.samples} == {"train"}
    assert data.notes[-1] == "Groups with an image in common were merged (11 fewer groups)."


def test_zero_is_an_id_and_a_group_and_an_empty_split_is_none(tmp_path):
    records = [talk(image=f"{i}.png", id=i, group=0, split="") for i in range(3)]
    data = read(tmp_path, *records)
    assert [d.id for d in data.samples] == ["0", "1", "2"]
    assert {d.group for d in data.samples} == {"0"}
    assert data.variant == "by-group"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"from": "bot", "value": "x"}, "is not a turn"),
        ({"from": "observation", "value": "x"}, "is not a turn"),
        ({"from": "human", "value": 3}, "is not a turn"),
        ({"from": "human", "value": "x", "image": "a.png"}, "the key 'image' is not known"),
        ({"from": "system", "value": "x"}, "a system message must be the first"),
    ],
)
def test_turns(tmp_path, entry, message):
    record = talk()
    record["conversations"].append(entry)
    with pytest.raises(UserError, match=f"record 0: .*{message}"):
        read(tmp_path, record)


def test_system_messages_are_kept_apart(tmp_path):
    record = talk()
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    first, second = read(tmp_path, record, talk(system="Be exact.", id="b")).samples
    assert (first.system, first.turns[0][0]) == ("Be brief.", "Where?")
    assert second.system == "Be exact."
    assert first.fingerprint_row()[-1] == "Be brief."


def test_messages_with_parts(tmp_path):
    image(tmp_path, "a.png")
    image(tmp_path, "b.png")
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": " with "},
        {"type": "image", "image": "b.png"},
    ]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Equal."}]}
    (dialogue,) = read(tmp_path, record).samples
    assert [path.name for path in dialogue.images] == ["a.png", "b.png"]
    assert dialogue.turns == (("Compare <image> with <image>", "Equal."),)
    for part in ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "video"}, 3):
        record["messages"][0]["content"] = [part, {"type": "text", "text": "x"}]
        with pytest.raises(UserError, match=r"record 0: .* is not (the name of an image file|known)"):
            read(tmp_path, record)


# Groups


def test_neither_file_names_nor_folders_are_patients(tmp_path):
    data = read(tmp_path, *(talk(image=f"p{i}/s0.png") for i in range(8)))
    assert len({d.group for d in data.samples}) == 8
    (finding,) = data.findings
    assert "1 file names occur in more than one" in finding.reason


def test_equal_images_are_one_group(tmp_path):
    image(tmp_path, "a.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    records = [talk(image="a.png"), talk(images=["b.png", "copy.png"]), talk(image="b.png"), talk(image="c.png")]
    groups = [d.group for d in read(tmp_path, *records).samples]
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_a_patients_column_is_the_group(tmp_path):
    records = [talk(image=f"{i}.png", PatientID=f"P{i % 3}") for i in range(9)]
    data = read(tmp_path, *records)
    assert [d.group for d in data.samples] == [f"P{i % 3}" for i in range(9)]
    assert data.findings == []
    split = [talk(image=f"{i}.png", PatientID="P", group=f"g{i}", split=("train", "test")[i % 2]) for i in range(4)]
    (finding,) = read(tmp_path, *split).findings
    assert finding.severity == "error"
    assert "'PatientID' names 1 patients and is not used" in finding.reason


def test_columns_that_name_the_patient_are_joined(tmp_path):
    records = [talk(image=f"{i}.png", subject=f"s{i}", patient_id=f"P{i % 3}") for i in range(24)]
    data = read(tmp_path, *records)
    parts = [{(d.group, d.split) for d in data.samples[i::3]} for i in range(3)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert len({group for part in parts for group, _ in part}) == 3
    assert "Groups follow the columns subject and patient_id, which name patients." in data.notes
    assert data.findings == []


def test_a_record_without_a_patient_is_a_group_of_its_own(tmp_path):
    patients = [{"subject": "A"}, {"subject": "A", "patient_id": "P"}, {"patient_id": "P"}, {"patient_id": ""}, {}]
    groups = [d.group for d in read(tmp_path, *(talk(image=f"{i}.png", **p) for i, p in enumerate(patients))).samples]
    assert groups == ["A", "A", "A", "3.png", "4.png"]


def test_an_unanswered_record_of_a_held_out_patient_is_held_out_in_any_column(tmp_path):
    unanswered = {"conversations": [{"from": "human", "value": "Where?"}]}
    records = [
        talk(image="0.png", subject="A", patient_id="P", split="test"),
        {**unanswered, "image": "1.png", "subject": "B", "patient_id": "P"},
        {**unanswered, "image": "2.png", "subject": "B"},
        {**unanswered, "image": "3.png", "subject": "C"},
    ]
    rows = read(tmp_path, *records, answered=False).samples
    assert ["held_out" in row.tags for row in rows] == [False, True, True, False]


def test_a_patient_with_and_without_a_group_in_several_splits_is_a_finding(tmp_path):
    records = [
        talk(image="0.png", patient_id="P", group="g", split="train"),
        talk(image="1.png", patient_id="P", split="test"),
    ]
    (finding,) = read(tmp_path, *records).findings
    assert finding.severity == "error"
    assert "'patient_id' names 1 patients and is not used" in finding.reason


def test_modalities_in_any_case_are_one(tmp_path):
    rows = [talk(image="0.png", modality="CT"), talk(image="1.png", modality="ct"), talk(image="ct_2.png")]
    rows += [talk(image="3.png"), talk()]
    data = read(tmp_path, *rows)
    assert [d.modality for d in data.samples] == ["ct", "ct", "ct", "unknown", "unknown"]


# Files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1}\n{"a": 2}', "one JSON object per line, not a JSON list; rename it to .jsonl"),
        ("a.jsonl", '[{"a": 1}]', "a JSON list, not one JSON object per line; rename it to .json"),
        ("a.json", '{"data": []}', "must be a list of records"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '["\\ud800"]', "half of a surrogate pair"),
        ("a.json", "[" + "9" * 5000 + "]", "too many digits"),
        ("a.json", "[]", "contains no records"),
        ("a.json", '[{"id": 1, "id": 2}]', "'id' occurs twice"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_sharegpt(tmp_path / name)


def test_a_byte_order_mark_is_no_error(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([talk()]), "utf-8-sig")
    assert len(read_sharegpt(file).samples) == 1


def test_records_with_repeated_ids_are_named_by_their_number(tmp_path):
    records = [talk(id="x0", image="0.png"), talk(id="x0", image="0.png"), talk(id="x1", image="1.png")]
    data = read(tmp_path, *records)
    assert [d.id for d in data.samples] == ["row-1", "row-2", "row-3"]
    assert data.samples[0].group == data.samples[1].group != data.samples[2].group
    (finding,) = data.findings
    assert finding.severity == "warning"
    assert "1 ids belong to several records, such as 'x0'" in finding.reason
    assert [d.id for d in read(tmp_path, talk(image="0.png"), talk(id="row-1", image="1.png")).samples] == [
        "row-1",
        "row-2",
    ]
    assert [d.id for d in read(tmp_path, talk(image="0.png"), talk(id="x1", image="1.png")).samples] == ["row-1", "x1"]


def test_records_without_an_image_and_with_one_id_are_one_group(tmp_path):
    data = read(tmp_path, talk(id=1, answer="yes"), talk(id="1", answer="no"), talk(id=2, answer="no"))
    assert [d.group for d in data.samples] == ["1", "1", "2"]


def one(tmp_path, answer, question="Where is it?", count=1, size=(400, 300), **settings):
    """Read records with one image each. `answer` may be a function of the number of the record."""
    rows = []
    for number in range(count):
        Image.new("L", size, number).save(tmp_path / f"{number}.png")
        text = answer(number) if callable(answer) else answer
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    return read_sharegpt(tmp_path / "d.json", **settings)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "[100 200 300 400]",
            "[100; 200; 300; 400]",
            "[10%, 20%, 30%, 40%]",
            "100, 200, 300, 400",
            "0 0.5 0.5 0.2 0.3",
        ),
        *("x1=100, y1=200, x2=300, y2=400", '["100", "200", "300", "400"]', "<coords x='1' y='2'>liver</coords>"),
        *("[10, 20, 300, 20, 300, 200, 10, 200]", "[10, 20], [300, 20], [300, 200]", "<100, 200, 300, 400>"),
        *("center (200, 150), size 60 x 40", "from (100, 200) to (300, 400)", "The box is at 100, 200, 300, 400."),
        *('{"points": [[10, 20]]}', "{'cx': 0.5, 'cy': 0.5}", "x: 10, y: 20, w: 30, h: 40"),
    ],
)
def test_numbers_that_may_be_boxes_are_a_finding(tmp_path, answer):
    data = one(tmp_path, answer)
    assert any("numbers that may be boxes" in finding.reason for finding in data.findings)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "T1, T2, FLAIR",
            "levels 3, 4 and 5",
            "2.5 x 3.1 x 4.0 cm",
            "grades (1, 2)",
            "see [1, 2, 3]",
            "12/03/2020, 10:30",
        ),
        *("C3-C4, C4-C5", "1. liver\n2. spleen\n3. kidney\n4. lung", "BP 120/80, HR 72, RR 16, T 37.2", "x-ray"),
    ],
)
def test_other_numbers_are_no_finding(tmp_path, answer):
    assert one(tmp_path, answer).findings == []


@pytest.mark.parametrize("mark", ["<region>", "<mask>", "</s>", "<|im_start|>", "![](secret.png)", "{image}", "<SEG>"])
def test_marks_that_are_read_as_text_are_a_finding(tmp_path, mark):
    (finding,) = one(tmp_path, "liver", f"{mark} What is it?").findings
    assert "marks in the texts" in finding.reason
    assert "secret" not in finding.reason


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("（100，200），（300，400）", "(100,200),(300,400)"),  # noqa: RUF001
        ("<|box_start|>（１００，200），（300，400）<|box_end|>", "(100,200),(300,400)"),  # noqa: RUF001
        ('{"bbox": "100, 200, 300, 400"}', "(100,200),(300,400)"),
        ("\u4f4d\u7f6e\uff1a[100\uff0c200\uff0c300\uff0c400]", "(100,200),(300,400)"),
    ],
)
def test_signs_of_other_keyboards_and_quotes_are_read(tmp_path, answer, box):
    text = one(tmp_path, answer).samples[0].turns[0][1]
    assert text.endswith(f"<|box_start|>{box}<|box_end|>")


@pytest.mark.parametrize("format", ["[{}, {}, {}, {}]", "<box>({},{}),({},{})</box>"])
def test_fractions_among_thousandths_are_asked_for(tmp_path, format):
    boxes = [(100, 200, 300, 400), (0.1, 0.2, 0.3, 0.4)]
    with pytest.raises(UserError, match=r"the numbers of 1 of 2 boxes are from 0 to 1.*write all boxes in one unit"):
        one(tmp_path, lambda number: format.format(*boxes[number]), count=2)


@pytest.mark.parametrize("name", ["xyxy-thousandths", "xyxy-pixels", "qwen3-vl"])
def test_fractions_do_not_fit_another_format(tmp_path, name):
    with pytest.raises(UserError, match=r"box 0.1, 0.2, 0.3, 0.4 has values in 0 to 1"):
        one(tmp_path, "[0.1, 0.2, 0.3, 0.4]", box_format=name)


def test_another_syntax_than_that_of_the_named_format_is_no_box(tmp_path):
    with pytest.raises(UserError, match="is not a box that can be read"):
        one(tmp_path, "[100, 200, 300, 400]", box_format="paligemma")
    with pytest.raises(UserError, match=r"data.box_format=none, but 1 texts contain boxes"):
        one(tmp_path, "<box>(1,2),(3,4)</box>", box_format="none")


def test_per_cent_is_a_format(tmp_path):
    data = one(tmp_path, "[10, 20, 30, 95]", box_format="xyxy-percent")
    assert data.samples[0].turns[0][1] == "<|box_start|>(100,200),(300,950)<|box_end|>"
    with pytest.raises(UserError, match="xyxy-thousandths and xyxy-percent and xyxy-pixels"):
        one(tmp_path, "[10, 20, 30, 95]")


@pytest.mark.parametrize(
    ("answer", "count", "doubt"),
    [
        (lambda n: f"<box>({n},20),(90,95)</box>", 4, "upper left tenth"),
        (lambda n: f"<box>({n},20),(390,290)</box>", 10, "inside the images in pixels, too"),
    ],
)
def test_a_format_that_may_be_another_one_is_a_warning(tmp_path, answer, count, doubt):
    (finding,) = one(tmp_path, answer, count=count).findings
    assert re.search(doubt + ".*data.box_format", finding.reason)


def test_lists_that_may_be_corners_or_sizes_are_asked_for(tmp_path):
    numbers = iter(range(1, 5))
    with pytest.raises(UserError, match=r"fit xyxy-unit and xywh-unit; name it with data.box_format, one of"):
        one(tmp_path, lambda n: f"[0.{next(numbers)}, 0.2, 0.5, 0.6]", count=4)


@pytest.mark.parametrize(
    ("answer", "box_format", "expected"),
    [
        # An image of 400 x 300 pixels; corners by hand.
        ("[100, 60, 200, 120]", "xywh-pixels", "(250,200),(750,600)"),
        ('{"bbox": [100, 60, 200, 120], "label": "liver"}', "xywh-pixels", "(250,200),(750,600)"),
        ("[100, 200, 300, 400]", "xywh-thousandths", "(100,200),(400,600)"),
        ("[0.5, 0.5, 0.5, 0.4]", "cxcywh-unit", "(250,300),(750,700)"),
        ("[0.2, 0.1, 0.6, 0.5]", "yxyx-unit", "(100,200),(500,600)"),
        ('{"bbox": {"x": 100, "y": 60, "width": 200, "height": 120}}', "xyxy-pixels", "(250,200),(750,600)"),
        ('{"bbox": {"x": 0.1, "y": 0.2, "width": 0.3, "height": 0.4}}', "auto", "(100,200),(400,600)"),
        ('{"x_center": 0.5, "y_center": 0.5, "width": 0.5, "height": 0.4}', "auto", "(250,300),(750,700)"),
        ('{"bbox_xywh": [0.1, 0.2, 0.3, 0.4]}', "auto", "(100,200),(400,600)"),
        ('{"xyxy": [0.1, 0.2, 0.3, 0.4]}', "auto", "(100,200),(300,400)"),
        ('{"bbox_cxcywh": [0.5, 0.5, 0.5, 0.4]}', "auto", "(250,300),(750,700)"),
        ("[[0.1, 0.2], [0.5, 0.3], [0.4, 0.6]]", "auto", "(100,200),(500,600)"),
        ('{"segmentation": [[40, 60, 200, 60, 100, 150]]}', "polygon-pixels", "(100,200),(500,500)"),
        # Eight numbers are the corners of a quadrilateral.
        (
            '{"x1": 0.1, "y1": 0.2, "x2": 0.3, "y2": 0.24, "x3": 0.28, "y3": 0.44, "x4": 0.09, "y4": 0.4}',
            "auto",
            "(90,200),(300,440)",
        ),
        ('{"x0": 40, "y0": 60, "x1": 200, "y1": 60, "x2": 100, "y2": 150}', "xyxy-pixels", "(100,200),(500,500)"),
        ("<poly>(100,200),(500,300),(400,600)</poly>", "polygon-thousandths", "(100,200),(500,600)"),
    ],
)
def test_sizes_centres_and_polygons_become_corners(tmp_path, answer, box_format, expected):
    text = one(tmp_path, answer, box_format=box_format).samples[0].turns[0][1]
    label = "<|object_ref_start|>liver<|object_ref_end|>" if "label" in answer else ""
    assert text == f"{label}<|box_start|>{expected}<|box_end|>"


def test_every_object_of_a_list_keeps_its_box_and_its_name(tmp_path):
    objects = [
        {"bbox": {"x": 0.1, "y": 0.2, "width": 0.3, "height": 0.4}, "label": name} for name in ("liver", "spleen")
    ]
    for document in (objects, {"objects": objects}):
        boxes = find_boxes(one(tmp_path, json.dumps(document)).samples[0].turns[0][1])
        assert [(found.label, found.box) for found in boxes] == [
            (name, (100, 200, 400, 600)) for name in ("liver", "spleen")
        ]


def test_dialogues_without_an_image_are_a_finding(tmp_path):
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "<box>(1,2),(300,400)</box>"}]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": turns}]))
    (finding,) = read_sharegpt(tmp_path / "d.json").findings
    assert (finding.severity, "1 dialogues have boxes but no image" in finding.reason) == ("error", True)
    turns[1]["value"] = "yes"
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": turns}]))
    (finding,) = read_sharegpt(tmp_path / "d.json").findings
    assert finding.severity == "warning"


@pytest.mark.parametrize(
    "answer",
    ['[{"bbox_2d": [100, 200, 300, 940]}]', "<loc_100><loc_200><loc_300><loc_400>", "[0.1, 0.2, 0.3, 0.4]", BOX],
)
def test_boxes_in_any_format_need_an_image(tmp_path, answer):
    data = read(tmp_path, talk(answer=answer), talk(answer="Yes.", image="a.png"))
    assert [(f.severity, f.reason) for f in data.findings if "image" in f.reason] == [
        ("error", "1 dialogues have boxes but no image, such as mine.json, record 0; add their images")
    ]


@pytest.mark.parametrize("format", ["florence", "paligemma"])
def test_tokens_of_boxes_that_are_read_are_no_other_marks(tmp_path, format):
    assert read(tmp_path, talk(answer=KNOWN[format], image="a.png")).findings == []
    (finding,) = read(tmp_path, talk("<SEG> Where?", KNOWN[format], image="a.png")).findings
    assert finding.reason == "marks in the texts that are read as text: <SEG> (1)"


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("nan", "a missing value"),
        ("N/A", "a missing value"),
        ("null", "a missing value"),
        ("#REF!", "a missing value"),
        ("True", "a truth value"),
        ("['yes']", "a printed list"),
        ("array([1])", "a printed list"),
    ],
)
def test_answers_that_a_program_has_written_are_a_warning(tmp_path, answer, what):
    data = read(tmp_path, talk(answer=answer, image="a.png", id="q1"), talk(answer="Yes.", image="b.png"))
    (finding,) = data.findings
    assert (finding.severity, finding.sample_ids) == ("warning", ("q1",))
    assert finding.reason.startswith(f"1 answers, such as {answer!r}, look like {what}")


@pytest.mark.parametrize(
    "answer",
    [
        "None",
        "The value is NaN.",
        "It is true",
        '{"finding": "none", "side": "left"}',
        "[]",
        '["mass", "cyst"]',
        '{"liver": [0.1, 0.2, 0.3, 0.4]}',
    ],
)
def test_other_answers_of_dialogues_are_no_finding(tmp_path, answer):
    assert read(tmp_path, talk(answer=answer, image="a.png")).findings == []


def test_options_of_any_list_are_known_in_dialogues(tmp_path):
    more = {"image": "a.png", "candidates": ["liver", "lung"]}
    assert [f.severity for f in read(tmp_path, talk("Which organ?", "1", **more)).findings] == ["warning", "error"]
    for question, answer in (("Which organ? A. liver B. lung", "A"), ("How many?", "7"), ("Which?", "lung")):
        assert [f.severity for f in read(tmp_path, talk(question, answer, **more)).findings] == ["warning"]


# The format of ms-swift, in images of 640 x 480 pixels.


def swift(question: str, answer: str, *boxes: Any, names: Any = (), **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    images = more.pop("images", ["a.png"])
    return {"messages": messages, "images": images, "objects": {"ref": list(names), "bbox": list(boxes), **more}}


LIVER = "<|object_ref_start|>liver<|object_ref_end|>"


@pytest.mark.parametrize(
    ("record", "turn"),
    [
        (
            swift("<image>Where is the <ref-object>?", "<bbox>", [64, 48, 320, 240], names=["liver"]),
            (f"Where is the {LIVER}?", "<|box_start|>(100,100),(500,500)<|box_end|>"),
        ),
        (
            swift("What is shown?", "<ref-object><bbox>", [64.0, 48.0, 319.9, 240.2], names=["liver"]),
            ("What is shown?", f"{LIVER}<|box_start|>(100,100),(500,500)<|box_end|>"),
        ),
        (
            swift("What is in <bbox>?", "<bbox>", [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], bbox_type="norm1"),
            (
                "What is in <|box_start|>(100,200),(300,400)<|box_end|>?",
                "<|box_start|>(0,0),(1000,1000)<|box_end|>",
            ),
        ),
        (  # names without marks are not part of the texts
            swift("Where?", "<bbox>", [64, 48, 320, 240], names=["liver"], bbox_type=None, image_id=None),
            ("Where?", "<|box_start|>(100,100),(500,500)<|box_end|>"),
        ),
    ],
)
def test_objects_of_ms_swift_stand_at_their_marks(tmp_path, record, turn):
    data = read(tmp_path, record)
    assert data.samples[0].turns == (turn,)
    assert data.findings == []
    assert any(note.startswith("Boxes were read from 'objects': ") for note in data.notes)


def test_the_image_of_a_box_decides_its_size(tmp_path):
    image(tmp_path, "a.png", (100, 100)), image(tmp_path, "b.png", (200, 100))
    boxes = [10, 20, 30, 40], [10, 20, 30, 40]
    record = swift("<image><image>Where?", "<bbox><bbox>", *boxes, images=["a.png", "b.png"], image_id=[0, 1])
    assert [found.box for found in find_boxes(read(tmp_path, record).samples[0].turns[0][1])] == [
        (100, 200, 300, 400),
        (50, 200, 150, 400),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (swift("Where?", "<bbox><bbox>", [1, 2, 3, 4]), "2 marks <bbox> and 1 entries of objects.bbox"),
        (swift("<ref-object>?", "no", names=["a", "b"]), "1 marks <ref-object> and 2 entries of objects.ref"),
        (swift("<ref-object>?", "no"), "the mark '<ref-object>' is not known"),
        (swift("Where?", "<bbox>", [615, 226]), r"\[615, 226\] in objects.bbox is not a box; write \[x1, y1, x2, y2\]"),
        (swift("Where?", "<bbox>", [1, 2, 3, 4], bbox_type="norm1000"), "objects.bbox_type 'norm1000' is not known"),
        (swift("Where?", "<bbox>", [1, 2, 3, 4], image_id=[1]), "objects.image_id must have the index of an image"),
        (swift("Where?", "<bbox>", [1, 2, 3, 4], images=[]), "objects.bbox needs an image"),
        (swift("Where?", "<bbox>", [0.1, 0.2, 0.3, 0.4]), 'counts in pixels; set "bbox_type": "norm1"'),
        (swift("Where?", "<bbox>", [1, 2, 3, 4], label=["x"]), "'objects' must have the keys ref, bbox, bbox_type"),
        (swift("Where?", "<bbox>", [600, 2, 700, 4]), "is outside"),
        ({**swift("Where?", "no"), "objects": [{"caption": "liver"}]}, "'objects' must have the keys"),
    ],
)
def test_other_objects_are_refused(tmp_path, record, message):
    with pytest.raises(UserError, match=f"record 0: .*{message}"):
        read(tmp_path, record)


def test_a_named_format_does_not_apply_to_objects(tmp_path):
    record = swift("Where?", "<bbox>", [64, 48, 320, 240])
    with pytest.raises(
        UserError, match=r"data.box_format=xywh-pixels, but the boxes of 'objects' are in .* xyxy-pixels"
    ):
        read(tmp_path, record, box_format="xywh-pixels")
    assert read(tmp_path, record, box_format="xyxy-pixels").samples


def test_thousandths_in_objects_are_refused_even_if_boxes_are_repaired(tmp_path):
    records = [swift("Where?", "<bbox>", [100, 200, 900, 950 + n], images=[f"{n}.png"]) for n in range(4)]
    with pytest.raises(
        UserError, match=r"objects.bbox: 4 of 4 boxes leave their image if they are read as xyxy-pixels"
    ):
        read(tmp_path, *records, boxes="repair")


# Names of images


@pytest.mark.parametrize("key", ["image", "images"])
def test_images_as_the_library_datasets_stores_them(tmp_path, key):
    stored = {"bytes": None, "path": image(tmp_path, "a.png")}
    record = talk(**{key: stored if key == "image" else [stored]})
    assert read(tmp_path, record).samples[0].images == (tmp_path / "a.png",)
    with pytest.raises(UserError, match="record 0: an image is embedded as bytes; save it as a file"):
        read(tmp_path, talk(**{key: [{"bytes": "iVBORw0K", "path": "a.png"}]}))


def test_urls_of_files_are_paths(tmp_path):
    image(tmp_path, "a.png")

    def ask(url: str) -> Any:
        content = [{"type": "image", "image": url}, {"type": "text", "text": "Q"}]
        return read(
            tmp_path, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}
        )

    for url in (f"file://{tmp_path}/a.png", "file://a.png"):
        assert ask(url).samples[0].images == (tmp_path / "a.png",)
    for url in ("file:///elsewhere/a.png", f"file://{tmp_path}/../a.png"):
        with pytest.raises(UserError, match="leaves the folder of the table"):
            ask(url)
    with pytest.raises(UserError, match="is not the name of an image file"):
        ask("https://example.org/a.png")


@pytest.mark.parametrize("extra", [{"content": "other"}, {"role": "assistant"}])
def test_a_message_with_two_contents_or_speakers_is_refused(tmp_path, extra):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "Q", **extra}, {"from": "gpt", "value": "A"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    with pytest.raises(UserError, match="keep one of them"):
        read_sharegpt(tmp_path / "d.json")


def test_examinations_in_several_splits_are_a_warning(tmp_path):
    rows = []
    for number in range(4):
        Image.new("L", (9, 9), number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
        split = "train" if number % 2 else "test"
        rows.append({"image": f"{number}.png", "conversations": turns, "accession": f"A{number // 2}", "split": split})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    reasons = [finding.reason for finding in read_sharegpt(tmp_path / "d.json").findings]
    assert any("'accession' may name examinations" in reason for reason in reasons)


def test_the_columns_of_groups_and_patients_are_checked_as_in_a_table(tmp_path):
    """The findings about the same columns are those of `read_table`; only the rows without a group differ."""
    rows = [
        {
            "image": image(tmp_path, f"{number}.png"),
            "split": "train" if number % 2 else "test",
            "group": f"g{number % 2}",
            "patient_id": f"p{number // 2}",
            "accession": f"a{number // 4}",
        }
        for number in range(8)
    ]
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"id": str(n), "question": "Q", "answer": "A", **row}) for n, row in enumerate(rows))
    )
    table = [(f.severity, f.reason) for f in read_table(tmp_path / "t.jsonl").findings if f.reason.startswith("column")]
    talks = [talk("Q", "A", **row) for row in rows]
    found = [(f.severity, f.reason) for f in read(tmp_path, *talks).findings if f.reason.startswith("column")]
    assert len(table) == 2
    assert found == table
    # A patient decides in the records without a group.
    del talks[0]["group"], talks[1]["group"]
    talks[0]["patient_id"] = talks[1]["patient_id"] = "unknown"
    reasons = [finding.reason for finding in read(tmp_path, *talks).findings]
    assert any("column 'patient_id': 2 rows contain 'unknown'" in reason for reason in reasons)


@pytest.mark.parametrize(
    "answer", ["[1e999, 1, 2, 3]", "<box>(1e999,1),(2,3)</box>", '{"x1":1,"y1":2,"x2":1e999,"y2":4}']
)
def test_infinite_numbers_are_refused(tmp_path, answer):
    with pytest.raises(UserError):
        one(tmp_path, answer)


def test_the_limit_of_resized_images_is_a_setting(tmp_path: Path):
    """ms-swift with MAX_PIXELS=1003520: images of 1600 x 1400 become 1064 x 924 (multiples of 28)."""
    corners = [(100 + 10 * i, 80 + 10 * i, 500 + 90 * i, 400 + 80 * i) for i in range(6)]
    for i in range(6):
        Image.new("L", (1600, 1400), i).save(tmp_path / f"{i}.png")
    records = [
        talk(answer=json.dumps([{"bbox_2d": box, "label": "liver"}]), image=f"{i}.png") for i, box in enumerate(corners)
    ]

    def first_box(**options: Any) -> tuple[tuple[int, ...], list[str]]:
        data = read(tmp_path, *records, box_format="qwen2.5-vl", **options)
        reasons = [finding.reason for finding in data.findings if "box_max_pixels" in finding.reason]
        return min(found.box for row in data.samples for found in find_boxes(row.turns[0][1]) if found.box), reasons

    box, reasons = first_box(box_max_pixels=1_003_520)
    expected = (100 / 1064, 80 / 924, 500 / 1064, 400 / 924)
    assert box == pytest.approx([1000 * side for side in expected], abs=1)
    assert reasons == []
    _, (reason,) = first_box()
    assert "had been resized to fewer pixels; name the limit with data.box_max_pixels" in reason


def test_a_limit_without_resized_images_is_refused(tmp_path: Path):
    record = talk(answer=BOX, image=image(tmp_path, "a.png"))
    with pytest.raises(UserError, match="box_max_pixels=1000000 applies to boxes in pixels of resized images"):
        read(tmp_path, record, box_max_pixels=1_000_000)

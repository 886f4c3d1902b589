"""Files of answered dialogues, of any system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.data.grounding.box_formats import BOX_FORMATS, write_box
from preceptor.data.grounding.box_formats import write as write_boxes
from preceptor.errors import UserError
from preceptor.grounding import metrics as dialogues
from preceptor.grounding import score as rescore_dialogues
from preceptor.grounding.metrics import score_rows
from preceptor.grounding.score import knows, score_file

A, B, C = (0, 0, 100, 100), (500, 500, 700, 700), (0, 0, 100, 51)


def row(id: str, task: str, target: str, prediction: str, modality: str = "ct", **more) -> dict:
    return {"id": id, "task": task, "modality": modality, "target": target, "prediction": prediction} | more


# C overlaps A by 0.51, and one box of C's kind is not two: so of four true boxes birdeval finds three, strict two.
ROWS = [
    row("1", "vg", write_box(A) + write_box(A), write_box(C)),
    row("2", "vg", write_box(A) + write_box(B), write_box(A), "mr", turn=1, question="Where?"),
    row("2", "roc", "left lung", "the Left lung, I think", "mr", turn=2),
    row("3", "roc", "liver", "spleen"),
    row("4", "rc", "a round liver", "a round spleen"),
    row("5", "mia", "yes it is", "no"),
]


@pytest.fixture
def without_java(monkeypatch):
    def missing() -> None:
        raise UserError("caption scores need Java")

    monkeypatch.setattr(dialogues, "require_captions", missing)


def write(folder: Path, rows: list[dict] | str) -> Path:
    path = folder / "said.jsonl"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_four_tasks_by_hand(tmp_path, without_java):
    path = write(tmp_path, ROWS)
    scored = score_file(path, "mine/given/birdeval")
    bird, rows = scored.scores, scored.rows
    assert bird["n"] == 6
    assert bird["tasks"]["vg"]["recall"] == pytest.approx(3 / 4)
    assert bird["mean"]["vg"]["recall"] == pytest.approx((2 / 2 + 1 / 2) / 2)
    assert bird["tasks"]["roc"] == {"accuracy": 1 / 2, "n": 2}
    assert bird["modalities"]["mr"]["roc"]["accuracy"] == 1
    assert bird["tasks"]["rc"]["f1"] == pytest.approx(2 / 3)  # 2 of 3 words
    assert bird["tasks"]["mia"]["f1"] == 0
    assert [row["score"] for row in rows] == [1, 0.5, 1, 0, pytest.approx(2 / 3), 0]
    strict = score_file(path, "mine/given/strict").scores
    assert strict["tasks"]["vg"]["recall"] == pytest.approx(2 / 4)
    assert strict["tasks"]["vg"]["precision"] == pytest.approx(2 / 2)
    assert strict["tasks"]["roc"]["accuracy"] == 0
    assert strict["modalities"]["ct"]["roc"] == {"accuracy": 0, "n": 1}


def test_the_verb(tmp_path, without_java):
    path, out = write(tmp_path, ROWS), tmp_path / "scored.jsonl"
    said = CliRunner().invoke(app, ["score", str(path), "--protocol", "mine/given/strict", "--output", str(out)])
    assert said.exit_code == 0, said.output
    for part in ("mine/given/strict", "recall", "50.0 %", "caption scores need Java", "of the file itself"):
        assert part in said.output, part
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["score"] for line in lines][:2] == [0.5, 0.5]
    assert lines[0]["turn"] == 1
    arguments = ["score", str(path), "--protocol", "strict", "--json"]
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert document["protocols"]["strict"] == score_rows([{"turn": 1} | row for row in ROWS], "strict")


def test_which_protocols_are_of_dialogues():
    assert all(map(knows, ("med-grit/given/birdeval", "a/b/strict", "strict")))
    assert not any(map(knows, ("vqa-med-2019/strict", "vqa-rad/clean/451", "mine/given")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"said\.jsonl contains no answers; every line is \{\"id\""),
        ("\n{broken\n", r"said\.jsonl:2: invalid JSON"),
        ('\n{"id": 1, "id": 2}\n', r"said\.jsonl:2: invalid JSON .*every line is"),
        ("[1]\n", r":1: no id, task, modality, target, prediction"),
        (json.dumps({"id": 1, "task": "vg", "target": "", "prediction": ""}), ":1: no modality; every line"),
        (json.dumps(row("1", "vgg", "", "")), r":1: task 'vgg' is not known \(did you mean 'vg'|:1: task 'vgg'"),
        (json.dumps(row("1", "vg", "", None)), ":1: prediction is 'None'; write a text"),
        (json.dumps(row("1", "vg", "", "x" * 100_001)), ":1: prediction has 100,001 characters"),
        (json.dumps(row("1", "vg", "", "", turn=0)), ":1: turn is 0"),
        (json.dumps(row([1], "vg", "", "")), r":1: id is \[1\]"),
        ("\n".join(json.dumps(row("1", "mia", "", "")) for _ in range(2)), ":2: id '1', turn 1 is also in line 1"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        score_file(write(tmp_path, text), "mine/given/strict")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no\.jsonl cannot be read \(No such file"):
        score_file(tmp_path / "no.jsonl", "strict")
    (tmp_path / "said.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="byte 8 is not UTF-8"):
        score_file(tmp_path / "said.jsonl", "strict")
    monkeypatch.setattr(rescore_dialogues, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="has 11 bytes, more than 10"):
        score_file(tmp_path / "said.jsonl", "strict")


def test_options_of_questions_are_refused(tmp_path):
    arguments = ["score", str(write(tmp_path, ROWS)), "--protocol", "mine/given/strict", "--metric", "bleu"]
    with pytest.raises(UserError, match="--metric does not apply to protocol mine/given/strict"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


BOXES = [(100, 200, 400, 380), (500, 50, 930, 660), (20, 30, 800, 240), (310, 620, 520, 990)]


def in_format(name: str, size: tuple[int, int] | None = None) -> list[dict]:
    more = {"width": size[0], "height": size[1]} if size else {}
    seen = BOX_FORMATS[name].size_seen(size) if size else None
    return [
        row(str(i), "vg", write_box(box), f"Here: {write_boxes([box], 'liver', name, seen)}", **more)
        for i, box in enumerate(BOXES)
    ]


@pytest.mark.parametrize("name", ["gemma", "paligemma", "florence", "xyxy-unit", "qwen3-vl", "xyxy-thousandths"])
def test_answers_of_other_families_are_read(tmp_path, without_java, name):
    scored = score_file(write(tmp_path, in_format(name)), "mine/given/strict")
    assert scored.scores["tasks"]["vg"]["recall"] == 1
    assert f"4 boxes of the answers were read in the format {name}" in scored.notes[1]
    assert scored.rows[0]["prediction"] == in_format(name)[0]["prediction"], "as the file has it"


def test_pixels_need_the_size_of_the_image(tmp_path, without_java):
    for name in ("xyxy-pixels", "qwen2.5-vl"):
        path = write(tmp_path, in_format(name, (300, 260)))
        scored = score_file(path, "mine/given/strict", box_format=name)
        assert scored.scores["tasks"]["vg"]["recall"] == 1
        assert score_file(path, "mine/given/strict").scores == scored.scores, "it agrees best with the references"
        assert f"in the format {name}, which agrees best with the references" in score_file(path, "a/b/strict").notes[1]
    with pytest.raises(UserError, match=r"id 0: boxes in pixels \(xyxy-pixels\) need the width and height"):
        score_file(write(tmp_path, in_format("gemma")[:1]), "mine/given/strict", box_format="xyxy-pixels")


def resized(name: str, size: tuple[int, int], seen: tuple[int, int]) -> list[dict]:
    more = {"width": size[0], "height": size[1]}
    return [
        row(str(i), "vg", write_box(box), write_boxes([box], "a", name, seen), **more) for i, box in enumerate(BOXES)
    ]


def test_the_limit_of_resized_images_is_asked_for(tmp_path, without_java):
    path = write(tmp_path, resized("qwen2.5-vl", (1600, 1400), (1064, 924)))
    chosen = {"box_format": "qwen2.5-vl"}
    for more in ({}, chosen):
        with pytest.raises(
            UserError, match=r"divided by 0\.66.* and read as pixels.*--box-format qwen2.5-vl and .*--max-p"
        ):
            score_file(path, "a/b/strict", **more)
    assert score_file(path, "a/b/strict", **chosen, max_pixels=1_003_520).scores["tasks"]["vg"]["recall"] == 1
    command = ["score", str(path), "--protocol", "a/b/strict", "--box-format", "qwen2.5-vl", "--max-pixels", "1003520"]
    assert "100.0 %" in CliRunner().invoke(app, command).output
    named = score_file(path, "a/b/strict", box_format="xyxy-pixels")
    assert named.scores["tasks"]["vg"]["recall"] < 1
    assert "as xyxy-pixels, but" in named.notes[2], "a named format is believed, with a note"
    for wrong in ({}, {"box_format": "xyxy-pixels"}):
        with pytest.raises(
            UserError, match=r"--max-pixels is the limit of resized images; give --box-format qwen2\.5-vl"
        ):
            score_file(path, "a/b/strict", **wrong, max_pixels=1_003_520)


def test_marked_boxes_in_pixels_are_no_silent_thousandths(tmp_path, without_java):
    rows = resized("qwen2-vl", (512, 512), (512, 512))
    for one, box in zip(rows, BOXES, strict=True):
        one["prediction"] = write_box([round(value * 0.512) for value in box])
    with pytest.raises(UserError, match=r"as qwen2-vl, but 0\.9\d if all numbers are divided by 0\.51.*--box-format"):
        score_file(write(tmp_path, rows), "a/b/strict")
    poor = [row(str(i), "vg", write_box(box), write_box(BOXES[i - 1])) for i, box in enumerate(BOXES)]
    assert score_file(write(tmp_path, poor), "a/b/strict").scores["tasks"]["vg"]["recall"] == 0


def test_an_outlier_does_not_decide_the_format(tmp_path, without_java):
    size = (512, 512)
    boxes = [(10 + 15 * i, 20 + 11 * i, 400 + 15 * i, 500 + 11 * i) for i in range(40)]
    rows = [
        row(str(i), "vg", write_box(box), write_boxes([box], "a", "xyxy-pixels", size), width=512, height=512)
        for i, box in enumerate(boxes)
    ]
    rows[5]["prediction"] = "[50, 40, 700, 300]"
    for one in rows:
        one["prediction"] = json.dumps([{"bbox_2d": json.loads(one["prediction"].removeprefix("a "))}])
    scored = score_file(write(tmp_path, rows), "a/b/strict")
    assert scored.scores["tasks"]["vg"]["recall"] == 39 / 40
    assert "in the format xyxy-pixels, which agrees best with the references" in scored.notes[1]


def test_a_json_list_is_read(tmp_path, without_java):
    expected = score_file(write(tmp_path, ROWS), "mine/given/strict").scores
    path = write(tmp_path, json.dumps(ROWS, indent=1))
    assert score_file(path, "mine/given/strict").scores == expected
    with pytest.raises(UserError, match=r"said\.jsonl, record 7: id '1', turn 1 is also in record 1; keep one"):
        score_file(write(tmp_path, json.dumps([*ROWS, ROWS[0]])), "mine/given/strict")


def test_unclear_formats_are_asked_for(tmp_path, without_java):
    rows = [row(str(i), "vg", write_box(box), "[1, 2, 3, 4]") for i, box in enumerate(BOXES)]
    with pytest.raises(UserError, match=r"values up to 4 fit .*; name it with --box-format, one of xyxy-thousandths"):
        score_file(write(tmp_path, rows), "mine/given/strict")
    assert score_file(write(tmp_path, rows), "mine/given/strict", box_format="xyxy-unit").scores["n"] == 4
    with pytest.raises(UserError, match="'gema' is not known; did you mean 'gemma'"):
        score_file(write(tmp_path, rows), "mine/given/strict", box_format="gema")
    targets = [row("1", "vg", '{"box_2d": [1, 2, 3, 4]}', write_box(A))]
    with pytest.raises(UserError, match=r"the boxes of the targets are not .* in thousandths \(gemma\)"):
        score_file(write(tmp_path, targets), "mine/given/strict")


def test_boxes_that_are_cut_off_are_counted(tmp_path, without_java):
    rows = [*ROWS, row("7", "vg", write_box(A), "<|box_start|>(1,2),(3")]
    scored = score_file(write(tmp_path, rows), "mine/given/strict")
    assert "1 boxes of the answers cannot be read, such as boxes that are cut off." in scored.notes


def test_the_command_line_names_the_format(tmp_path, without_java):
    path = write(tmp_path, in_format("gemma"))
    command = ["score", str(path), "--protocol", "mine/given/strict", "--box-format", "gemma", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "as --box-format says" in result.output

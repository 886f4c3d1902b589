"""`preceptor teach` with a teacher that misbehaves: every unusable answer is counted under its reason, boxes are read
in the teacher's format, and a teacher of no use stops the run."""

# ruff: noqa: RUF001 - punctuation of other languages

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.data.grounding.box_formats import BOX_FORMATS, find_boxes, write, write_box
from preceptor.data.grounding.boxes import iou
from preceptor.data.grounding.slake import read_slake_grounding
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.label_page import PAGE
from preceptor.grounding.pseudo_labels import PseudoLabels
from preceptor.grounding.sources import read_dialogues
from preceptor.teachers.label_store import read_boxes, read_labels
from tests.grounding.answering_server import question_of, server_options, serving
from tests.grounding.asked_data import image

INJECTED = {
    "refusal": (
        "I'm sorry, but I cannot provide medical advice.",
        "抱歉，我无法回答。",
        "As an AI model, I must decline.",
    ),
    "reasoning": ("<think>Let me look at the image</think>A mass", "<think>The image shows a"),
    "error text": ('{"error": {"message": "overloaded"}}',),
    "empty": ("", " "),
    "special tokens": ("<|im_start|>assistant a mass",),
    "repeated text": ("a mass a mass a mass a mass a mass a mass", "no. no. no. no. no. no. no."),
    "wrong language": ("肺部有一个肿块", "Опухоль лёгкого"),
}
INJECTED_BOXES = {
    "no box": ("in the upper left", "There is none."),
    "box outside the image": ("<|box_start|>(100,100),(1480,900)<|box_end|>",),
    "unreadable box": ("<|box_start|>(1,2),(3<|box_end|>", "<|box_start|>(300,300),(100,100)<|box_end|>"),
}


def reply(text: str, ended: bool = True) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop" if ended else "length", "message": {"content": text}}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def teach(*arguments: object):
    return CliRunner().invoke(app, ["teach", *map(str, arguments)])


def write_file(folder: Path, questions: list[tuple[str, str]], side: int = 20) -> Path:
    """Write dialogues about one image each; a question without an answer is unlabelled."""
    file = folder / "own.jsonl"
    with file.open("w") as lines:
        for i, (question, answer) in enumerate(questions):
            turns = [{"from": "human", "value": question}]
            turns += [{"from": "gpt", "value": answer}] if answer else []
            name = image(folder / "pictures", i, side).name
            row = {"id": f"miller-{i}", "image": f"pictures/{name}", "group": f"g{i}", "conversations": turns}
            row |= {"split": "train"} if answer else {}
            lines.write(json.dumps(row) + "\n")
    return file


def test_every_injected_fault_is_counted_under_its_reason(tmp_path):
    """Good answers, and each fault in each of its forms, in a random order."""
    texts = [(text, reason) for reason, found in INJECTED.items() for text in found]
    box_texts = [(text, reason) for reason, found in INJECTED_BOXES.items() for text in found]
    plain = [*texts, ("A mass is cut", "cut off"), *(("A mass of the lung", None) for _ in range(25))]
    boxed = [*box_texts, *((write_box((100, 100 + i, 300, 400)), None) for i in range(6))]
    answers = {f"Question {i}: what is shown in the image?": row for i, row in enumerate(plain)}
    answers |= {f"Question {i}: where is the mass? Answer with boxes.": row for i, row in enumerate(boxed)}
    questions = list(np.random.default_rng(0).permutation(list(answers)))
    file = write_file(tmp_path, [(question, "") for question in questions])

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        text, reason = answers[question_of(body)]
        return reply(text, ended=reason != "cut off")

    with serving(answer=answer) as asked:
        server = (file, *server_options(asked, tmp_path / "store"))
        done = teach(*server, "--box-format", "qwen2-vl", "--json")
        again = teach(*server, "--json")
        shown = teach(*server)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    expected = Counter(reason for _, reason in answers.values() if reason is not None)
    assert document["unusable"] == dict(expected)
    assert document["usable"] == 31
    assert document["questions"] == document["answered"] == len(answers)
    # Nothing is lost: every answer is in the store as it was written, and the same call counts the same.
    assert sorted(label.written for label in read_labels(tmp_path / "store")) == sorted(
        text.strip() for text, _ in answers.values()
    )
    assert {**json.loads(again.stdout), "before": 0, "answered": 0} == {**document, "answered": 0, "tokens": 0}
    assert f"not usable: {len(INJECTED['refusal'])}: refusal" in shown.stdout
    labels = PseudoLabels.open(tmp_path / "store", read_dialogues(str(file)))
    assert labels.left_out == dict(expected)
    assert len(labels.labelled) == 31
    assert f"31 of {len(answers)} dialogues have answers" in labels.note()
    page = (tmp_path / "store" / PAGE).read_text("utf-8")
    assert page.count("<figure><svg") >= 10
    assert "miller" not in page
    assert "smith" not in page
    assert "not usable: refusal" in page


def test_a_teacher_of_no_use_is_stopped_after_its_first_answers(tmp_path):
    file = write_file(tmp_path, [(f"Question {i}: what is shown?", "") for i in range(60)])
    with serving(answer=lambda body: reply("I'm sorry, I can't help with that.")) as asked:
        server = (file, *server_options(asked, tmp_path / "store"))
        done = teach(*server, "--concurrent", 1)
        assert len(asked.bodies) == 10
        assert isinstance(done.exception, UserError)
        assert str(done.exception) == (
            "0 of 10 answers of the teacher are usable, fewer than --min-usable 0.5 (10 refusal): use a teacher that "
            f"answers medical questions, or another --system-prompt; the answers are kept in {tmp_path / 'store'}"
        )
        assert (tmp_path / "store" / PAGE).is_file()
        assert len(read_labels(tmp_path / "store")) == 10
        assert isinstance(teach(*server).exception, UserError)  # without another question
        assert len(asked.bodies) == 10
        assert teach(*server, "--min-usable", 0).exit_code == 0


def test_answers_that_differ_from_a_second_one_are_not_used(tmp_path):
    file = write_file(tmp_path, [(f"Question {i}: what is shown?", "") for i in range(12)])
    unsure = {f"Question {i}: what is shown?" for i in (1, 5, 7)}

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        other = question_of(body) in unsure and body["temperature"] > 0
        return reply("a fracture" if other else "an enlarged heart")

    with serving(answer=answer) as asked:
        done = teach(
            file,
            *server_options(asked, tmp_path / "store"),
            "--agreement",
            1,
            "--json",
        )
    document = json.loads(done.stdout)
    assert (document["usable"], document["unusable"]) == (9, {"samples disagree": 3})
    assert len(asked.bodies) == 24
    assert all(len(label.candidates) == 2 for label in read_labels(tmp_path / "store"))


def test_one_answer_to_all_questions_is_no_answer(tmp_path):
    file = write_file(tmp_path, [(f"Question {i}: what is shown?", "") for i in range(30)])
    with serving(answer=lambda body: reply("This is a CT of the abdomen.")) as asked:
        done = teach(file, *server_options(asked, tmp_path / "store"))
    assert "same answer to most questions" in str(done.exception)
    assert len(asked.bodies) < 30


# --- boxes ------------------------------------------------------------------------------------------------------------


def sent_image(body: dict[str, Any]) -> Image.Image:
    url = next(part for part in body["messages"][-1]["content"] if part["type"] == "image_url")["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


Truths = dict[tuple[str, str], list[tuple[float, ...]]]


def key_of(picture: Image.Image, question: str) -> tuple[str, str]:
    """A question about an image, whatever its size: by its thumbnail."""
    pixels = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX))
    return str((pixels // 64).tolist()), question


def speaker(format: str, truth_of: Callable[[dict[str, Any]], tuple[str, list[Any]]]) -> Callable[..., dict[str, Any]]:
    """A server that writes the true boxes in a format, for the image that it has received."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        label, boxes = truth_of(body)
        return reply(write(boxes, label, format, BOX_FORMATS[format].size_seen(sent_image(body).size)))

    return answer


def box_file(folder: Path, known: int, unknown: int) -> tuple[Path, dict[str, list[tuple[float, ...]]]]:
    random = np.random.default_rng(1)
    truths = {}
    for i in range(known + unknown):
        x, y = random.integers(0, 500, 2)
        width, height = random.integers(100, 500, 2)
        truths[f"Where is structure {i}? Answer with boxes."] = [(x, y, x + width, y + height)]
    rows = [(q, write_box(boxes[0]) if i < known else "") for i, (q, boxes) in enumerate(truths.items())]
    return write_file(folder, rows, side=200), truths


@pytest.mark.parametrize(
    "format",
    [
        *("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "gemma", "xyxy-unit", "xyxy-pixels", "internvl", "xyxy-percent"),
        *("yxyx-unit", "yxyx-pixels", "xywh-pixels", "xywh-unit", "cxcywh-unit", "polygon-pixels"),
    ],
)
def test_the_format_of_the_teacher_is_measured_and_translated(tmp_path, format):
    file, truths = box_file(tmp_path, 20, 12)
    with serving(answer=speaker(format, lambda body: ("structure", truths[question_of(body)]))) as asked:
        server = (file, *server_options(asked, tmp_path / "store"))
        done = teach(*server, "--split", "unlabelled", "--json")
        assert done.exit_code == 0, done.output
        document = json.loads(done.stdout)
        assert len(asked.bodies) == 16 + 12
        other = teach(*server, "--split", "unlabelled", "--box-format", "florence")
        assert "use the same --box-format, or another folder" in str(other.exception)
    found = document["boxes"]
    same_unit = {"qwen2-vl", "qwen3-vl", "internvl"}
    assert found["format"] == format or {found["format"], format} <= same_unit
    assert found["mean_iou"][found["format"]] > 0.95
    assert (document["usable"], document["unusable"]) == (12, {})
    labels = PseudoLabels.open(tmp_path / "store", read_dialogues(str(file)), split="unlabelled")
    overlaps = [iou(boxes_of(d)[0], truths[d.turns[0][0]][0]) for d in labels.dialogues]
    assert len(overlaps) == 12
    assert min(overlaps) > 0.9
    assert labels.boxes == read_boxes(tmp_path / "store") == found


def as_list(numbers) -> str:
    return f"The box is [{', '.join(f'{number:g}' for number in numbers)}]."


STAND_INS: dict[str, tuple[Callable[[tuple[float, ...]], str], str]] = {
    "fractions with two decimals": (lambda b: as_list([round(v / 1000, 2) for v in b]), "xyxy-unit"),
    "per cent without decimals": (lambda b: as_list([round(v / 10) for v in b]), "xyxy-percent"),
    "per cent with a sign": (lambda b: f"[{', '.join(f'{v / 10:.0f}%' for v in b)}]", ""),
    "y first, thousandths, no key": (lambda b: as_list([b[1], b[0], b[3], b[2]]), "gemma"),
    "position and size": (lambda b: as_list([b[0], b[1], b[2] - b[0], b[3] - b[1]]), "xywh-thousandths"),
    "named position and size": (
        lambda b: json.dumps({"x": b[0] / 1000, "y": b[1] / 1000, "width": (b[2] - b[0]) / 1000,
                              "height": (b[3] - b[1]) / 1000}),
        "xyxy-unit",
    ),
    # The images have 200 x 200 pixels: a server has made them smaller, a little larger, or much larger.
    "pixels of an image of 100": (lambda b: as_list([round(v / 10, 1) for v in b]), "xyxy-percent"),
    "pixels of an image of 160": (lambda b: as_list([round(v * 0.16, 1) for v in b]), ""),
    "pixels of an image of 224": (lambda b: as_list([round(v * 0.224) for v in b]), ""),
    "pixels of an image of 448": (lambda b: as_list([round(v * 0.448) for v in b]), ""),
    "pixels of an image of 1344": (lambda b: as_list([round(v * 1.344) for v in b]), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STAND_INS)
def test_a_teacher_with_another_way_to_write_is_measured_or_refused(tmp_path, name):
    file, truths = box_file(tmp_path, 20, 12)
    truths = {question: [tuple(map(int, box)) for box in boxes] for question, boxes in truths.items()}
    write_one, format = STAND_INS[name]
    with serving(answer=lambda body: reply(write_one(truths[question_of(body)][0]))) as asked:
        done = teach(file, *server_options(asked, tmp_path / "store"), "--split", "unlabelled", "--json")
    if not format:
        assert len(asked.bodies) == 16, "nothing else is asked"
        assert isinstance(done.exception, UserError)
        assert "mean IoU of" in str(done.exception) or "agree with the known ones in no format" in str(done.exception)
        return
    assert done.exit_code == 0, done.output
    boxes = json.loads(done.stdout)["boxes"]
    assert boxes["mean_iou"][format] == boxes["mean_iou"][boxes["format"]] > 0.95
    labels = PseudoLabels.open(tmp_path / "store", read_dialogues(str(file)), split="unlabelled")
    assert min(iou(boxes_of(d)[0], truths[d.turns[0][0]][0]) for d in labels.dialogues) > 0.9


def test_several_boxes_for_one_lower_the_measured_overlap_and_are_not_usable(tmp_path):
    file, truths = box_file(tmp_path, 20, 12)

    def two(body: dict[str, Any]) -> dict[str, Any]:
        x0, y0, x1, y1 = truths[question_of(body)][0]
        return reply(write_box((x0, y0, x1, y1)) + write_box((0, 0, x0 + 1, y0 + 1)))

    with serving(answer=two) as asked:
        options = ("--split", "unlabelled", "--json")
        done = teach(file, *server_options(asked, tmp_path / "a"), *options, "--min-usable", 0)
        strict = teach(file, *server_options(asked, tmp_path / "b"), *options, "--min-iou", 0.6)
    assert "below --min-iou 0.6" in str(strict.exception)
    document = json.loads(done.stdout)
    assert document["boxes"]["mean_iou"]["qwen2-vl"] == pytest.approx(0.5, abs=0.01)
    assert (document["usable"], document["unusable"]) == (0, {"more boxes than asked for": 12})


def test_later_questions_are_asked_twice_with_their_earlier_turns(tmp_path):
    """The second question is asked after the teacher's own answer or, if there is one, that of the data."""
    rows = []
    for i, known in enumerate(("", "a liver of the data")):
        picture = image(tmp_path / "pictures", i, 20).name
        turns = [{"from": "human", "value": f"First question {i}: what is shown?"}]
        turns += [{"from": "gpt", "value": known}] if known else []
        turns += [{"from": "human", "value": f"Second question {i}: is it of normal size?"}]
        rows.append({"id": str(i), "image": f"pictures/{picture}", "group": str(i), "conversations": turns})
    file = tmp_path / "own.json"
    file.write_text(json.dumps(rows))

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if question_of(body).startswith("First"):
            return reply("a liver of the teacher")
        return reply("No, it is enlarged" if body["temperature"] else "Yes")

    with serving(answer=answer) as asked:
        done = teach(file, *server_options(asked, tmp_path / "store"), "--agreement", 1, "--min-usable", 0, "--json")
    assert json.loads(done.stdout)["unusable"] == {"samples disagree": 2}
    seen = {(question_of(body), body["messages"][1]["content"]) for body in asked.bodies if len(body["messages"]) > 1}
    assert seen == {
        ("Second question 0: is it of normal size?", "a liver of the teacher"),
        ("Second question 1: is it of normal size?", "a liver of the data"),
    }
    assert len(asked.bodies) == 8, "each of four questions twice"


def boxes_of(dialogue: Dialogue) -> list[tuple[float, ...]]:
    return [found.box for found in find_boxes(dialogue.turns[0][1]) if found.box is not None]


def test_boxes_in_questions_are_translated(tmp_path):
    known, truths = box_file(tmp_path, 20, 0)
    rows = [json.loads(line) for line in known.read_text().splitlines()]
    turn = {"from": "human", "value": f"What is in the region {write_box((100, 200, 500, 1000))}?"}
    rows[0] |= {"id": "region", "conversations": [turn]}
    del rows[0]["split"]
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if "region" in question_of(body):
            return reply("a mass")
        return speaker("xyxy-pixels", lambda body: ("", truths[question_of(body)]))(body)

    with serving(answer=answer) as asked:
        server = (known, *server_options(asked, tmp_path / "store"))
        assert teach(*server, "--split", "unlabelled", "--min-usable", 0).exit_code == 0
    # 200 x 200 pixels
    assert "What is in the region [20, 40, 100, 200]?" in asked.questions


def test_a_teacher_without_a_sense_of_place_is_refused_before_the_run(tmp_path):
    file, _ = box_file(tmp_path, 20, 12)
    with serving(answer=lambda body: reply(write_box((0, 0, 20, 20)))) as asked:
        server = (file, *server_options(asked, tmp_path / "store"))
        done = teach(*server, "--split", "unlabelled")
    assert len(asked.bodies) == 16
    assert "the teacher's boxes agree with the known ones in no format" in str(done.exception)
    assert "below --min-iou 0.2" in str(done.exception)
    assert "qwen2.5-vl 0.0" in str(done.exception)


def test_without_known_boxes_the_format_must_be_named(tmp_path):
    file, truths = box_file(tmp_path, 2, 12)
    with serving(answer=speaker("gemma", lambda body: ("", truths[question_of(body)]))) as asked:
        server = (file, *server_options(asked, tmp_path / "store"))
        done = teach(*server, "--split", "unlabelled")
        assert isinstance(done.exception, UserError)
        assert "only 2 of the training questions have known boxes" in str(done.exception)
        assert "name it with --box-format, one of qwen2-vl" in str(done.exception)
        assert asked.bodies == []
        assert "'gema' is not known; did you mean 'gemma'" in str(teach(*server, "--box-format", "gema").exception)
        assert teach(*server, "--split", "unlabelled", "--box-format", "gemma").exit_code == 0


@pytest.mark.real_data
@pytest.mark.parametrize(("format", "max_pixels"), [("qwen2.5-vl", None), ("qwen2.5-vl", 300 * 300), ("gemma", None)])
def test_boxes_of_slake_come_back_in_every_format(tmp_path, format, max_pixels):
    root = Path(os.environ["PRECEPTOR_DATA"]) / "slake"
    data = read_slake_grounding(root)
    chosen = [d for d in data.split("train") if d.task == "vg" and len(boxes_of(d)) == 1][::17][:40]
    file = tmp_path / "slake.jsonl"
    with file.open("w") as lines:
        for dialogue in chosen:
            turns = [
                {"from": name, "value": text} for name, text in zip(("human", "gpt"), dialogue.turns[0], strict=True)
            ]
            name = dialogue.images[0].relative_to(root).as_posix()
            row = {"id": dialogue.id, "image": name, "split": "train", "group": dialogue.group, "conversations": turns}
            lines.write(json.dumps(row) + "\n")
    by_key: Truths = {}
    for dialogue in chosen:
        with Image.open(dialogue.images[0]) as picture:
            by_key[key_of(picture, dialogue.turns[0][0])] = boxes_of(dialogue)
    assert len(by_key) == len({d.turns[0][0] + d.images[0].as_posix() for d in chosen})

    def truth_of(body: dict[str, Any]) -> tuple[str, list[Any]]:
        picture, question = sent_image(body), question_of(body)
        thumbnail = np.array(json.loads(key_of(picture, question)[0]))
        same = [key for key in by_key if key[1] == question]
        return "", by_key[min(same, key=lambda key: float(np.abs(np.array(json.loads(key[0])) - thumbnail).sum()))]

    with serving(answer=speaker(format, truth_of)) as asked:
        server = (
            file,
            "--root",
            root,
            *server_options(asked, tmp_path / "store"),
        )
        done = teach(*server, "--json", *(["--max-pixels", max_pixels] if max_pixels else []))
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["boxes"]["format"] == format
    assert document["unusable"] == {}
    labels = PseudoLabels.open(tmp_path / "store", read_dialogues(str(file), root))
    truths = {dialogue.id: boxes_of(dialogue)[0] for dialogue in chosen}
    overlaps = [iou(boxes_of(dialogue)[0], truths[dialogue.id]) for dialogue in labels.dialogues]
    assert len(overlaps) == len(chosen)
    assert np.mean(overlaps) > 0.95

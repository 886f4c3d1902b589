"""A question that is cut to the model's limit is reported by every verb that reads questions."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
from PIL import Image

import preceptor
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.experiment import VqaExperiment
from preceptor.vqa.predict import VqaModel
from tests.command_line import call
from tests.vqa.conftest import make_bundle, make_data

LONG = "The history of the patient is confidential. " * 6


@pytest.fixture
def model(tmp_path):
    return VqaModel(make_bundle(make_data(tmp_path / "images"), 16, 0))


def table(folder, questions):
    folder.mkdir(exist_ok=True)
    rows = []
    for number, split in enumerate(["train"] * 4 + ["validation"] * 2 + ["test"] * 2):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number}.png")
        rows.append([f"{number}.png", questions[number % 2], "yes" if number % 2 else "no", split, str(number)])
    with (folder / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer", "split", "group"], *rows])
    data = {"name": "table", "root": str(folder), "max_question_tokens": 12}
    return VqaRecipe.model_validate({"name": "long", "output": str(folder.parent / "run"), "data": data})


def test_doctor_warns_of_questions_that_become_equal(tmp_path):
    document = VqaExperiment.check(table(tmp_path / "data", [LONG + "Is it left?", LONG + "Is it right?"]))
    (finding,) = document["findings"]
    assert finding["severity"] == "warning"
    assert len(finding["ids"]) == 8
    assert finding["reason"].startswith("8 of 8 questions have more than 12 tokens and are truncated, 8 of them to")


def test_doctor_finds_nothing_if_no_question_is_longer(tmp_path):
    assert VqaExperiment.check(table(tmp_path / "data", ["Is it left?", "Is it right?"]))["findings"] == []


def test_doctor_says_if_the_tokenizer_of_the_teacher_is_not_there(tmp_path):
    recipe = table(tmp_path / "data", ["Is it left?", "Is it right?"])
    recipe.method.teaching.runs = [str(tmp_path / "nowhere")]
    (finding,) = VqaExperiment.check(recipe)["findings"]
    assert finding["severity"] == "warning"
    assert finding["reason"].startswith("the length of the questions was not checked: ")


def test_a_training_notes_the_truncated_questions_once(tmp_path, caplog):
    recipe = table(tmp_path / "data", [LONG + "Is it left?", "Is it right?"])
    recipe.stages = ("baseline",)
    experiment = VqaExperiment.read(recipe)
    (stage,) = experiment.stages()
    with caplog.at_level(logging.WARNING, "preceptor"):
        for _ in range(2):
            next(experiment.trainings(stage, tmp_path / "run"))
    (note,) = [note for note in experiment.data.notes if "tokens" in note]
    assert note.startswith("4 of 8 questions have more than 12 tokens and are truncated; ")
    assert caplog.messages.count(note) == 1


def test_answering_warns_once_per_call_without_the_question(model, tmp_path, caplog):
    image = next((tmp_path / "images").glob("*.png"))
    with caplog.at_level(logging.WARNING, "preceptor"):
        list(model.answer_many([(image, "Where is the disc?")] * 3))
        assert caplog.messages == []
        list(model.answer_many([(image, "Where is the disc?"), (image, LONG), (image, LONG)], batch_size=1))
    (message,) = caplog.messages
    assert "more than 24 tokens" in message
    assert "confidential" not in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "preceptor"):
        model.answer(image, LONG)
    assert caplog.messages == [message]


def test_an_answer_says_that_its_question_was_truncated(model, tmp_path):
    image = next((tmp_path / "images").glob("*.png"))
    short, cut = model.answer_many([(image, "Where is the disc?"), (image, LONG)])
    warning = (
        "The question has more than 24 tokens and is truncated; shorten it, or train the model with a larger "
        "data.max_question_tokens."
    )
    assert (short.warnings, cut.warnings) == ((), (warning,))
    assert (short.to_dict()["warnings"], cut.to_dict()["warnings"]) == ([], [warning])


def test_rows_of_predict_have_the_warnings_and_older_files_are_resumed(model, tmp_path):
    image = next((tmp_path / "images").glob("*.png"))
    model.save_pretrained(tmp_path / "model")
    asked = tmp_path / "images" / "asked.csv"
    rows = [["a", image.name, "Where is it?"], ["b", image.name, LONG]]
    with asked.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "image", "question"], *rows])
    output = tmp_path / "answers.jsonl"
    first, second = preceptor.predict(tmp_path / "model", table=asked, output=output)
    assert first["warnings"] == []
    assert second["warnings"][0].startswith("The question has more than 24 tokens and is truncated; ")
    assert [json.loads(line) for line in output.read_text().splitlines()] == [first, second]
    del first["warnings"]  # as an earlier version wrote it
    output.write_text(json.dumps(first) + "\n")
    assert preceptor.predict(tmp_path / "model", table=asked, output=output) == [first, second]


def test_the_command_line_warns_on_standard_error_alone(model, tmp_path):
    image = next((tmp_path / "images").glob("*.png"))
    model.save_pretrained(tmp_path / "model")
    code, out, err = call("predict", tmp_path / "model", "--image", image, "--question", LONG)
    assert code == 0
    assert "more than 24 tokens" in err
    assert len(out.splitlines()) == 1
    assert "tokens" not in out

"""Every answered question of a test dialogue is asked and scored, with the true earlier turns before it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preceptor.data.grounding.box_formats import write_box
from preceptor.data.grounding.med_grit import INFERRED
from preceptor.data.grounding.sharegpt import read_sharegpt
from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.errors import UserError
from preceptor.grounding import metrics
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.evaluate import prediction_row, scored_turns
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.grounding.figures import write_figures
from preceptor.grounding.metrics import ROW_KEY, score_rows, unit_scores
from preceptor.grounding.report import _row_of
from preceptor.grounding.score import score_file
from preceptor.scores import number_groups
from tests.grounding.asked_data import image

TASKS = ("vg", "roc", "rc", "mia")
BOX = write_box((100, 200, 480, 610))
WHERE, ENLARGED = ("Where is the liver?", BOX), ("Is it enlarged?", "no")


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("caption scores need Java")

    monkeypatch.setattr(metrics, "require_captions", missing)


@dataclass
class Answering:
    """A model that gives the true answer, and records the dialogues that it was asked."""

    asked: list[Dialogue] = field(default_factory=list)

    def generate(self, dialogues: Sequence[Dialogue], **_: Any) -> list[list[Any]]:
        self.asked += dialogues
        return [[SimpleNamespace(text=row.turns[-1][1], confidence=0.5, ended=True)] for row in dialogues]


def dialogue(folder: Path, number: int, *turns: tuple[str, str], **more: Any) -> Dialogue:
    file = image(folder, number)
    task = more.pop("task", "vg")
    return Dialogue(f"d{number}", (file,), turns, task, "ct", f"g{number}", "test", **{"tags": INFERRED, **more})


def evaluate(folder: Path, rows: list[Dialogue], **settings: Any) -> tuple[Answering, dict[str, Any], list[Any]]:
    recipe = GroundingRecipe.model_validate({"name": "t", "output": str(folder / "run"), "data": settings})
    model = Answering()
    found = GroundingExperiment(recipe, GroundingDataset("made", "given", folder, rows)).evaluate(model)  # type: ignore
    return model, found.scores["made/given/strict"], list(found.rows["made/given/strict"])


def test_every_question_is_asked_with_its_true_history_and_scored_by_its_own_task(tmp_path: Path) -> None:
    model, scores, rows = evaluate(tmp_path, [dialogue(tmp_path, n, WHERE, ENLARGED) for n in range(3)])
    assert [row.turns for row in model.asked] == [(WHERE,), (WHERE, ENLARGED)] * 3
    assert [(row["id"], row["turn"], row["task"]) for row in rows[:2]] == [("d0", 1, "vg"), ("d0", 2, "mia")]
    assert {row["group"] for row in rows} == {"1", "2", "3"}
    assert (scores["n"], scores["tasks"]["vg"]["recall"], scores["tasks"]["vg"]["n"]) == (6, 1.0, 3)
    assert scores["tasks"]["mia"]["f1"] == 1.0
    units = unit_scores(rows, "made/given/strict")
    assert len({unit.key for unit in units}) == 6
    assert {unit.group for unit in units} == {"1", "2", "3"}
    assert len({tuple(row[key] for key in ROW_KEY) for row in rows}) == 6


def test_the_file_of_predictions_is_scored_alike(tmp_path: Path) -> None:
    _, scores, rows = evaluate(tmp_path, [dialogue(tmp_path, n, WHERE, ENLARGED) for n in range(3)])
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score_file(file, "made/given/strict").scores["tasks"] == scores["tasks"]


def test_dialogues_with_one_turn_give_the_rows_and_scores_of_the_last_question(tmp_path: Path) -> None:
    tasks = [(WHERE, "vg"), (ENLARGED, "mia"), (("What is in " + BOX, "liver"), "roc"), (WHERE, "rc")]
    dialogues = [dialogue(tmp_path, n, turn, task=task) for n, (turn, task) in enumerate(tasks)]
    assert all(a is b for a, b in zip(scored_turns(dialogues, TASKS), dialogues, strict=True))
    _, scores, rows = evaluate(tmp_path, dialogues)
    groups = number_groups(dialogues)
    expected = [
        {"id": d.id, "group": groups[d.id], **prediction_row(d, d.turns[-1][1]), "confidence": 0.5, "ended": True}
        for d in dialogues
    ]
    assert json.dumps(rows) == json.dumps(expected)
    assert json.dumps(scores) == json.dumps(score_rows(expected, "strict"))


def test_a_task_that_the_file_names_is_that_of_every_turn(tmp_path: Path) -> None:
    image(tmp_path, 0)
    texts = [*WHERE, *ENLARGED]
    talk = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    record = {"image": "smith_0.png", "conversations": talk, "split": "test"}
    for more, tasks in (({}, ["vg", "mia"]), ({"task": "rc"}, ["rc", "rc"])):
        (tmp_path / "d.jsonl").write_text(json.dumps({**record, **more}))
        (row,) = read_sharegpt(tmp_path / "d.jsonl").samples
        assert [turn.task for turn in scored_turns([row], TASKS)] == tasks


def test_questions_of_other_tasks_are_history_only(tmp_path: Path) -> None:
    model, scores, _ = evaluate(tmp_path, [dialogue(tmp_path, 0, ENLARGED, WHERE)], tasks=["vg"])
    assert [row.turns for row in model.asked] == [(ENLARGED, WHERE)]
    assert list(scores["tasks"]) == ["vg"]


def test_a_dialogue_belongs_to_the_tasks_of_all_its_questions(tmp_path: Path) -> None:
    """`task_of` calls the whole dialogue "vg", but its second question is one of "mia"."""
    texts = [*WHERE, *ENLARGED]
    records = []
    for number, split in enumerate(("train", "validation", "test")):
        image(tmp_path, number)
        talk = [{"from": "gpt" if turn % 2 else "human", "value": text} for turn, text in enumerate(texts)]
        records.append(json.dumps({"image": f"smith_{number}.png", "conversations": talk, "split": split}))
    (tmp_path / "d.jsonl").write_text("\n".join(records))
    for tasks in (["vg"], ["mia"], ["vg", "mia"]):
        config = GroundingRecipe.model_validate(
            {"name": "t", "data": {"name": "sharegpt", "root": str(tmp_path / "d.jsonl"), "tasks": tasks}}
        ).data
        data = read_recipe_dialogues(config, tmp_path)
        assert len(data.samples) == 3
        assert [turn.task for turn in scored_turns(data.split("test"), tasks)] == tasks


def test_images_of_later_questions_are_not_shown_yet(tmp_path: Path) -> None:
    files = (image(tmp_path, 0), image(tmp_path, 1))
    turns = (("Is <image> a CT?", "yes"), ("And <image>?", "no"))
    marked = Dialogue("a", files, turns, "mia", "ct", "g", "test", tags=INFERRED)
    assert [row.images for row in scored_turns([marked], TASKS)] == [files[:1], files]
    plain = Dialogue("a", files, (WHERE, ENLARGED), "vg", "ct", "g", "test", tags=INFERRED)
    assert [row.images for row in scored_turns([plain], TASKS)] == [files, files]


def test_questions_about_boxes_without_a_true_box_are_named(tmp_path: Path) -> None:
    _, scores, _ = evaluate(tmp_path, [dialogue(tmp_path, 0, WHERE, ENLARGED, tags={})])
    assert any("1 questions of the task vg have no box in their true answer" in note for note in scores["notes"])
    _, scores, _ = evaluate(tmp_path, [dialogue(tmp_path, 0, WHERE, ENLARGED)])
    assert not any("no box" in note for note in scores["notes"])


def test_unreadable_images_have_an_empty_answer_to_each_question(tmp_path: Path) -> None:
    rows = [dialogue(tmp_path, n, WHERE, ENLARGED) for n in range(2)]
    rows[1].images[0].write_bytes(b"broken")
    model, scores, found = evaluate(tmp_path, rows, broken="skip")
    assert len(model.asked) == 2
    assert [(row["id"], row["turn"], row["prediction"]) for row in found[2:]] == [("d1", 1, ""), ("d1", 2, "")]
    assert scores["tasks"]["vg"] == {"recall": 0.5, "precision": 1.0, "f1": pytest.approx(2 / 3), "n": 2}


def test_the_pictures_of_the_report_are_of_single_questions(tmp_path: Path) -> None:
    rows = [dialogue(tmp_path, 0, WHERE, ENLARGED, WHERE)]
    _, _, answers = evaluate(tmp_path, rows)
    recipe = GroundingRecipe.model_validate({"name": "t"})
    data = GroundingDataset("made", "given", tmp_path, rows)
    write_figures(tmp_path / "stage", data, recipe, {"made/given/strict": answers})
    (file,) = (tmp_path / "stage").rglob("*.json")
    entries = json.loads(file.read_text())["images"]
    assert [entry["turn"] for entry in entries] == [1, 3]
    assert [_row_of(entry, answers) for entry in entries] == [answers[0], answers[2]]
    assert _row_of({"id": "d0"}, [{"id": "d0", "turn": 3}]) == {"id": "d0", "turn": 3}, "a run of an earlier version"

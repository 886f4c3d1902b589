"""Dialogues without answers are for stages that learn from pseudo-labels, and never for the splits with answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.data.grounding.box_formats import write_box
from preceptor.data.grounding.sharegpt import read_sharegpt
from preceptor.errors import UserError
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.grounding.pseudo_labels import ContentHashes, PseudoLabels
from preceptor.grounding.sources import read_dialogues
from preceptor.teachers.label_store import Label, LabelStore, LabelStoreKey
from tests.grounding.asked_data import image

BOX = write_box((100, 200, 480, 610))


def record(folder: Path, number: int, answer: str | None, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"Where is the liver of {number}?"}]
    turns += [{"from": "gpt", "value": answer}] if answer else []
    return {"id": f"d{number}", "image": image(folder, number).name, "conversations": turns, **more}


def write(folder: Path, records: list[dict[str, Any]], name: str = "mine.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder / name


def mixed(folder: Path) -> list[dict[str, Any]]:
    """Return 20 answered records, and 10 unanswered ones about other images."""
    return [record(folder, number, None if number % 3 == 1 else BOX) for number in range(30)]


def recipe(file: Path, stages: tuple[str, ...] = ("teacher", "distilled"), **data: Any) -> GroundingRecipe:
    section = {"name": "sharegpt", "root": str(file), **data}
    return GroundingRecipe.model_validate({"name": "t", "stages": stages, "data": section, "output": str(file.parent)})


def splits(rows: Any) -> dict[str, str]:
    return {row.id: row.split for row in rows}


def test_unanswered_dialogues_are_unlabelled_and_change_no_other_split(tmp_path: Path) -> None:
    records = mixed(tmp_path)
    data = GroundingExperiment.read_data(recipe(write(tmp_path, records)))
    answered = [one for one in records if len(one["conversations"]) == 2]
    alone = GroundingExperiment.read_data(recipe(write(tmp_path, answered, "answered.jsonl")))
    assert {row.id for row in data.split("unlabelled")} == {one["id"] for one in records if one not in answered}
    assert splits(row for row in data.samples if row.split != "unlabelled") == splits(alone.samples)
    assert data.fingerprint("test") == alone.fingerprint("test")
    assert any(note.startswith("10 dialogues have unanswered questions (split unlabelled)") for note in data.notes)


def test_an_unanswered_dialogue_joins_no_answered_groups(tmp_path: Path) -> None:
    records = [record(tmp_path, number, BOX) for number in range(12)]
    joint = {**record(tmp_path, 99, None), "image": None, "images": [f"smith_{n}.png" for n in range(12)]}
    with_it = read_sharegpt(write(tmp_path, [*records, joint], "joint.jsonl"), answered=False)
    assert splits(with_it.samples[:-1]) == splits(read_sharegpt(write(tmp_path, records)).samples)
    assert len(set(splits(with_it.samples[:-1]).values())) == 3


@pytest.mark.parametrize("shared", ["image", "patient", "split"])
def test_unanswered_dialogues_about_held_out_images_are_left_out(tmp_path: Path, shared: str) -> None:
    records = [
        record(tmp_path, n, BOX, split=split, patient_id=f"p{n}")
        for n, split in enumerate(("train", "validation", "test"))
    ]
    extra = [record(tmp_path, 10 + n, None, patient_id=f"q{n}") for n in range(3)]
    for n, one in enumerate(extra):
        change = {"image": f"smith_{n}.png"}, {"patient_id": f"p{n}"}, {"split": records[n]["split"]}
        one |= change[("image", "patient", "split").index(shared)]
    file = write(tmp_path, [*records, *extra])
    data = GroundingExperiment.read_data(recipe(file))
    assert [row.id for row in data.split("unlabelled")] == ["d10"]
    assert not data.leaking
    assert any(note.startswith("2 other dialogues with unanswered questions are about") for note in data.notes)
    assert len(read_dialogues(str(file)).split("unlabelled")) == 3, "`teach` can label all of them"


def test_without_pseudo_labels_an_unanswered_question_is_an_error_with_its_fix(tmp_path: Path) -> None:
    file = write(tmp_path, mixed(tmp_path))
    baseline = recipe(file, ("baseline",))
    for read in (GroundingExperiment.read_data, GroundingExperiment.for_check):
        with pytest.raises(UserError, match=r"mine\.jsonl:2: a question has no answer; .*method\.pseudo_labels\.share"):
            read(baseline)
    assert GroundingExperiment.read_data(baseline, needed=("test",)).split("test"), "a stage of a run is evaluated"
    with pytest.raises(UserError, match=r"mine\.jsonl:2: the last question has no answer; write it, or remove"):
        read_sharegpt(file)


def test_labels_of_unanswered_dialogues_are_used(tmp_path: Path) -> None:
    file = write(tmp_path, mixed(tmp_path))
    asked = read_dialogues(str(file)).split("unlabelled")
    keys = [key for row in asked for key in ContentHashes().keys(row)]
    with LabelStore.open(tmp_path / "labels", LabelStoreKey("m", {}), {}) as store:
        store.append([Label(key, 0, BOX, True, 1, 0.9, 0.8, "top_logprobs") for key in keys])
    labels = PseudoLabels.open(tmp_path / "labels", GroundingExperiment.read_data(recipe(file)))
    assert {row.dialogue.id for row in labels.labelled} == {row.id for row in asked}


def test_the_task_of_an_unanswered_question_is_not_known(tmp_path: Path) -> None:
    records = [one | ({"task": "mia"} if one["id"] == "d1" else {}) for one in mixed(tmp_path)]
    data = GroundingExperiment.read_data(recipe(write(tmp_path, records), tasks=["vg"]))
    assert "d1" not in splits(data.split("unlabelled"))
    assert len(data.split("unlabelled")) == 9

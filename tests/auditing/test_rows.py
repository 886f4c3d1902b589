from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.auditing.rows import Match, asked_in_both, frames_of, restated, shared_groups
from preceptor.auditing.shortcuts import TITLES, majority_by_type, shortcuts
from preceptor.data.types import Dataset, Sample, Split


def sample(id: str, split: Split, question: str, answer: str = "yes", image: str = "a", group: str = "") -> Sample:
    return Sample(id, Path(image), question, (answer,), "open", group or id, split, tags={})


def ids(matches: list[Match]) -> list[tuple[str, str]]:
    return [(held_out.id, learnt.id) for held_out, learnt in matches]


def by_image(row: Sample) -> Path:
    return row.image


TRAIN = [
    sample("1", "train", "Is the heart large?", group="p1"),
    sample("7-frame", "train", "Is/Are there air?"),
    sample("3", "train", "Which organ is shown here?", "lung", image="b"),
]


def test_groups() -> None:
    test = [sample("t", "test", "q", group="p1"), sample("u", "test", "q", group="p2")]
    assert ids(shared_groups(TRAIN, test)) == [("t", "1")]


def test_frames_are_those_of_the_row_itself() -> None:
    assert ids(frames_of(TRAIN, [sample("7", "test", "Free air?"), sample("1", "test", "q")])) == [("7", "7-frame")]


def test_a_question_is_the_same_but_for_case_and_punctuation_and_only_of_the_same_image() -> None:
    test = [sample("t", "test", "is the HEART large"), sample("u", "test", "Is the heart large?", image="b")]
    assert ids(asked_in_both(TRAIN, test, by_image)) == [("t", "1")]


def test_restated_needs_image_answer_and_half_of_the_words() -> None:
    test = [
        sample("t", "test", "Is the heart too large?"),  # 4 of 5 words
        sample("u", "test", "Is the heart too large?", "no"),
        sample("v", "test", "Is the heart too large?", image="b"),
        sample("w", "test", "Cardiomegaly?"),
        sample("x", "test", "Is the heart large in this old man?"),  # 4 of 8 words
        sample("y", "test", "Is the heart large in this very old man?"),  # 4 of 9 words
    ]
    assert ids(restated(TRAIN, test, by_image)) == [("t", "1"), ("x", "1")]


def made() -> Dataset[Sample]:
    colours = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
    rows = [
        sample(f"{thing}-{n}", "train", f"colour of {thing} number {n}?", colour)
        for thing, colour in colours.items()
        for n in range(6)
    ]
    rows += [sample(f"test-{thing}", "test", f"tell the colour: {thing}", colour) for thing, colour in colours.items()]
    return Dataset("made", "", Path(), rows)


def test_shortcuts_of_questions_that_tell_the_answer() -> None:
    pytest.importorskip("sklearn")
    found = {shortcut.name: shortcut for shortcut in shortcuts(made())}
    assert list(found) == list(TITLES)
    assert found["majority"].accuracy == 0.25
    assert found["majority_by_type"].accuracy == 0.25
    assert found["text_model"].accuracy == 1.0
    assert found["text_model"].closed is None
    assert found["text_model"].open == 1.0


def test_majority_by_type_knows_the_type() -> None:
    rows = []
    for part in ("train", "test"):
        for kind, answer in (("ORGAN", "lung"), ("PLANE", "axial"), ("PLANE", "axial")):
            name = f"{part}{len(rows)}"
            rows.append(Sample(name, Path("a"), f"q {name}", (answer,), "open", "", part, kind))
    found = {shortcut.name: shortcut for shortcut in shortcuts(Dataset("made", "", Path(), rows))}
    assert found["majority"].accuracy == pytest.approx(2 / 3)
    assert found["majority_by_type"].accuracy == 1.0


def test_a_question_type_that_training_lacks_falls_back_to_the_answer_type() -> None:
    def row(id: str, split: Split, answer: str, type: str) -> Sample:
        kind = "closed" if answer in ("yes", "no") else "open"
        return Sample(id, Path("a"), "q", (answer,), kind, "", split, type)

    train = [row(f"yes{i}", "train", "yes", "PRESENCE") for i in range(3)]
    train += [row(f"lung{i}", "train", "lung", "ORGAN") for i in range(2)]
    (found,) = majority_by_type(train, [row("t", "test", "axial", "PLANE")], "mevf")
    assert (found.answer, found.probability) == ("lung", 1.0)


def test_without_a_part_there_is_no_shortcut() -> None:
    data = made()
    data.samples = data.split("train")
    assert shortcuts(data) == []

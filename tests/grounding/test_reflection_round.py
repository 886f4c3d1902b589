from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.data.grounding.box_formats import write_box
from preceptor.data.types import Dialogue
from preceptor.grounding.evaluate import scored_turns
from preceptor.grounding.reflection import CorrectionBuffer
from preceptor.grounding.reflection_round import AGAIN, Reflector, correction_dialogue
from preceptor.grounding.selection import word_overlap
from preceptor.grounding.settings import ReflectionConfig

RIGHT, WRONG = write_box((100, 100, 300, 300)), write_box((600, 600, 900, 900))


def row(number: int, truth: str) -> Dialogue:
    return Dialogue(f"d{number}", (Path(f"{number}.png"),), ((f"question {number}?", truth),), "vg", "ct", "g", "train")


ROWS = [row(0, RIGHT), row(1, RIGHT), row(2, "the liver"), row(3, "no lesion is seen")]


def reflector(answers: dict[str, str], sampled: list[str], asked: list | None = None, **settings) -> Reflector:
    def student(rows, candidates, temperature, seed):
        assert (candidates, temperature) == (1, 0.0)
        return [[answers[r.id]] for r in rows]

    def corrector(rows, candidates, temperature, seed):
        if asked is not None:
            asked.append((rows, candidates, temperature, seed))
        return [sampled for _ in rows]

    config = ReflectionConfig(rows=4, candidates=2, **settings)
    return Reflector(student, corrector, ROWS, config, word_overlap, seed=3)


ANSWERS = {"d0": RIGHT, "d1": WRONG, "d2": "the spleen of a dog", "d3": "no lesion is seen"}
NEAR = write_box((100, 100, 300, 250))  # IoU 0.75 with the truth


def test_a_known_truth_is_never_replaced_by_a_worse_sample():
    """Neither a box that is near enough nor a text that is similar enough; no sample is drawn by default."""
    asked: list = []
    for settings in ({}, {"samples": "free_text"}):
        buffer = CorrectionBuffer(10)
        reflector(ANSWERS, [NEAR, "the liver's", "a liver", "spleen"], asked, **settings).round(0, buffer)
        assert {c.id: (c.reason, c.corrected) for c in buffer.corrections} == {
            "d1": ("wrong box", RIGHT),
            "d2": ("unlike", "the liver"),
        }
        entry = buffer.rounds[0]
        assert (entry["asked"], entry["failed"], entry["corrected"]) == (4, 2, 2)
        assert (entry["by_sample"], entry["unusable_samples"], entry["size"]) == (0, 0, 2)
    assert len(asked) == 1


def test_samples_are_for_free_texts_and_contain_the_truth():
    asked: list = []
    buffer = CorrectionBuffer(10)
    named = replace(ROWS[2], id="d4", task="roc")
    rows = reflector(ANSWERS | {"d4": "?"}, ["it is the liver", RIGHT], asked, samples="free_text")
    rows.rows = [*ROWS, named]
    rows.config = rows.config.model_copy(update={"rows": 5})
    rows.round(0, buffer)
    found = {c.id: c.corrected for c in buffer.corrections}
    assert found == {"d1": RIGHT, "d2": "it is the liver", "d4": "the liver"}
    assert buffer.rounds[0]["by_sample"] == 1
    ((prompts, candidates, temperature, _),) = asked
    assert (candidates, temperature) == (2, 0.7)
    (prompt,) = prompts
    assert prompt.id == "d2"
    assert ANSWERS["d2"] in prompt.turns[-1][0]
    assert "the liver" in prompt.turns[-1][0]
    assert prompt.turns[-1][1] == ""


def test_each_question_of_a_dialogue_is_asked_and_corrected():
    """The earlier turns are its history, with their true answers. The same question may be asked in two dialogues."""
    turns = (("question 1?", "the liver"), ("question 2?", "no lesion is seen"))
    dialogue = Dialogue("d9", (Path("9.png"),), turns, "mia", "ct", "g", "train", tags={"task": "inferred"})
    asked: list[Dialogue] = []
    buffer = CorrectionBuffer(10)
    reflects = reflector({}, ["it is the liver"], samples="free_text")
    reflects.rows = scored_turns([dialogue, ROWS[2]], ["mia", "vg"])
    reflects.student = lambda rows, *_: asked.extend(rows) or [["?"] for _ in rows]
    reflects.round(0, buffer)
    assert {(row.id, row.turns) for row in asked} == {
        ("d9", turns[:1]), ("d9", turns), ("d2", (("question 2?", "the liver"),))
    }  # fmt: skip
    assert {(c.id, c.question): c.corrected for c in buffer.corrections} == {
        ("d9", "question 1?"): "it is the liver",
        ("d9", "question 2?"): "no lesion is seen",
        ("d2", "question 2?"): "it is the liver",
    }


def test_if_no_sample_contains_the_truth_the_truth_is_learnt():
    buffer = CorrectionBuffer(10)
    reflector({r.id: "" for r in ROWS}, ["nonsense", ""], samples="free_text").round(0, buffer)
    assert {c.id: c.corrected for c in buffer.corrections} == {r.id: r.turns[0][1] for r in ROWS}
    assert buffer.rounds[0]["by_sample"] == 0
    assert buffer.rounds[0]["reasons"] == {"no box": 2, "unlike": 2}


def test_samples_that_are_no_answers_are_no_corrections():
    buffer = CorrectionBuffer(10)
    samples = ["I'm sorry, but I can't assist. It is the liver", "<think>the liver</think> the liver"]
    reflector(ANSWERS | {"d1": RIGHT}, samples, samples="free_text").round(0, buffer)
    (correction,) = buffer.corrections
    assert correction.corrected == "the liver"
    assert (buffer.rounds[0]["by_sample"], buffer.rounds[0]["unusable_samples"]) == (0, 2)


def test_what_is_right_now_is_forgotten():
    buffer = CorrectionBuffer(10)
    reflector({r.id: "" for r in ROWS}, [""]).round(0, buffer)
    reflector({r.id: r.turns[0][1] for r in ROWS}, [""]).round(1, buffer)
    assert len(buffer) == 0
    assert [entry["failure_rate"] for entry in buffer.rounds] == [1.0, 0.0]


def test_the_same_round_is_the_same_again():
    states = []
    for _ in range(2):
        buffer = CorrectionBuffer(3)
        for number in range(3):
            reflector({r.id: "" for r in ROWS}, [RIGHT]).round(number, buffer)
        states.append(buffer.state())
    assert states[0] == states[1]
    assert CorrectionBuffer.restore(states[0]).state() == states[0]


@pytest.mark.parametrize("form", ["two_turns", "plain"])
def test_lessons(form):
    buffer = CorrectionBuffer(4)
    reflector({r.id: WRONG for r in ROWS}, ["nothing"]).round(0, buffer)
    correction = next(c for c in buffer.corrections if c.id == "d1")
    taught = correction_dialogue(ROWS[1], correction, form)
    assert taught.turns[-1][1] == RIGHT
    assert taught.turns[0][0] == "question 1?"
    assert taught.turns == (
        (("question 1?", WRONG), (AGAIN, RIGHT)) if form == "two_turns" else (("question 1?", RIGHT),)
    )
    silent = replace(correction, wrong=" ")
    assert correction_dialogue(ROWS[1], silent, form).turns == (("question 1?", RIGHT),)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.data.grounding.box_formats import write_box
from preceptor.data.types import Dialogue
from preceptor.grounding.reflection import CorrectionBuffer
from preceptor.grounding.reflection_round import AGAIN, Reflector, correction_dialogue
from preceptor.grounding.selection import word_overlap
from preceptor.grounding.settings import ReflectionConfig

RIGHT, WRONG = write_box((100, 100, 300, 300)), write_box((600, 600, 900, 900))


def row(number: int, truth: str) -> Dialogue:
    return Dialogue(f"d{number}", (Path(f"{number}.png"),), ((f"question {number}?", truth),), "vg", "ct", "g", "train")


ROWS = [row(0, RIGHT), row(1, RIGHT), row(2, "the liver"), row(3, "no lesion is seen")]


def reflector(answers: dict[str, str], samples: list[str], asked: list | None = None, **settings) -> Reflector:
    def student(rows, candidates, temperature, seed):
        assert (candidates, temperature) == (1, 0.0)
        return [[answers[r.id]] for r in rows]

    def corrector(rows, candidates, temperature, seed):
        if asked is not None:
            asked.append((rows, candidates, temperature, seed))
        return [samples for _ in rows]

    config = ReflectionConfig(rows=4, candidates=2, **settings)
    return Reflector(student, corrector, ROWS, config, word_overlap, seed=3)


def test_a_round_finds_what_is_wrong_and_why():
    asked: list = []
    answers = {"d0": RIGHT, "d1": WRONG, "d2": "the spleen of a dog", "d3": "no lesion is seen"}
    buffer = CorrectionBuffer(10)
    reflector(answers, ["it is the liver", RIGHT], asked).round(0, buffer)
    found = {c.id: c for c in buffer.corrections}
    assert {id: c.reason for id, c in found.items()} == {"d1": "wrong box", "d2": "unlike"}
    assert found["d1"].corrected == RIGHT
    assert found["d2"].corrected == "it is the liver"  # the sample that is most like the truth
    entry = buffer.rounds[0]
    assert (entry["asked"], entry["failed"], entry["corrected"], entry["by_sample"], entry["size"]) == (4, 2, 2, 2, 2)
    ((rows, candidates, temperature, _),) = asked
    assert (candidates, temperature) == (2, 0.7)
    shown = next(r for r in rows if r.id == "d1").turns[-1]
    assert WRONG in shown[0]
    assert RIGHT in shown[0]
    assert shown[1] == ""


def test_where_no_sample_is_right_the_truth_is_learnt():
    buffer = CorrectionBuffer(10)
    reflector({r.id: "" for r in ROWS}, ["nonsense", ""]).round(0, buffer)
    assert {c.id: c.corrected for c in buffer.corrections} == {r.id: r.turns[0][1] for r in ROWS}
    assert buffer.rounds[0]["by_sample"] == 0
    assert buffer.rounds[0]["reasons"] == {"no box": 2, "unlike": 2}


def test_samples_that_are_no_answers_are_no_corrections():
    buffer = CorrectionBuffer(10)
    samples = [f"I'm sorry, but I can't assist. It is {RIGHT}", f"<think>the liver</think> {RIGHT}"]
    reflector({r.id: "" if r.id == "d0" else r.turns[0][1] for r in ROWS}, samples).round(0, buffer)
    (correction,) = buffer.corrections
    assert correction.corrected == RIGHT
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

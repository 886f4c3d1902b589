"""Answers of a teacher: any text gives reasons or a label whose boxes are readable and within the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import BOX_FORMATS, find_boxes, to_canonical, without_boxes
from preceptor.data.grounding.boxes import validate_box
from preceptor.grounding.answer_checks import asks_for_box, first, same_answers, unusable
from tests.fuzz.dialogues import BOX, WORD_TEXTS, written
from tests.fuzz.dialogues import BOX_FORMATS as WRITTEN
from tests.fuzz.mutate import MUTATIONS, Mutation, mostly, mutate, texts
from tests.fuzz.outcome import attempt, require
from tests.fuzz.target import Target

PIECES = st.sampled_from(
    [
        "<think>", "</think>", "<|box_start|>", "<|box_end|>", "<box>", "</box>", "<ref>", "(", ")", "[", "]", "{", "}",
        "```json", "```", '"bbox_2d":', '"label":', "<loc0001>", "<|im_end|>", "I'm sorry, I cannot", "N/A", ",", "-",
        "1e999", "nan", "0x10", "12345678901234567890", "٣", "½", "1.5.2", "100%", "x1=", "\x00", "\u2028", "the ",
        "(1,2),(3", "[[1,2,3,4],[5,6,7,8]]", "0.1, 0.2, 0.3, 0.4", "error: 500", "The lesion is at ", "left lung",
    ]
)  # fmt: skip
ODD = st.one_of(PIECES, texts(), st.integers(-(10**6), 10**6).map(str))
QUESTIONS = ("Where is the liver? Answer with boxes.", "What organ is this?", "这是什么器官？", "Give one box.", "")  # noqa: RUF001


@dataclass(frozen=True)
class AnswerInput:
    """An answer as pieces of text, with one box in a known format or without, and damage to its bytes."""

    question: str
    before: str
    box: tuple[str, tuple[int, ...]] | None
    after: str
    format: str
    size: tuple[int, int]
    ended: bool
    mutations: tuple[Mutation, ...]
    repeats: int


JOINED = st.lists(st.one_of(WORD_TEXTS, ODD), max_size=6).map("".join)
INPUTS = st.builds(
    AnswerInput,
    question=st.sampled_from(QUESTIONS),
    before=st.one_of(st.just(""), st.just("It is at "), JOINED),
    box=st.one_of(st.none(), st.tuples(st.sampled_from(sorted(WRITTEN)), BOX)),
    after=st.one_of(st.just(""), st.just("."), JOINED),
    format=st.sampled_from(sorted(BOX_FORMATS)),
    size=st.sampled_from([(200, 100), (1000, 1000), (1, 1), (30, 4000)]),
    ended=st.booleans(),
    mutations=mostly(st.just(()), MUTATIONS.map(tuple), 3),
    repeats=mostly(st.just(1), st.sampled_from([2, 5, 300]), 6),
)


def check(case: AnswerInput, folder: Path) -> bool:
    """Check one answer as `preceptor teach` does."""
    del folder
    box = "" if case.box is None else written(("box", case.box[0], case.box[1]))
    text = (case.before + box + case.after) * case.repeats
    text = mutate(text.encode(errors="replace"), case.mutations).decode(errors="replace")
    read = attempt(lambda: to_canonical(text, case.format, case.size))
    require(read.accepted, "an answer was refused with an error", read.sentence)
    answer = read.value
    wants_box = asks_for_box(case.question)
    reasons = unusable(case.question, answer, ended=case.ended, wants_box=wants_box)
    require(case.ended or "cut off" in reasons, "an answer that was cut off is a label", text)
    found = find_boxes(answer)
    for one in found:
        good = one.box is not None and not validate_box(one.box)
        require(reasons or good, "a label has a box that is unreadable or outside its image", one)
    require(reasons or found or not wants_box, "a label has no box", text)
    require(reasons or any(sign.isalnum() for sign in text), "a label without a word", text)
    require(reasons or ("\ufffd" not in answer and "\x00" not in answer), "a label with control characters", text)
    require(first(reasons) in (reasons or [None]), "another first reason", reasons)
    require(not find_boxes(without_boxes(answer)), "a box remains in a text without boxes", answer)
    same = same_answers([(str(number), case.question, answer) for number in range(25)])
    require(len(same) in (0, 25), "equal answers are told apart", same)
    if not reasons and not case.mutations and case.box is not None and case.repeats == 1 and not case.before:
        compare_box(case, found)
    return not reasons


def compare_box(case: AnswerInput, found: list) -> None:
    """Raise Wrong unless an answer in the format of its speaker has the box that was written, and no other."""
    assert case.box is not None
    formats = {
        "bird": ("bird", "qwen2-vl"),
        "qwen": ("qwen2-vl", "bird"),
        "gemma": ("gemma",),
        "paligemma": ("paligemma",),
    }
    if case.format not in formats.get(case.box[0], ()) or case.after not in ("", "."):
        return
    require(len(found) == 1, "another number of boxes", found)
    gap = max(abs(a - b) for a, b in zip(found[0].box, case.box[1], strict=True))
    require(gap <= 1.5, "another box", (found[0], case.box))


TARGET = Target(INPUTS, check, 200)

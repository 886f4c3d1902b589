"""Columns that are not read are reported if the answers need them, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from preceptor.data.vqa.columns import unread_columns

ORGANS = ["kidney", "lung", "liver", "heart"]


def findings(*rows: dict[str, Any]) -> list[tuple[str, str]]:
    cells = {str(number): row for number, row in enumerate(rows)}
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [(finding.severity, finding.reason) for finding in unread_columns(cells, columns)]


def columns(*names: str) -> dict[str, str]:
    return dict(zip(names, ORGANS, strict=True))


OPTIONS = [
    columns("option_A", "option_B", "option_C", "option_D"),
    columns("Choice A", "Choice B", "Choice C", "Choice D"),  # PMC-VQA
    columns("opa", "opb", "opc", "opd"),  # MedMCQA
    columns("A", "B", "C", "D"),
    columns("option_1", "option_2", "option_3", "option_4"),
    {"options": ORGANS},
    {"choices": ORGANS},
    {"answer_choices": dict(zip("ABCD", ORGANS, strict=True))},
    {"options": [{"label": label, "text": text} for label, text in zip("ABCD", ORGANS, strict=True)]},
    {"choices": {"label": list("ABCD"), "text": ORGANS}},  # ARC
    {"options": "['kidney', 'lung', 'liver', 'heart']"},
    {"options": "A: kidney, B: lung, C: liver, D: heart"},
    {"options": "(A) kidney (B) lung (C) liver (D) heart"},
    {"options": "kidney|lung|liver|heart"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("answer", ["C", "c", "(C)", "C.", "0", 2, 4, 2.0, ["C"]])
def test_letters_and_numbers_of_options_are_an_error(options, answer):
    (found,) = findings({"answer": answer, **options})
    assert found[0] == "error"
    assert found[1].startswith("1 of 1 answers, such as ")
    assert found[1].endswith("write the text of the option into 'answer'")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("answer", ["liver", "Left lung", "C: liver", "E", "5", 12, "yes", ["liver", "lung"]])
def test_texts_of_answers_are_no_labels(options, answer):
    assert findings({"answer": answer, **options}) == []


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "B", "options": ["A", "B", "AB", "O"]},
        {"answer": "2", "option_A": "1", "option_B": "2", "option_C": "3"},
        {"answer": 2, "choices": [1, 2, 3]},
        {"answer": "a", "options": "a, b, c"},
        {"answer": "B"},  # a blood group
        {"answer": "2", "A": "one column of a letter"},
        {"answer": "B", "options": None},
        {"answer": "B", "option_A": "", "option_B": ""},
        {"answer": "2", "option": "with contrast"},
    ],
)
def test_answers_that_are_letters_or_numbers_themselves(row):
    assert findings(row) == []


def test_a_letter_in_another_case_than_the_option_is_a_label():
    (found,) = findings({"answer": "A", "options": ["b", "a"]})
    assert "such as 'A'" in found[1]


def test_the_rows_with_labels_are_counted_and_named():
    rows = [{"answer": answer, "options": ORGANS} for answer in ("lung", "B", "liver", "D")]
    (finding,) = unread_columns({f"q{number}": row for number, row in enumerate(rows)}, ["answer", "options"])
    assert finding.sample_ids == ("q1", "q3")
    assert finding.reason == (
        "2 of 4 answers, such as 'B', are letters or numbers of the options in 'options', and would be learned as "
        "such; write the text of the option into 'answer'"
    )


@pytest.mark.parametrize("column", ["question_id", "questionid", "QuestionID", "answer_id", "image_id"])
def test_identifiers_are_not_mistaken_for_what_they_identify(column):
    assert findings({"question": "Q?", "answer": "yes", "image": "a.png", column: "7"}) == []


def test_columns_with_the_same_content_lose_nothing():
    assert findings({"answer": "yes", "gt_answer": "yes"}, {"answer": "No", "gt_answer": "no "}) == []
    ((severity, reason),) = findings({"answer": "yes", "gt_answer": "yes"}, {"answer": "no", "gt_answer": "yes"})
    assert severity == "warning"
    assert "column 'gt_answer' is not read, only 'answer' is" in reason


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which organ is shown? A. liver B. lung C. heart", "A"),
        ("Which organ is shown? (A) liver (B) lung", "(b)"),
        ("Which organ is shown?\nA.liver\nB.lung", "B."),
        ("Which organ is shown? [A] liver [B] lung", ["A"]),
        ("How large is it? A.5 mm B.6 mm", "B"),
        ("Which organ is shown? 1: liver 2: lung", 2),
        ("Is it normal? 0) no 1) yes", "1"),
        ("\u54ea\u4e2a\u5668\u5b98\uff1fA\u3001\u809d\u810f B\u3001\u80ba", "B"),
    ],
)
def test_labels_of_options_in_the_question_are_an_error(question, answer):
    ((severity, reason),) = findings({"question": question, "answer": answer})
    assert severity == "error"
    assert "are letters or numbers of the options in their question" in reason


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which organ is shown? A. liver B. lung", "liver"),
        ("Is it normal? A. yes B. no", "yes"),
        ("Which organ is shown? A. liver B. lung", "D"),
        ("Which blood group?", "A"),
        ("Which level, C. 5 or C. 6?", "C. 5"),
        ("Which weighting? 1. T1 2. T2", "T2"),
        ("Which panel, (A) or (B), shows the liver?", "A"),
        ("Is it hepatitis A. or hepatitis B.?", "A"),
        ("How many of them are visible? (a) liver (b) lung", "2"),
        ("Is it 1.5 or 2.5 cm?", "2"),
        ("Which vitamin, e.g. C. or K.?", "C"),
    ],
)
def test_letters_and_numbers_without_such_an_option_in_the_question_are_answers(question, answer):
    assert findings({"question": question, "answer": answer}) == []


@pytest.mark.parametrize("answers", [["A", "lung"], [0, 1], ["b", "2"]])
@pytest.mark.parametrize("column", ["choice_list", "candidates"])
@pytest.mark.parametrize("options", [["liver", "lung"], {"A": "liver", "B": "lung"}])
def test_lists_of_texts_of_any_name_are_options_if_all_answers_fit(answers, column, options):
    ((severity, reason),) = findings(*({"answer": answer, column: options} for answer in answers))
    assert (severity, f"the options in '{column}'" in reason) == ("error", True)


@pytest.mark.parametrize(
    "rows",
    [
        [{"answer": "2", "tags": ["liver", "lung"]}, {"answer": "both", "tags": ["liver", "lung"]}],
        [{"answer": "2", "tags": ["liver", "lung"]}, {"answer": "7", "tags": ["liver", "lung"]}],
        [{"answer": "lung", "candidates": ["liver", "lung"]}],
        [{"answer": "1", "scores": [0.5, 0.25]}],
        [{"answer": "1", "tags": ["liver"]}],
        [{"answer": "1", "size": {"unit": "mm", "side": "left"}}],
    ],
)
def test_other_lists_are_no_options(rows):
    assert findings(*rows) == []

"""One strict conversion of cells for all readers."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from preceptor.data.texts import (
    as_choice,
    as_identifier,
    as_text,
    check_column_names,
    is_given,
    parse_json,
    read_rows,
    read_text,
)
from preceptor.errors import UserError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, ""), (float("nan"), ""), (np.float32("nan"), ""), (" a ", "a"), ("1.0", "1.0")),
        *((0, "0"), (1.0, "1"), (-0.0, "0"), (0.1, "0.1"), (np.float32(0.1), "0.1"), (np.int64(4), "4")),
        *((10**40, "1" + "0" * 40), (Decimal("1.00"), "1"), (Decimal("1E+3"), "1000"), (Decimal("0.50"), "0.5")),
    ],
)
def test_equal_numbers_have_one_text(value, text):
    assert as_text(value, "t:1: answer") == text


@pytest.mark.parametrize(
    "value",
    [True, False, float("inf"), b"yes", ["yes"], {"text": "yes"}, datetime.date(2020, 1, 1), np.array(["yes"]), 1j],
)
def test_values_without_a_defined_text_are_refused_with_their_place(value):
    for convert in (as_text, as_identifier):
        with pytest.raises(UserError, match=r"^t:1: answer is .*; write a text in quotes"):
            convert(value, "t:1: answer")


def test_a_truth_value_asks_for_yes_or_no():
    with pytest.raises(UserError, match="is true; write a text in quotes, such as yes or no"):
        as_text(True, "t:1: answer")


@pytest.mark.parametrize("value", [1.5, 1e17, Decimal("1.5")])
def test_identifiers_whose_digits_are_not_certain_are_refused_without_the_value(value):
    with pytest.raises(UserError, match=r"^t:1: id is a number that is not whole, or too large to be exact; write"):
        as_identifier(value, "t:1: id")


def test_zero_is_an_identifier_and_one_name_has_one_form():
    assert is_given(0)
    assert is_given(False)
    assert not is_given("  ")
    assert as_identifier(0, "") == as_identifier("0", "") == as_identifier(0.0, "") == "0"
    assert as_identifier("Mu\u0308ller", "") == as_identifier("M\u00fcller", "")


def test_an_identifier_never_enters_the_message():
    with pytest.raises(UserError) as caught:
        as_identifier(["Jane Doe"], "t:1: group")
    assert "Doe" not in str(caught.value)


def test_a_choice_is_known_or_empty():
    assert as_choice("TRAIN ", {"train": 1}, "t:1: split") == 1
    assert as_choice(None, {"train": 1}, "t:1: split") is None
    with pytest.raises(UserError, match=r"t:1: split 'trian' is not known; did you mean 'train'"):
        as_choice("trian", {"train": 1}, "t:1: split")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": "\\ud800"}', "a contains half of a surrogate pair"),
        ("{", "Expecting property name"),
    ],
)
def test_invalid_json_is_one_sentence_with_its_place(text, reason):
    with pytest.raises(UserError, match=rf"^f:3: .*{reason}"):
        parse_json(text, "f:3")


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json('"\\ud83d\\ude00"', "f") == "\U0001f600"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04rest", "an Excel workbook"),
        (b"PAR1rest", "a parquet file"),
        ("image,question".encode("utf-16"), "is UTF-16"),
        ("image,question".encode("utf-16-le"), "a NUL character"),
        ("caf\xe9".encode("latin-1"), "byte 0xe9 is not UTF-8"),
    ],
)
def test_files_that_are_no_text_in_utf_8(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_text(tmp_path / "t.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_end_in_any_way_and_a_quoted_text_may_have_lines(tmp_path: Path, end: str):
    (tmp_path / "t.csv").write_bytes(f'\ufeffa,b{end}1,"x{end}y"{end}2,z{end}'.encode())
    assert [cells["b"] for _, cells in read_rows(tmp_path / "t.csv")] == [f"x{end}y", "z"]


def test_a_quote_after_a_comma_and_blanks_begins_a_text(tmp_path: Path):
    text = 'image, question,"answer"\na.png, "Is it big, or not?",  "yes"\n b.png, an "old" one , " "\n'
    (tmp_path / "t.csv").write_text(text)
    rows = [cells for _, cells in read_rows(tmp_path / "t.csv")]
    assert rows[0] == {"image": "a.png", "question": "Is it big, or not?", "answer": "yes"}
    # Quotes inside a text stay, and quoted blanks, too.
    assert rows[1] == {"image": "b.png", "question": 'an "old" one ', "answer": " "}


@pytest.mark.parametrize("empty", ["", ",,", " , ,", '"",,', ",", ",,,,,", ",\u200b,"])
def test_rows_without_any_value_are_left_out_of_csv(tmp_path: Path, empty: str):
    (tmp_path / "t.csv").write_text(f"{empty}\na,b,c\n1,2,3\n{empty}\n4,,\n{empty}\n{empty}\n")
    assert [(line, cells["a"]) for line, cells in read_rows(tmp_path / "t.csv")] == [(3, "1"), (5, "4")]


@pytest.mark.parametrize("line", ["sep=,", "sep=;", "SEP=,", '"sep=,"'])
def test_an_instruction_for_excel_is_named(tmp_path: Path, line: str):
    (tmp_path / "t.csv").write_text(f"{line}\na,b,c\n1,2,3\n")
    with pytest.raises(
        UserError, match=r"t\.csv:1: the line '(sep|SEP)=[,;]' is an instruction for Excel .* delete the"
    ):
        read_rows(tmp_path / "t.csv")


def test_a_short_name_is_no_misspelling_of_another_one():
    check_column_names(["uid", "pid", "idx"], ["id", "split"], "t:1")
    with pytest.raises(UserError, match="unknown column 'ID'; did you mean 'id'"):
        check_column_names(["ID"], ["id", "split"], "t:1")


@pytest.mark.parametrize("name", ["Split", "splits", " split", "SPLIT", "spilt"])
def test_a_column_that_is_nearly_named_as_a_known_one_is_refused(name: str):
    with pytest.raises(UserError, match=rf"^t:1: unknown column '{name}'; did you mean 'split'\? Rename the column$"):
        check_column_names(["case", name], ["case", "split"], "t:1")


def test_other_columns_are_not_checked():
    check_column_names(["case", "split", "splits", "case_report", "slip"], ["case", "split"], "t:1")
    with pytest.raises(UserError, match="t:1: the columns 'split' and 'Split' differ only in case; keep one"):
        check_column_names(["split", "Split"], ["case", "split"], "t:1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a;b\n1;2\n", "has no comma; save the table with commas"),
        ("a;b;c, first\n1;2;3\n", "is separated by ';'; save the table with commas"),
        ("a,a\n1,2\n", "column 'a' occurs twice"),
        ("a,b\n1\n", "t.csv:2: 1 fields, but the header has 2"),
        ('a,b\n"1,2\n', "invalid CSV"),
        ('a,b\n1, "2" or 3\n', "t.csv:2: invalid CSV .*; correct the quotes of this row"),
    ],
)
def test_mistakes_in_csv(tmp_path: Path, text: str, reason: str):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_rows(tmp_path / "t.csv")

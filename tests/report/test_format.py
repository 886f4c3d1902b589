from __future__ import annotations

import math

import pytest

from preceptor.report.format import NONE, count, duration, enumerate_words, finite, interval, p_value, percent, points
from preceptor.report.page import escape_markdown, render_markdown
from preceptor.report.sections import HIDDEN, without_paths
from preceptor.report.tables import Table


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, NONE), (999, "999"), (1000, "1.0 k"), (430_900, "431 k"), (4_736_642, "4.7 M"), (2.6e9, "2.6 G")],
)
def test_counts(number: float | None, text: str):
    assert count(number).replace("\u00a0", " ") == text


def test_durations_shares_and_points():
    seconds = [duration(s).replace("\u00a0", " ") for s in (9.6, 60, 3599.7, 7322)]
    assert seconds == ["10 s", "1 min 0 s", "1 h 0 min", "2 h 2 min"]
    assert [points(d) for d in (0.0142, -0.0031, 0.0001, -0.0001, None)] == ["+1.4", "\u22120.3", "0.0", "0.0", NONE]
    assert [percent(share) for share in (0.6123, None, math.nan)] == ["61.2", NONE, NONE]
    assert interval(0.58, 0.643) == "58.0 to 64.3"
    assert interval(None, 0.5) == NONE
    assert [p_value(p) for p in (None, 0.0004, 0.0124)] == [NONE, "< 0.001", "0.012"]


def test_words_and_numbers():
    assert enumerate_words(["a"]) == "a"
    assert enumerate_words(["a", "b", "c"]) == "a, b and c"
    assert [finite(v) for v in (1, 0.5, True, None, "1", math.nan, math.inf)] == [1.0, 0.5, *[None] * 5]


def test_columns_of_numbers_and_of_prose():
    rows = [["Teacher", "61.2", "1.0\u00a0k", "+1.4 to +2.0", "3 of them are long enough to be prose"]]
    table = Table("t", ["Model", "a", "b", "c", "d"], [*rows, ["Baseline", NONE, "", "< 0.001", ""]])
    assert table.numeric == [False, True, True, True, False]
    assert not Table("t", ["a"], [])


def test_markdown_values_are_escaped():
    assert escape_markdown("<b> a|b\n# & ") == "&lt;b> a\\|b # &amp; "
    card = render_markdown(
        "report/templates/card.md.j2",
        front="",
        title="<script>",
        data=None,
        notes=[],
        tables=[Table("t", ["a|b", "n"], [["x|y", "1"]])],
        facts=["\n# heading"],
        unit="cases",
    )
    assert "<script>" not in card
    assert "| a\\|b | n |\n|---|---:|\n| x\\|y | 1 |\n" in card
    assert "\n# heading" not in card


@pytest.mark.parametrize("path", ["../jane-doe", "~/jane-doe", "/home/jane-doe", "C:\\jane-doe", "C:/jane-doe"])
def test_paths_are_hidden(path: str):
    recipe = {"output": "runs/jane-doe", "text": {"pretrained": [path, "google/bert"]}, "runs": ["jane-doe"]}
    hidden = {"output": HIDDEN, "text": {"pretrained": [HIDDEN, "google/bert"]}, "runs": [HIDDEN]}
    assert without_paths(recipe) == hidden

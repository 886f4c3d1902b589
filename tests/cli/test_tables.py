"""The tables of the terminal: the same numbers as on the page, aligned and wrapped at words."""

from __future__ import annotations

import json
from html import escape

import pytest

from preceptor.cli.results import show_results
from preceptor.cli.terminal import print_table
from preceptor.report.contents import read_run
from preceptor.report.tables import Table
from preceptor.vqa.report import render, summary
from tests.vqa.conftest import MadeRun, made_run

__all__ = ["made_run"]


@pytest.mark.parametrize("columns", [80, 120])
def test_results_fit_the_terminal(made_run: MadeRun, columns: int, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    results = json.loads((made_run.folder / "results.json").read_text("utf-8"))
    show_results(results | {"task": "vqa"})
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if not line.startswith(("Distilled minus", "Milliseconds"))]
    assert max(map(len, tables)) <= columns
    for table in summary(results):
        for row in table.rows:
            for cell in (cell.replace("\u00a0", " ") for cell in row[1:]):
                assert cell in printed


def test_the_page_shows_the_same_tables(made_run: MadeRun):
    run = read_run(made_run.folder)
    page = render(run)
    for table in summary(run.document):
        for cell in (cell for row in table.rows for cell in row):
            assert f"{escape(cell)}</t" in page


def test_numbers_are_aligned_right_and_prose_is_wrapped_at_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    prose = "the quick brown fox jumps over the lazy dog"
    print_table(Table("A table", ["Model", "n", "Meaning"], [["a", "1.0", prose], ["b", "100.0", prose]], ["A note."]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "A table"
    (first,) = [line for line in lines if line.startswith("a ")]
    (second,) = [line for line in lines if line.startswith("b ")]
    assert first.index("1.0") + 3 == second.index("100.0") + 5
    assert {word for line in lines for word in line.split()} >= set(prose.split())
    assert lines[-1] == "A note."

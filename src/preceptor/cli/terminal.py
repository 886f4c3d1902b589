"""What the command line prints: tables for people, or one JSON document for scripts."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from preceptor.report.format import SPACE
from preceptor.report.tables import MOST_LETTERS, Table
from preceptor.tasks import module


def say(document: Any, as_json: bool, show) -> None:
    if not main_process():
        return
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        show(document)


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of strings."""
    print_table(Table(title, columns, rows))


def print_table(table: Table) -> None:
    """Print a table and its notes: numbers right-aligned and never wrapped, prose left-aligned and wrapped at words."""
    from rich import box
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Grid

    if not table:
        return
    columns = []
    for name, cells, number in zip(table.columns, zip(*table.rows, strict=True), table.numeric, strict=True):
        if number and "\n" not in name:  # the head may be wrapped, its numbers may not
            name = "\n".join(textwrap.wrap(name, max(map(len, [*cells, *name.split(" ")]))))
        longest_word = max(len(word) for cell in (name, *cells) for word in (cell.split() or [""]))
        columns.append(
            Column(
                name, justify="right" if number else "left", no_wrap=number, min_width=min(longest_word, MOST_LETTERS)
            )
        )
    grid = Grid(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in table.rows:
        grid.add_row(*(Text(cell.replace(SPACE, " ")) for cell in row))
    console = Console()
    console.print(Text(table.title.replace(SPACE, " "), style="bold"))
    console.print(grid)
    for note in table.notes:
        console.print(note.replace(SPACE, " "), markup=False, highlight=False)


def show_results(results: Mapping[str, Any]) -> None:
    """Print the scores of every stage of a run, or those of the groups of a comparison."""
    if "groups" in results:
        from preceptor.compare.summary import HOW_MARKED, summary

        tables, notes = summary(results), [HOW_MARKED, *results["notes"]]
    else:
        tables, notes = module(results["task"], "report").summary(results), results.get("notes") or []
    for table in tables:
        print_table(table)
    for note in notes:
        print(f"note: {note}")


def show_cached_words(report: dict[str, Any]) -> None:
    """Print what is stored of a ClinKD recipe's teacher: its answers, and its words at their tokens."""
    labels, words = report["labels"], report["words"]
    said = ", ".join(f"{n} {reason}" for reason, n in labels.get("left_out", {}).items())
    coverage = f"{percent(labels.get('coverage'))} % of the dialogues{f' (left out: {said})' if said else ''}"
    rows = [["pseudo-labels", labels["folder"], str(labels.get("rows", "-")), coverage]]
    if words is not None:
        tokens = f"{words['tokens']:,} tokens, {words['k']} words each" if "tokens" in words else "-"
        rows.append(["cached words", words["folder"], str(words.get("rows", "-")), tokens])
    table(f"teacher {str(report['teacher'])[:12]}", ["what", "folder", "rows", "holds"], rows)
    if report["checked"]:
        print(
            f"{report['checked']} dialogues computed again: largest difference of probabilities "
            f"{report['worst']:.2g}, {len(report['mismatches'])} differ"
        )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

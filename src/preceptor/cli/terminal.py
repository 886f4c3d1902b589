"""Printing on the terminal: tables and sentences for people, or one JSON document for scripts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from preceptor.files import to_json
from preceptor.report.format import SPACE
from preceptor.report.tables import MOST_LETTERS, Table


def say(document: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a result: as JSON if `as_json`, else with `show`. Of several processes only the first one prints."""
    if not main_process():
        return
    if as_json:
        # A terminal that is not UTF-8 would show escapes of Python, which are not JSON.
        utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
        print(to_json(document, indent=1) if utf8 else json.dumps(document, indent=1))
    else:
        show(document)


def main_process() -> bool:
    """Return whether this is the first process of a run. It does not import torch."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """Show log messages on standard error, above the progress bar if there is one."""
    log = logging.getLogger("preceptor")
    log.setLevel(logging.INFO)
    for handler in [handler for handler in log.handlers if isinstance(handler, _StderrHandler)]:
        log.removeHandler(handler)
    if main_process():
        log.addHandler(_StderrHandler())


class _StderrHandler(logging.StreamHandler):
    """Writes to the standard error of the moment, which rich replaces while a progress bar is shown."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass

    def format(self, record: logging.LogRecord) -> str:
        return wrap(super().format(record), sys.stderr)


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield ``progress(done, total)``, which shows a bar on standard error, or plain lines without a terminal.

    Nothing is shown if `total` is 1.
    """
    from preceptor.training.progress import Progress

    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def progress(done: int, total: int) -> None:
            if total > 1 and not bars:
                bars.append(stack.enter_context(Progress(title, total, done)))
            for bar in bars:
                bar.advance(done)

        yield progress


def sentence(text: str) -> None:
    """Print text; in a terminal it is wrapped at words."""
    print(wrap(text, sys.stdout))


def wrap(text: str, stream: TextIO) -> str:
    """Return text with lines that fit into the terminal; unchanged if the stream is not a terminal."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    lines = (textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join(lines)


def notes(texts: Iterable[str]) -> None:
    """Print notes, each once."""
    for text in dict.fromkeys(texts):
        sentence(f"note: {text}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of strings."""
    print_table(Table(title, columns, rows))


def print_table(table: Table) -> None:
    """Print a table and its notes. Numbers are aligned right and never wrapped, text is aligned left and wrapped."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, (name, numeric) in enumerate(zip(table.columns, table.numeric, strict=True)):
        cells = [row[number] for row in table.rows]
        if numeric and "\n" not in name:  # the head may be wrapped, its numbers may not
            name = "\n".join(textwrap.wrap(name, max(map(len, [*cells, *name.split(" ")]), default=1)))
        longest_word = max((len(word) for cell in [name, *cells] for word in cell.split()), default=1)
        width = min(longest_word, MOST_LETTERS)
        grid.add_column(
            Text(name), justify="right" if numeric else "left", no_wrap=numeric, min_width=width, overflow="fold"
        )
    for row in table.rows:
        grid.add_row(*(Text(cell.replace(SPACE, " ")) for cell in row))
    console = Console()
    console.print()
    console.print(Text(table.title.replace(SPACE, " "), style="bold"))
    console.print(grid)
    for note in table.notes:
        sentence(note.replace(SPACE, " "))

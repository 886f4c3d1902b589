"""Printing on the terminal: tables and sentences for people, or one JSON document for scripts."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_NUMERIC = re.compile(r"(?:[-+\u2212\d.,:%()<>=/ \u00a0]|to|of|[kM]|ms|ml)*")


def say(document: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a result: as JSON if `as_json`, else with `show`. Of several processes only the first one prints."""
    if not main_process():
        return
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
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
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


class _StderrHandler(logging.StreamHandler):
    """Writes to the standard error of the moment, which rich replaces while a progress bar is shown."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def sentence(text: str) -> None:
    """Print text; in a terminal it is wrapped at words."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(text, markup=False, highlight=False)
    else:
        print(text)


def notes(texts: Iterable[str]) -> None:
    """Print notes, each once."""
    for text in dict.fromkeys(texts):
        sentence(f"note: {text}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Columns of numbers are aligned right, columns of text left and wrapped at words."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    printed = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows]
        if number > 0 and all(map(_NUMERIC.fullmatch, cells)):
            width = max(map(len, cells), default=0)
            printed.add_column(Text(column), justify="right", min_width=width)
        else:
            printed.add_column(Text(column), overflow="fold")
    for row in rows:
        printed.add_row(*map(Text, row))
    console = Console()
    console.print()
    console.print(Text(title, style="bold"))
    console.print(printed)


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"

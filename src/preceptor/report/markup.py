"""Pieces of HTML that several sections of a report share. What is called text here is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any


def escape(value: Any) -> str:
    """Return text as HTML, fit for an attribute too."""
    return html.escape(str(value), quote=True)


def chip(kind: str, title: str) -> str:
    """Return a text after a square of the colour of `kind`."""
    return f'<i class="chip {escape(kind)}"></i>{escape(title)}'


def scrolling(table: str, label: str) -> str:
    """Return an HTML table in a box that it scrolls in where the screen is narrow."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def table(caption: str, heads: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table that scrolls within itself; `caption` and `rows` are HTML, `heads` text."""
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    head = f"<caption><span>{caption}</span></caption><thead><tr>{columns}</tr></thead>"
    return scrolling(f"<table>{head}<tbody>{''.join(rows)}</tbody></table>", "Table")


def row(head: str, cells: Iterable[str], kind: str = "", *, wide: bool = False) -> str:
    """Return a row; `head` is HTML, `cells` text; with `wide` the last cell is prose."""
    *most, last = [f"<td>{escape(cell)}</td>" for cell in cells]
    last = last.replace("<td>", '<td class="prose">', 1) if wide else last
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return f'{opening}<th scope="row">{head}</th>{"".join([*most, last])}</tr>'

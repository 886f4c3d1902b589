"""Pieces of HTML that several sections of a report share. What is called text here is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable
from importlib import resources
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def escape(value: Any) -> str:
    """Return text as HTML, fit for an attribute too."""
    return html.escape(str(value), quote=True)


def stylesheet(name: str) -> str:
    """Return a style sheet of this folder."""
    return (resources.files("preceptor.report") / name).read_text("utf-8")


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


def banner(sentences: Iterable[str], leak: tuple[str, str] | None = None) -> str:
    """Return what must be read before the numbers, each sentence once; `leak` is a warning and what it means."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in dict.fromkeys(sentences))
    if leak:
        warning, meaning = (escape(part) for part in leak)
        shown = f"<p><strong>{warning}</strong> {meaning}</p><ul>{items}</ul>"
        return f'<aside class="banner leak" aria-label="Warning">{shown}</aside>'
    return f'<aside class="banner" aria-label="Notes"><ul>{items}</ul></aside>' if items else ""


def document(title: str, header: str, before: str, sections: Iterable[tuple[str, str, str]], *, style: str = "") -> str:
    """Return a page that needs nothing but itself.

    `sections` are (id, heading, content), those without content left out; `before` stands in front of them. All but
    `title` is HTML. `style` goes after page.css.
    """
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in shown)
    css = stylesheet("page.css") + style
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f'<header>{header}<nav aria-label="Sections">{links}</nav></header>\n<main>{before}{body}</main>\n'
        "<footer>Made by Preceptor. For research: not a medical device, not for diagnosis.</footer>\n</body>\n</html>\n"
    )

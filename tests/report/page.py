"""A parser of pages for tests."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from importlib import import_module
from typing import Any

import pytest

from preceptor.report import plots

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []  # of sections
        self.all_ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        ids = [value for name, value in attrs if name == "id"]
        self.all_ids += ids
        self.ids += ids if tag == "section" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


def draw_equal_figures_once(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """Make the report of a task draw a figure only once for equal data: tests that render many pages take seconds."""
    drawn: dict[str, Any] = {}
    for module in (import_module(f"preceptor.{task}.report"), import_module("preceptor.report.sections")):
        for name in ("line_chart", "interval_plot", "box_plot"):
            draw = getattr(plots, name)

            def cached(*arguments: Any, name: str = name, draw: Any = draw, **settings: Any) -> Any:
                key = repr((name, arguments, settings))
                if key not in drawn:
                    drawn[key] = draw(*arguments, **settings)
                return drawn[key]

            if hasattr(module, name):
                monkeypatch.setattr(module, name, cached)

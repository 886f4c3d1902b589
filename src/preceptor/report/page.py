"""Pages as data: sections of blocks, rendered by the Jinja2 templates of this package with autoescape.

A page is one HTML file without scripts, requests or file paths. A block names the macro of ``blocks.html.j2`` that
renders it; `Fragment` names a template of its own. Empty blocks and sections are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TEMPLATES = "report/templates"


@dataclass(frozen=True)
class Text:
    """A paragraph; `style` is ``headline``, ``small`` or empty."""

    macro: ClassVar[str] = "text"
    text: str
    style: str = ""

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    macro: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Bar:
    """A share in [0, 1] as a bar with its interval; `key` is its colour."""

    title: str
    key: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars with a caption; the `ceiling` is a dashed line across all of them."""

    macro: ClassVar[str] = "bars"
    bars: Sequence[Bar]
    caption: str
    ceiling: float | None = None

    def __bool__(self) -> bool:
        return any(bar.value is not None for bar in self.bars)


@dataclass(frozen=True)
class Charts:
    """SVG figures side by side as (caption, SVG) with a common legend of (colour, title)."""

    macro: ClassVar[str] = "charts"
    charts: Sequence[tuple[str, str]]
    legend: Sequence[tuple[str, str]] = ()
    wide: bool = False

    def __bool__(self) -> bool:
        return any(svg for _, svg in self.charts)


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    macro: ClassVar[str] = "facts"
    facts: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.facts)


@dataclass(frozen=True)
class Details:
    """Blocks behind a summary that unfolds."""

    macro: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Any]

    def __bool__(self) -> bool:
        return any(self.blocks)


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    macro: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Fragment:
    """A template with its data, which it reads as ``block.data``."""

    macro: ClassVar[str] = "fragment"
    template: str
    data: Any

    def __bool__(self) -> bool:
        return bool(self.data)


@dataclass(frozen=True)
class Section:
    """A part of a page; `id` is its anchor."""

    id: str
    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Page:
    """A page: `facts` are lines below the title, `notes` sentences in a banner, `leak` the warning of a leaking split.

    `style` names a style sheet that follows ``page.css``.
    """

    title: str
    facts: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str] = field(default=())
    leak: str = ""
    style: str = ""

    def render(self) -> str:
        """Return the HTML."""
        sheets = [f"{TEMPLATES}/page.css", *([self.style] if self.style else [])]
        css = "".join((resources.files("preceptor") / sheet).read_text("utf-8") for sheet in sheets)
        return (
            _environment()
            .get_template(f"{TEMPLATES}/page.html.j2")
            .render(
                page=self,
                sections=[section for section in self.sections if any(section.blocks)],
                notes=list(dict.fromkeys(self.notes)),
                css=Markup(css),
                policy=POLICY,
            )
        )


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("preceptor", ""),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_markdown(template: str, **context: Any) -> str:
    """Render a Markdown template. Every value is escaped: it can be neither HTML nor the end of a table cell."""
    environment = Environment(
        loader=PackageLoader("preceptor", ""),
        autoescape=False,
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**context)


def escape_markdown(value: Any) -> str:
    """Escape a value for Markdown. `Markup` is text of the package's own and stays as it is."""
    if isinstance(value, Markup):
        return str(value)
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")

"""A table of plain strings. The terminal and the pages show the same one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

NUMBER = re.compile(r"^(\u2013|[<+\u2212-]?\s?\d.*)?$", re.DOTALL)
MOST_LETTERS = 24


@dataclass(frozen=True)
class Table:
    """Rows under a title; `notes` are sentences below it.

    `keys` may give the colour of each row's first cell on a page: the name of a stage, or an empty string.
    """

    macro: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.title}: {self.columns}, {self.rows}"
        assert not self.keys or len(self.keys) == len(self.rows), f"{self.title}: {self.keys}"

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers (right-aligned) or prose (left-aligned)."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [all(NUMBER.match(cell) and len(cell) <= MOST_LETTERS for cell in column) for column in columns]

"""What is fuzzed: a strategy of inputs, and a check that writes an input to a folder and judges what is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.outcome import limits


@dataclass(frozen=True)
class Target:
    """A reader and its inputs.

    Attributes:
        inputs: Strategy of inputs.
        check: Called as ``check(input, folder)`` with an empty folder. Returns whether the input was accepted, and
            raises an error if the outcome is neither right nor a sentence.
        examples: Number of inputs in the test suite.
    """

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any, Path], bool]
    examples: int

    def run(self, value: Any, folder: Path) -> bool:
        """Check one input within the limits of time and memory."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with limits():
            return self.check(value, folder)

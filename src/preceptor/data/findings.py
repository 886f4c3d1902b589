"""Problems that a check of a data set reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A problem in a data set.

    Attributes:
        sample_ids: Samples that are affected; empty if the problem concerns the data set as a whole.
        file: The faulty file, or None if the problem is in the table.
        reason: What is wrong and how to fix it.
        severity: A `warning` does not stop training.
        leak: Whether held-out scores are too high because of it.
    """

    sample_ids: tuple[str, ...]
    file: Path | None
    reason: str
    severity: Literal["error", "warning"] = "error"
    leak: bool = False

"""PathVQA (He et al. 2020) as the parquet files of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.data.identity import note_leaks
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.parquet import read_configured


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the official splits, and note what they share."""
    data = read_configured(config, scratch, "official")
    note_leaks(data, published=True)
    return data

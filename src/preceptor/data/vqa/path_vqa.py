"""PathVQA (He et al. 2020) as the parquet files of the hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from preceptor.data.groups import note_leaks
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.parquet import read_configured
from preceptor.data.vqa.release import released_counts

RELEASED_ROWS = {"train": 19_654, "validation": 6_259, "test": 6_719}
"""Rows of `flaviagiammarino/path-vqa` on the Hugging Face hub, by its card."""


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the official splits, and note what they share."""
    data = read_configured(config, scratch, "official")
    rows = Counter(sample.id.partition("-")[0] for sample in data.samples)
    tables = {split: data.root / f"{split}-*.parquet" for split in RELEASED_ROWS}
    data.findings += released_counts(
        {tables[split]: rows[split] for split in tables}, {tables[split]: RELEASED_ROWS[split] for split in tables}
    )
    note_leaks(data, published=True)
    return data

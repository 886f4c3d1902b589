"""The generated segmentation data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.synthetic.cases import SPLIT, write_phantom_cases
from preceptor.data.types import SegmentationDataset


def read(config: Any, scratch: Path) -> SegmentationDataset:
    """Generate cases in `data.root`, or in `scratch`, and read them."""
    settings = config.phantom.model_dump()
    root = write_phantom_cases(Path(config.root) if config.root else scratch, **settings)
    data = read_volumes(
        root, modalities=config.modalities, regions=config.regions, split_file=root / SPLIT, name="phantom"
    )
    data.variant = "made"
    data.notes.append("Generated volumes: the numbers show that the method works, not that it helps in medicine.")
    return data

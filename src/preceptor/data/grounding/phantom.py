"""The generated data set of dialogues with boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.data.synthetic.grounding import read_phantom_grounding
from preceptor.data.synthetic.questions_table import write_phantom
from preceptor.data.types import GroundingDataset


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Generate images and dialogues in `data.root`, or in `scratch`, and read them."""
    folder = Path(config.root) if config.root else scratch
    return read_phantom_grounding(write_phantom(folder, **config.phantom.model_dump(), image_size=config.phantom_size))

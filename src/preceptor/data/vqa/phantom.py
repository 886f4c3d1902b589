"""The generated VQA data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.data.synthetic.questions_table import write_phantom
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.table import read_table


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Generate images and questions in `data.root`, or in `scratch`, and read them."""
    folder = Path(config.root) if config.root else scratch
    data = read_table(
        write_phantom(folder, **config.phantom.model_dump(), image_size=config.image_size), name="phantom"
    )
    data.notes.append("Generated images: the numbers show that the method works, not that it helps in medicine.")
    return data

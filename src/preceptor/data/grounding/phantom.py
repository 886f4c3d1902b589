"""The generated data set as dialogues with boxes: the four tasks of Med-GRIT-270k on phantoms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preceptor.data.grounding.boxes import from_pixels
from preceptor.data.grounding.questions import LabeledBox, Picture, ask_about_boxes
from preceptor.data.images import image_size
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.synthetic.questions_table import write_phantom
from preceptor.data.types import Dialogue, GroundingDataset

MODALITIES = {"ct": "ct", "mri": "mr", "x-ray": "x"}


def read_phantom_grounding(table: Path) -> GroundingDataset:
    """Return the dialogues about the images of a phantom table (see `write_phantom`), in its splits.

    The questions of the table become questions of image analysis. Lesions of one kind are one name with several boxes.
    """
    rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
    dialogues: list[Dialogue] = []
    described_images: set[str] = set()
    for row in rows:
        image = table.parent / row["image"]
        modality = row["modality"]
        picture = Picture(
            image, image.stem, row["group"], SPLIT_NAMES[row["split"]], MODALITIES[modality], modality, row["region"]
        )
        if row["image"] not in described_images:
            described_images.add(row["image"])
            width, height = image_size(image)
            dialogues += ask_about_boxes(picture, _labeled_boxes(row, width, height))
        dialogues.append(picture.dialogue(f"mia-{row['id']}", row["question"], row["answer"], "mia"))
    data = GroundingDataset("phantom-grounding", "given", table.parent, dialogues)
    data.notes.append("Generated images: the numbers show that the method works, not that it helps in medicine.")
    return data


def _labeled_boxes(row: dict, width: int, height: int) -> list[LabeledBox]:
    names: dict[str, list[tuple[float, float, float, float]]] = {}
    for key, box in row["boxes"].items():
        names.setdefault(row["findings"].get(key, key), []).append(from_pixels(box, width, height))
    findings = set(row["findings"].values())
    return [LabeledBox(name, tuple(boxes), name in findings) for name, boxes in names.items()]


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Generate images and dialogues in `data.root`, or in `scratch`, and read them."""
    folder = Path(config.root) if config.root else scratch
    return read_phantom_grounding(write_phantom(folder, **config.phantom.model_dump(), image_size=config.phantom_size))

"""A few dialogues about generated images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from preceptor.data.types import Dialogue, GroundingDataset


def image(folder: Path, number: int, side: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"smith_{number}.png"
    values = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(values).save(file)
    return file


def data(folder: Path, images: int = 4, questions: int = 3) -> GroundingDataset:
    """Each image has `questions` dialogues of one labelled turn."""
    dialogues = []
    for number in range(images):
        file = image(folder, number)
        for q in range(questions):
            turn = (f"Question {q} about image?", f"truth {q}")
            dialogues.append(Dialogue(f"{number}-{q}", (file,), (turn,), "mia", "ct", f"g{number}", "train"))
    return GroundingDataset("made", "given", folder, dialogues)

"""Images that look like nothing else, and tables about them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FIELDS = ("id", "image", "question", "answer", "group", "split", "question_type")


def picture(seed: int, side: int = 160) -> Image.Image:
    """Return a smooth grey image with some detail, another one for every seed."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for x, y, size in rng.integers(0, side - 24, (12, 3)):
        draw.ellipse((int(x), int(y), int(x) + 6 + int(size) % 18, int(y) + 6 + int(size) % 14), fill=int(size) % 255)
    return image


def write_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "questions.csv"


def row(id: str, image: str, split: str, question: str = "What is shown?", answer: str = "lung") -> dict[str, str]:
    return {"id": id, "image": image, "question": question, "answer": answer, "group": id, "split": split}

"""Whether the format of answers is found from the answers alone: SLAKE's boxes in every format, clean and noisy.

    python bench/box_formats.py

A stand-in for a model writes the boxes of SLAKE in each format, and `measure_format` compares the answers in all
formats with the known boxes. Prints the mean IoU in the right format, the format that is found, and its margin over
the best format that reads other boxes. Needs PRECEPTOR_DATA.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from preceptor.data.grounding.box_detection import FormatMeasurement, measure_format
from preceptor.data.grounding.box_formats import BOX_FORMATS, Size, write
from preceptor.data.grounding.boxes import Box, from_pixels, repair_box
from preceptor.data.images import image_size

NOISE = 20
"""Largest shift of a corner in thousandths, for answers of an imperfect model."""


def slake_boxes(root: Path) -> list[tuple[str, Box, Size]]:
    """Return (name, box in thousandths, size of the image) of every box of SLAKE."""
    rows = []
    for file in sorted(root.rglob("detection.json")):
        size = image_size(file.with_name("source.jpg"))
        for entry in json.loads(file.read_text("utf-8")):
            for name, (x, y, width, height) in entry.items():
                box = repair_box(from_pixels((x, y, x + width, y + height), *size))
                if box is not None:
                    rows.append((name, box, size))
    return rows


def measure(rows: list[tuple[str, Box, Size]], name: str, noise: float = 0, seed: int = 0) -> FormatMeasurement:
    """Measure the answers of a stand-in that writes the format `name`, its corners moved by up to `noise`."""
    draw = random.Random(seed)
    answers = []
    for label, box, size in rows:
        moved = repair_box([value + draw.uniform(-noise, noise) for value in box]) or box
        text = write([moved], label, name, BOX_FORMATS[name].size_seen(size))
        answers.append(f"Here is what I found:\n```json\n{text}\n```" if text.startswith("[{") else f"{text}.")
    return measure_format(answers, [[box] for _, box, _ in rows], [size for *_, size in rows])


def main() -> None:
    rows = slake_boxes(Path(os.environ["PRECEPTOR_DATA"]) / "slake")
    for noise in (0, NOISE):
        print(f"corners moved by up to {noise} thousandths")
        print(f"{'format':<18}{'mean IoU':>9}{'n':>6}  {'found':<18}{'margin':>7}")
        for name in BOX_FORMATS:
            found = measure(rows, name, noise)
            print(f"{name:<18}{found.mean_iou[name]:9.3f}{found.answers:6}  {found.best:<18}{found.margin:7.3f}")


if __name__ == "__main__":
    main()

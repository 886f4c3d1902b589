"""Whether the format of answers is found from the answers alone: SLAKE's boxes in every format, clean and noisy.

    python bench/box_formats.py

A stand-in for a model writes the boxes of SLAKE in each format, and `measure_format` compares the answers in all
formats with the known boxes. Prints the mean IoU in the right format, the format that is found, and its margin over
the best format that reads other boxes. A second table is about stand-ins with habits that are no format: what is
found, the measured IoU, and whether `preceptor teach` accepts it. Needs PRECEPTOR_DATA.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from preceptor.data.grounding.box_detection import FormatMeasurement, measure_format
from preceptor.data.grounding.box_formats import BOX_FORMATS, Size, write
from preceptor.data.grounding.boxes import Box, from_pixels, repair_box
from preceptor.data.images import image_size
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.box_convention import BoxSettings

STEP = 5
"""Every fifth box is written."""
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


def _list(numbers: Iterable[float]) -> str:
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"


def _resized(box: Box, size: Size, side: int) -> str:
    """Pixels of an image that was resized to a longer side."""
    width, height = (side * value / max(size) for value in size)
    return _list(round(value * scale / 1000) for value, scale in zip(box, (width, height) * 2, strict=True))


HABITS: dict[str, Callable[[Box, Size], str]] = {
    "0..1 with two decimals": lambda b, size: _list(round(v / 1000, 2) for v in b),
    "whole per cent": lambda b, size: _list(round(v / 10) for v in b),
    "thousandths, y first, no key": lambda b, size: _list(round(b[i]) for i in (1, 0, 3, 2)),
    "thousandths, [x, y, w, h]": lambda b, size: _list(map(round, (b[0], b[1], b[2] - b[0], b[3] - b[1]))),
    "pixels, longer side of 336": lambda b, size: _resized(b, size, 336),
    "pixels, longer side of 768": lambda b, size: _resized(b, size, 768),
    "pixels, longer side of 1024": lambda b, size: _resized(b, size, 1024),
    "a second box for each": lambda b, size: f"{_list(map(round, b))} and [0, 0, 200, 200]",
    "one box for everything": lambda b, size: "[100, 100, 900, 900]",
}
"""Ways to write a box in thousandths, in an image of a size, of stand-ins that follow no format exactly."""


def convention(rows: list[tuple[str, Box, Size]], habit: str) -> tuple[str, float]:
    """Return the format that `preceptor teach` finds for a habit, and its mean IoU; or its refusal, and NaN."""
    dialogue = Dialogue("stand-in", (Path("image"),), (("", ""),), "vg", "ct", "stand-in", "train")
    sizes = iter([size for *_, size in rows])
    settings = BoxSettings(None, [dialogue] * len(rows), size_sent=lambda path: next(sizes))
    try:
        found = settings.measure([(dialogue, HABITS[habit](box, size), [box]) for _, box, size in rows])
    except UserError as error:
        return f"refused: {error}", math.nan
    return found.format, found.mean_iou[found.format]


def main() -> None:
    rows = slake_boxes(Path(os.environ["PRECEPTOR_DATA"]) / "slake")[::STEP]
    for noise in (0, NOISE):
        print(f"corners moved by up to {noise} thousandths")
        print(f"{'format':<20}{'mean IoU':>9}{'n':>6}  {'found':<20}{'margin':>7}")
        for name in BOX_FORMATS:
            found = measure(rows, name, noise)
            print(f"{name:<20}{found.mean_iou[name]:9.3f}{found.answers:6}  {found.best:<20}{found.margin:7.3f}")
    print(f"{'habit':<32}{'mean IoU':>9}  found")
    for habit in HABITS:
        name, overlap = convention(rows, habit)
        print(f"{habit:<32}{overlap:9.3f}  {name}")


if __name__ == "__main__":
    main()

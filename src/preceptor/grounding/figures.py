"""The pictures of a grounding report, stored at evaluation: images of test dialogues that ask for boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from preceptor.data.images import ImageError, load_image
from preceptor.data.types import GroundingDataset
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.metrics import row_score
from preceptor.report.pictures import FigureWriter

LONGEST_SIDE = 420  # pixels of an image
T = TypeVar("T")


def write_figures(
    folder: Path,
    data: GroundingDataset,
    recipe: GroundingRecipe,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Store the images of `recipe.report.pictures` test dialogues in ``folder/figures``.

    Of the questions that ask for boxes, sorted by their score, the worst, the best and some in between are taken. The
    report draws the boxes from the predictions.

    Args:
        folder: folder of the stage.
        data: the data set.
        recipe: settings of the report and limits for images.
        rows: predictions by protocol id, the main protocol first.
    """
    protocol, predictions = next(iter(rows.items()), ("", []))
    dialogues = {dialogue.id: dialogue for dialogue in data.samples if dialogue.images}
    scored = [
        (score, str(row["id"]), row["turn"])
        for row in predictions
        if row["task"] == "vg"
        and row["id"] in dialogues
        and (score := row_score(row, protocol.rpartition("/")[2])) is not None
    ]
    writer, pictures = FigureWriter(folder), []
    limits = {"max_bytes": recipe.data.max_image_bytes, "max_pixels": recipe.data.max_image_pixels}
    for number, (_, id, turn) in enumerate(take_evenly(sorted(scored), recipe.report.pictures), 1):
        try:
            image = load_image(dialogues[id].images[0], **limits)
        except ImageError:
            continue
        name = writer.add(f"image-{number:02}", image.convert("RGB"), LONGEST_SIDE)
        pictures.append({"id": id, "turn": turn, "image": name})
    writer.finish({"images": pictures})


def take_evenly(items: Sequence[T], number: int) -> list[T]:
    """Return `number` items, evenly apart, with the first and the last one."""
    if len(items) <= number or number == 0:
        return list(items[:number])
    if number == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]

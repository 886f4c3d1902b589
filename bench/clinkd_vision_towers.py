"""Boxes of SLAKE: a blind baseline, and one model from several vision towers at equal steps.

    python bench/clinkd_vision_towers.py --output runs/bench-towers       # clinkd-slake, clinkd-slake-dinov2
    python bench/clinkd_vision_towers.py --output runs/bench-towers --recipes --data SLAKE     # the blind baseline

The baseline without the image answers with the median box of the name and the modality in the training dialogues of the
teacher or of the students. It has no settings to select, so it is also measured on test images. The models are the
stage `teacher` of each recipe, measured on validation images, some of which select the checkpoint. Accuracy counts the
reference boxes that an answer's best box meets with an IoU above 0.5; the mean IoU is over reference boxes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import preceptor
from preceptor.data.grounding.box_formats import find_boxes, find_references
from preceptor.data.grounding.boxes import iou
from preceptor.data.types import Dialogue
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.evaluate import answer_greedily
from preceptor.grounding.model import GroundedVlm
from preceptor.pipeline.run_dir import model_folder
from preceptor.tasks import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["clinkd-slake", "clinkd-slake-dinov2"])
    parser.add_argument("--data", help="folder of SLAKE; default: PRECEPTOR_DATA")
    parser.add_argument("--epochs", type=float, default=6)
    args = parser.parse_args()
    settings = [f"data.root={args.data}"] if args.data else []
    recipe = load_recipe("clinkd-slake", settings)
    assert isinstance(recipe, GroundingRecipe)
    recipe.data.validation_rows = None
    data = read_recipe_dialogues(recipe.data, args.output / "data", needed=())
    for split in ("teacher", "train"):
        known = median_boxes([row for row in data.split(split) if row.task == "vg"])
        for part in ("test", "validation"):
            asked = [row for row in data.split(part) if row.task == "vg"]  # type: ignore[arg-type]
            show(f"blind, boxes of {split}, {part} images", asked, [known.get(name_of(row), "") for row in asked])
    for name in args.recipes:
        run = preceptor.train(
            name,
            [
                *settings,
                "stages=[teacher]",
                "data.test_rows=1",
                f"teacher.train.epochs={args.epochs}",
                f"output={args.output / name}",
            ],
        )
        vlm = GroundedVlm.load(model_folder(run.folder)).requires_grad_(False)
        rows, _ = answer_greedily(vlm, asked, recipe.answers)
        show(name, asked, [row["prediction"] for row in rows])


def name_of(row: Dialogue) -> tuple[str, ...]:
    return (row.modality, *find_references(row.turns[-1][0]))


def median_boxes(rows: Sequence[Dialogue]) -> dict[tuple[str, ...], str]:
    """Return an answer for each modality and name: the median of each coordinate over all boxes."""
    boxes = defaultdict(list)
    for row in rows:
        boxes[name_of(row)] += [found.box for found in find_boxes(row.turns[-1][1])]
    return {key: "({:.0f},{:.0f}),({:.0f},{:.0f})".format(*np.median(found, axis=0)) for key, found in boxes.items()}


def show(title: str, rows: Sequence[Dialogue], answers: Sequence[str]) -> None:
    best = []
    for row, answer in zip(rows, answers, strict=True):
        said = [found.box for found in find_boxes(answer) if found.box is not None]
        best += [max((iou(found.box, box) for box in said), default=0.0) for found in find_boxes(row.turns[-1][1])]
    accuracy = 100 * np.mean([value > 0.5 for value in best])
    print(f"{title}: {len(best)} boxes, accuracy@0.5 {accuracy:.1f} %, mean IoU {np.mean(best):.3f}", flush=True)


if __name__ == "__main__":
    main()

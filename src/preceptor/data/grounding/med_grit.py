"""Med-GRIT-270k (BiRD, Huang et al. 2024): dialogues with boxes about images of SAM-Med2D.

A record is ``{"id": image name without .png, "conversations": [[question, answer], ...]}``. Its task is not written in
it; it follows from where the boxes stand. Its modality is the split of the image name before the first underscore.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.data.grounding.boxes import Policy, apply_to_turns, find_boxes
from preceptor.data.images import require_images
from preceptor.data.texts import read_text
from preceptor.data.types import Dialogue, GroundingDataset, GroundingTask, Split
from preceptor.errors import UserError

MODALITIES = ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")
NAME_WORDS = 6
"""An answer of more words than this to a question about a box describes it; a shorter one names it."""


def read_med_grit(
    files: dict[Split, Path], images: Path, *, boxes: Policy = "refuse", require: bool = True
) -> GroundingDataset:
    """Read one JSON file per split; the images lie in `images` as ``ID.png``.

    `boxes` says what happens to a row with a faulty box (`data.boxes.apply_policy`). Without `require` images may be
    missing.

    Raises:
        UserError: a file, record or box that is wrong, with its place.
    """
    faults: Counter[str] = Counter()
    faulty: list[str] = []
    dialogues: list[Dialogue] = []
    places: dict[Path, str] = {}
    dropped = 0
    for split, file in files.items():
        for number, record in enumerate(_records(file)):
            place = f"{file}, record {number}"
            name, turns = _turns(record, place)
            kept = apply_to_turns(turns, boxes, place, faults, faulty)
            if kept is None:
                dropped += 1
                continue
            image = images / f"{name}.png"
            places.setdefault(image, place)
            dialogues.append(
                Dialogue(f"{split}-{number}", (image,), kept, task_of(kept), modality_of(name), name, split)
            )
    if require:
        require_images(places)
    data = GroundingDataset("med-grit", "given", images, dialogues, faults=dict(faults), faulty=faulty)
    if dropped:
        data.notes.append(
            f"{dropped} of {dropped + len(dialogues)} records with faulty boxes were left out ({dict(faults)})."
        )
    return data


SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "validation": ("validation.json", "val.json"),
    "test": ("test.json",),
}
"""What the file of each split may be called."""


def read_med_grit_folder(root: Path, images: Path | None = None, *, boxes: Policy = "refuse") -> GroundingDataset:
    """Read the splits that a folder holds (`PARTS`); images lie in `images`, by default in images/ or beside the files.

    Raises UserError where the folder holds none of them, and as `read_med_grit`.
    """
    there = {split: root / name for split, names in SPLITS.items() for name in names if (root / name).is_file()}
    if not there:
        raise UserError(f"{root} holds no train.json, validation.json or test.json; name the files of Med-GRIT so")
    if images is None:
        images = root / "images" if (root / "images").is_dir() else root
    return read_med_grit(there, images, boxes=boxes)


def task_of(turns: Sequence[tuple[str, str]]) -> GroundingTask:
    """Return the task of a dialogue: vg where an answer holds boxes; else roc or rc where a question does, by the
    length of the answer; else mia."""
    if any(find_boxes(answer) for _, answer in turns):
        return "vg"
    about = [answer for question, answer in turns if find_boxes(question)]
    if about:
        return "roc" if all(len(answer.split()) <= NAME_WORDS for answer in about) else "rc"
    return "mia"


def modality_of(name: str) -> str:
    """Return the modality that an image name begins with, whatever its case."""
    return name.rpartition("/")[2].partition("_")[0].lower()


def _records(file: Path) -> list[Any]:
    try:
        records = json.loads(read_text(file, "save the file with the encoding UTF-8"))
    except ValueError as error:
        raise UserError(f"{file} is broken JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{file} must hold a list of records, at least one")
    return records


def _turns(record: Any, place: str) -> tuple[str, list[list[str]]]:
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or not record["id"].strip():
        raise UserError(f"{place}: it must be an object with the text 'id', the name of its image without .png")
    if Path(record["id"]).is_absolute() or ".." in Path(record["id"]).parts:
        raise UserError(f"{place}: id {record['id']!r} leads out of the folder of images")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        raise UserError(f"{place}: 'conversations' must be a list of pairs [question, answer], no text empty")
    return record["id"], turns


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) and t.strip() for t in turn)

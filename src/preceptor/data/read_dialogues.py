"""Dialogues by the name that a command gives: a public data set, a file of one's own, or a folder of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from preceptor.data.boxes import Policy
from preceptor.data.med_grit import modality_of, read_med_grit
from preceptor.data.read import IMAGE_ENDINGS
from preceptor.data.sharegpt import read_sharegpt
from preceptor.data.slake_grounding import read_slake_grounding
from preceptor.errors import UserError, nearest
from preceptor.types import Dialogue, DialogueData, Part

FOLDERS = {"slake-grounding": "slake", "med-grit": "med_grit"}
"""The folder of each data set under PRECEPTOR_DATA."""


def read_dialogues(
    name: str,
    root: Path | None = None,
    *,
    questions: Sequence[str] = (),
    boxes: Policy = "refuse",
) -> DialogueData:
    """Read dialogues, labelled or not.

    Args:
        name: `slake-grounding` or `med-grit` (train.json, validation.json, test.json, and the images in images/ or
            beside them); a .json or .jsonl file as `read_sharegpt` reads it, where answers may be missing; or a folder
            of images, about each of which `questions` are asked, in one dialogue.
        root: folder of a named data set, by default its folder under PRECEPTOR_DATA; of a file the folder of its
            images, by default its own.
        boxes: what happens to a row with a faulty box (`data.boxes.apply_policy`).

    Raises:
        UserError: the name is nothing of these, and as the readers.
    """
    path = Path(name)
    if name in READERS:
        return READERS[name](root or _shared(name), boxes)
    if path.suffix.lower() in (".json", ".jsonl"):
        if not path.is_file():
            raise UserError(f"there is no file {path}; give a .json or .jsonl file of dialogues")
        return read_sharegpt(path, root, boxes=boxes, answered=False)
    if path.is_dir():
        return _read_images(path, questions)
    raise UserError(f"{name!r} is no data set, .json or .jsonl file, or folder of images{nearest(name, READERS)}")


def _slake(root: Path, boxes: Policy) -> DialogueData:
    return read_slake_grounding(root)


def _med_grit(root: Path, boxes: Policy) -> DialogueData:
    parts: dict[Part, Path] = {part: root / f"{part}.json" for part in get_args(Part) if part != "unlabelled"}
    there = {part: file for part, file in parts.items() if file.is_file()}
    if not there:
        raise UserError(f"{root} holds no train.json, validation.json or test.json; name the files of Med-GRIT so")
    images = root / "images"
    return read_med_grit(there, images if images.is_dir() else root, boxes=boxes)


READERS: dict[str, Callable[[Path, Policy], DialogueData]] = {"slake-grounding": _slake, "med-grit": _med_grit}


def _shared(name: str) -> Path:
    if shared := os.environ.get("PRECEPTOR_DATA"):
        return Path(shared) / FOLDERS[name]
    raise UserError(f"{name} needs --root FOLDER, or PRECEPTOR_DATA set to the folder above {FOLDERS[name]}/")


def _read_images(folder: Path, questions: Sequence[str]) -> DialogueData:
    if not questions:
        raise UserError(f"{folder} is a folder of images: say what to ask about each, with --question TEXT")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
    if not found:
        raise UserError(f"the folder {folder} holds no image files ({', '.join(IMAGE_ENDINGS)})")
    turns = tuple((question, "") for question in questions)
    dialogues = [
        Dialogue(name, (file,), turns, "mia", modality_of(file.stem), name, "unlabelled")
        for file in found
        for name in [file.relative_to(folder).as_posix()]
    ]
    return DialogueData(folder.name, "unlabelled", folder, dialogues)

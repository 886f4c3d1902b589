"""Dialogues by the name that a command gives: a public data set, a file of one's own, or a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from preceptor.data.grounding.boxes import Policy
from preceptor.data.grounding.med_grit import modality_of, read_med_grit_folder
from preceptor.data.grounding.sharegpt import read_sharegpt
from preceptor.data.grounding.slake import read_slake_grounding
from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.errors import UserError, nearest
from preceptor.vqa.data import FOLDERS, IMAGE_ENDINGS, shared_folder


def read_dialogues(
    name: str,
    root: Path | None = None,
    *,
    questions: Sequence[str] = (),
    boxes: Policy = "refuse",
) -> GroundingDataset:
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
        return READERS[name](root or shared_folder(name, FOLDERS[name]), boxes)
    if path.suffix.lower() in (".json", ".jsonl"):
        if not path.is_file():
            raise UserError(f"there is no file {path}; give a .json or .jsonl file of dialogues")
        return read_sharegpt(path, root, boxes=boxes, answered=False)
    if path.is_dir():
        return read_images(path, questions)
    raise UserError(f"{name!r} is no data set, .json or .jsonl file, or folder of images{nearest(name, READERS)}")


def _slake(root: Path, boxes: Policy) -> GroundingDataset:
    return read_slake_grounding(root)


def _med_grit(root: Path, boxes: Policy) -> GroundingDataset:
    return read_med_grit_folder(root, boxes=boxes)


READERS: dict[str, Callable[[Path, Policy], GroundingDataset]] = {"slake-grounding": _slake, "med-grit": _med_grit}


def read_images(folder: Path, questions: Sequence[str]) -> GroundingDataset:
    """Read the images of a folder, and of folders in it, as dialogues that ask the questions about each; ids are names.

    Raises UserError where there is no question or no image.
    """
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
    return GroundingDataset(folder.name, "unlabelled", folder, dialogues)

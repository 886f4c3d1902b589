"""Read dialogues by the name that a command is given: a public data set, a file, or a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from preceptor.data.grounding.box_policy import Policy
from preceptor.data.grounding.med_grit import modality_of, read_med_grit_folder
from preceptor.data.grounding.sharegpt import read_sharegpt
from preceptor.data.grounding.slake import read_slake_grounding
from preceptor.data.image_folder import find_images
from preceptor.data.locations import data_folder
from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.errors import UserError, nearest


def read_dialogues(
    name: str,
    root: Path | None = None,
    *,
    questions: Sequence[str] = (),
    boxes: Policy = "refuse",
    box_format: str = "auto",
) -> GroundingDataset:
    """Read dialogues with or without answers.

    Args:
        name: One of

            - `slake-grounding` or `med-grit` (a folder with train.json, validation.json, test.json, and the images next
              to them or in images/);
            - a .json or .jsonl file in the format of `read_sharegpt`, whose answers may be missing;
            - a folder of images. One dialogue per image asks all `questions`.
        root: Folder of a named data set (default: its folder under PRECEPTOR_DATA), or the folder of the images of a
            file (default: the folder of the file).
        boxes: What to do with a row that has a faulty box (see `data.grounding.box_policy.apply_policy`).
        box_format: Format of the boxes in a file (see `read_sharegpt`).

    Raises:
        UserError: `name` is none of these, or a reader refuses the data.
    """
    path = Path(name)
    if name in READERS:
        return READERS[name](data_folder(name, root), boxes)
    if path.suffix.lower() in (".json", ".jsonl"):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a .json or .jsonl file of dialogues")
        return read_sharegpt(path, root, boxes=boxes, box_format=box_format, answered=False)
    if path.is_dir():
        return read_images(path, questions)
    raise UserError(f"{name!r} is not a data set, a .json or .jsonl file or a folder of images{nearest(name, READERS)}")


READERS: dict[str, Callable[[Path, Policy], GroundingDataset]] = {
    "slake-grounding": lambda root, boxes: read_slake_grounding(root),
    "med-grit": lambda root, boxes: read_med_grit_folder(root, boxes=boxes),
}


def read_images(folder: Path, questions: Sequence[str]) -> GroundingDataset:
    """Return one dialogue per image in a folder and its subfolders. Each asks all questions.

    The ids are the relative paths of the images.

    Raises:
        UserError: there is no question or no image.
    """
    if not questions:
        raise UserError(f"{folder} is a folder of images; give the questions to ask about each with --question TEXT")
    turns = tuple((question, "") for question in questions)
    files, findings = find_images(folder)
    dialogues = [
        Dialogue(name, (file,), turns, "mia", modality_of(file.stem), name, "unlabelled")
        for file in files
        for name in [file.relative_to(folder).as_posix()]
    ]
    data = GroundingDataset(folder.name, "unlabelled", folder, dialogues)
    data.findings += findings
    return data

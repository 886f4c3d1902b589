"""Read Med-GRIT-270k (BiRD, Huang et al. 2024): dialogues with boxes about images of SAM-Med2D.

A record is ``{"id": image name without .png, "conversations": [[question, answer], ...]}``. The task of a record is
inferred from the positions of its boxes, and its modality is the image name up to the first underscore. Boxes are in
thousandths of the width and height of the image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.grounding.box_detection import Sizes, doubt_thousandths
from preceptor.data.grounding.box_formats import BOX_FORMATS, Size, WrittenBox, find_boxes, written_boxes
from preceptor.data.grounding.box_policy import Policy, apply_to_turns, require_inside, require_unit
from preceptor.data.grounding.image_marks import place_images
from preceptor.data.groups import group_by_content
from preceptor.data.images import ImageError, image_size, require_images
from preceptor.data.locations import data_folder
from preceptor.data.splits import cut
from preceptor.data.texts import AS_RELEASED, read_json
from preceptor.data.types import Dialogue, GroundingDataset, GroundingTask, Split
from preceptor.errors import UserError

MODALITIES = ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")
UNKNOWN = "unknown"
"""Modality of an image whose name does not begin with one."""
NAME_WORDS = 6
"""Answers about a box with at most this number of words are names, longer ones are descriptions."""
UNUSUAL_MODALITIES, IMAGES_PER_MODALITY = 4, 4
"""Number of modalities outside `MODALITIES`, and images for each, from which they are names of something else."""
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_FORMAT = BOX_FORMATS["bird"]
_UNIT = "write boxes in thousandths of the width and height of their image, the unit of Med-GRIT"


def read_med_grit(
    files: dict[Split, Path], images: Path, *, boxes: Policy = "refuse", require: bool = True
) -> GroundingDataset:
    """Read one JSON file per split.

    Args:
        files: File of each split.
        images: Folder of the images ``ID.png``.
        boxes: What to do with a row that has a faulty box (see `data.grounding.box_policy.apply_policy`).
        require: Whether all images must exist.

    Raises:
        UserError: a file, record or box is invalid, or the boxes are not in thousandths. The message names the place.
    """
    faults: Counter[str] = Counter()
    faulty: list[str] = []
    dialogues: list[Dialogue] = []
    places: dict[Path, str] = {}
    other_boxes: list[str] = []
    boxes_read: list[tuple[WrittenBox, str, Sizes]] = []
    sizes_of = cache(_sizes)
    dropped = 0
    for split, file in files.items():
        records = [
            (place, *_turns(record, place))
            for number, record in enumerate(_records(file))
            for place in [f"{file}, record {number}"]
        ]
        for place, name, turns in records:
            written = [box for turn in turns for text in turn for box in written_boxes(text)]
            read = [box for box in written if box.marked or box.syntax == "corners"]
            other_boxes += [place] if len(read) < len(written) else []
            require_unit(read, _FORMAT, place, _UNIT)
            boxes_read += [(box, place, partial(sizes_of, images / f"{name}.png")) for box in read]
        texts = (text for *_, turns in records for turn in turns for text in turn)
        require_inside(texts, _FORMAT.name, str(file), _UNIT)
        for number, (place, name, turns) in enumerate(records):
            checked_turns = apply_to_turns(turns, boxes, place, faults, faulty)
            if checked_turns is None:
                dropped += 1
                continue
            image = images / f"{name}.png"
            places.setdefault(image, place)
            dialogues.append(
                Dialogue(
                    f"{split}-{number}",
                    (image,),
                    checked_turns,
                    task_of(checked_turns),
                    modality_of(name),
                    name,
                    split,
                    tags=INFERRED,
                )
            )
    if require:
        require_images(places, images)
    data = GroundingDataset("med-grit", "given", images, dialogues, faults=dict(faults), faulty=faulty)
    if other_boxes:
        reason = (
            f"{len(other_boxes)} records contain numbers that may be boxes, but are not written as <box>(x1,y1),(x2,y2)"
            f"</box>, such as {other_boxes[0]}; they are read as text. Read such a file with data.name=sharegpt"
        )
        data.findings.append(Finding((), None, reason, "warning"))
    if doubt := doubt_thousandths(boxes_read):
        reason = f"the boxes are read in thousandths, but {doubt}; {_UNIT}"
        data.findings.append(Finding((), None, reason, "warning"))
    data.findings += modality_findings(dialogues)
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
"""Possible names of the file of each split."""


def read_med_grit_folder(root: Path, images: Path | None = None, *, boxes: Policy = "refuse") -> GroundingDataset:
    """Read the splits of a folder (see `SPLITS`). By default the images are in images/ or next to the files.

    Raises:
        UserError: the folder has no file of a split, or `read_med_grit` refuses the data.
    """
    files = {split: root / name for split, names in SPLITS.items() for name in names if (root / name).is_file()}
    if not files:
        raise UserError(f"{root} contains no train.json, validation.json or test.json; rename the files of Med-GRIT")
    if images is None:
        images = root / "images" if (root / "images").is_dir() else root
    return read_med_grit(files, images, boxes=boxes)


def task_of(turns: Sequence[tuple[str, str]]) -> GroundingTask:
    """Infer the task of a dialogue.

    It is vg if an answer contains boxes. Otherwise, if a question contains boxes, it is roc for short answers and rc
    for long ones. Otherwise it is mia. Chinese and Japanese have no spaces, so two of their characters count as one
    word.
    """
    if any(find_boxes(answer) for _, answer in turns):
        return "vg"
    answers = [answer for question, answer in turns if find_boxes(question)]
    if answers:
        words = (len(answer.split()) + len(_CJK.findall(answer)) / 2 for answer in answers)
        return "roc" if all(count <= NAME_WORDS for count in words) else "rc"
    return "mia"


INFERRED: Mapping[str, str] = {"task": "inferred"}
"""Tags of a dialogue whose task the file does not name: `task_of` has inferred it from all of its turns."""


def task_of_turn(dialogue: Dialogue, number: int) -> GroundingTask:
    """Return the task of a question of a dialogue, from 0: the task that the file names, else that of the turn."""
    return task_of([dialogue.turns[number]]) if is_inferred(dialogue) else dialogue.task


def is_inferred(dialogue: Dialogue) -> bool:
    """Return whether the task of a dialogue was inferred from its turns, because the file does not name it."""
    return dialogue.tags.get("task") == INFERRED["task"]


def modality_of(name: str) -> str:
    """Return the modality at the beginning of an image name, up to the first underscore, in lower case."""
    modality, underscore, _ = name.rpartition("/")[2].partition("_")
    return modality.lower() if modality and underscore else UNKNOWN


def modality_findings(dialogues: Sequence[Dialogue]) -> list[Finding]:
    """Return a warning if there are so many modalities that they must be names of something else, such as patients."""
    images = {row.images for row in dialogues}
    unusual = {row.modality for row in dialogues} - {*MODALITIES, UNKNOWN}
    if len(unusual) < UNUSUAL_MODALITIES or IMAGES_PER_MODALITY * len(unusual) <= len(images):
        return []
    reason = (
        f"{len(images)} images have {len(unusual)} modalities that are not known, so that mean scores over modalities "
        "are those of single images; begin the names of the images with their modality and _, or, for data.name="
        "sharegpt, give every record a modality"
    )
    return [Finding((), None, reason, "warning")]


def _records(file: Path) -> list[Any]:
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise UserError(f"{file} must be a non-empty list of records; {AS_RELEASED}")
    return records


def _sizes(image: Path) -> tuple[Size, ...] | None:
    try:
        return (image_size(image),)
    except ImageError:
        return None  # training and `doctor` report it


def _turns(record: Any, place: str) -> tuple[str, list[list[str]]]:
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or not record["id"].strip():
        raise UserError(f"{place}: a record must be an object with the string 'id', the name of its image without .png")
    if Path(record["id"]).is_absolute() or ".." in Path(record["id"]).parts:
        raise UserError(f"{place}: id {record['id']!r} leaves the folder of images")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        raise UserError(f"{place}: 'conversations' must be a list of pairs [question, answer] without empty texts")
    return record["id"], place_images(turns, 1, place)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) and t.strip() for t in turn)


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Read the folder of a recipe's data settings; splits without a file are cut from the training images."""
    images = Path(config.images) if config.images else None
    data = read_med_grit_folder(data_folder(config.name, config.root), images, boxes=config.boxes)
    fractions: dict[Split, float] = {"test": config.test_fraction, "validation": config.validation_fraction}
    if not all(data.split(split) for split in fractions):
        data.samples = group_by_content(data.samples)
    for split, fraction in fractions.items():
        if not data.split(split):
            data.samples = cut(data.samples, split, fraction, config.split_seed)
            data.notes.append(
                f"There is no {split}.json, so {fraction:.0%} of the training images form the {split} split."
            )
    return data

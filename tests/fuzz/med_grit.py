"""Med-GRIT-270k, built small in its released layout, against the records that were written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.grounding.med_grit import read_med_grit_folder
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely
from tests.fuzz.outcome import attempt, command, require
from tests.fuzz.question_tables import picture
from tests.fuzz.target import Target

Box = tuple[int, int, int, int]

NAMES = ("ct_00--case1", "mr_t1--p2_x", "x_ray--7", "ultrasound--a")
FILES = {"train": "train.json", "validation": "val.json", "test": "test.json"}
BOX = st.tuples(st.integers(0, 480), st.integers(0, 480), st.integers(500, 1000), st.integers(500, 1000))
ODD_BOX = st.tuples(*[st.integers(-50, 1200)] * 4)
TEXTS = st.sampled_from(["the liver", "A large bright organ on the left side of the body.", "It is a CT.", "肝"])


@dataclass(frozen=True)
class MedGritInput:
    """Records of each split as (image, ((question, answer), ...)), an odd value, and damage to the training file."""

    splits: tuple[tuple[tuple[str, tuple[tuple[Any, Any], ...]], ...], ...]
    policy: str
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    missing_image: bool
    by_command: bool


PIECE = st.tuples(TEXTS, mostly(st.none(), mostly(BOX, ODD_BOX), 2))
TURNS = st.lists(st.tuples(PIECE, PIECE), min_size=1, max_size=2).map(tuple)
RECORDS = st.lists(st.tuples(st.sampled_from(NAMES), TURNS), min_size=1, max_size=3).map(tuple)
INPUTS = st.builds(
    MedGritInput,
    splits=st.tuples(RECORDS, RECORDS, RECORDS),
    policy=st.sampled_from(["refuse", "repair", "drop"]),
    replaced=mostly(st.none(), st.tuples(st.integers(1, 30), json_values()), 3),
    mutations=DAMAGE,
    missing_image=rarely(12),
    by_command=rarely(40),
)


def text_of(piece: tuple[str, Box | None]) -> str:
    words, box = piece
    return words if box is None else f"<ref>{words}</ref><box>({box[0]},{box[1]}),({box[2]},{box[3]})</box>"


def is_valid(box: Box) -> bool:
    return 0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000


def clipped(box: Box) -> Box | None:
    """Return the box with sorted corners, clipped to the image; None if nothing remains."""
    (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
    found = (max(0, x0), max(0, y0), min(1000, x1), min(1000, y1))
    return found if found[0] < found[2] and found[1] < found[3] else None


def check(case: MedGritInput, folder: Path) -> bool:
    """Read the splits with a policy for faulty boxes, and compare texts, boxes and splits with the records."""
    (folder / "images").mkdir()
    for number, name in enumerate(NAMES):
        if number or not case.missing_image:
            (folder / "images" / f"{name}.png").write_bytes(picture(number))
    for split, records in zip(FILES, case.splits, strict=True):
        content: Any = [
            {"id": name, "conversations": [[text_of(question), text_of(answer)] for question, answer in turns]}
            for name, turns in records
        ]
        if case.replaced is not None and split == "train":
            content = replace_nested(content, *case.replaced)
        data = json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")
        (folder / FILES[split]).write_bytes(mutate(data, case.mutations) if split == "train" else data)
    if case.by_command:
        data_keys = (f"data.root={folder}", "data.name=med-grit")
        return command("doctor", "clinkd-demo", *data_keys).accepted
    outcome = attempt(lambda: read_med_grit_folder(folder, boxes=case.policy), place=folder.name)  # type: ignore[arg-type]
    if not outcome.accepted:
        return False
    for dialogue in outcome.value.samples:
        for box in (box.box for turn in dialogue.turns for text in turn for box in find_boxes(text)):
            require(box is not None and is_valid(box), "a box outside the image was read", box)  # type: ignore[arg-type]
    if case.mutations or case.replaced is not None:
        return True
    compare(case, outcome.value, folder)
    return True


def compare(case: MedGritInput, data: Any, folder: Path) -> None:
    """Raise Wrong unless the dialogues are those of the records that the policy keeps."""
    kept = []
    for split, records in zip(FILES, case.splits, strict=True):
        for name, turns in records:
            boxes = [piece[1] for turn in turns for piece in turn if piece[1] is not None]
            faulty = [box for box in boxes if not is_valid(box)]
            require(not faulty or case.policy != "refuse", "a faulty box was read", faulty)
            if not faulty or (case.policy == "repair" and all(map(clipped, faulty))):
                require(not case.missing_image or name != NAMES[0], "a missing image", name)
                kept.append((split, name, turns))
    require(len(data.samples) == len(kept), "another number of dialogues", (len(data.samples), len(kept)))
    for dialogue, (split, name, turns) in zip(data.samples, kept, strict=True):
        found = (dialogue.split, dialogue.images, dialogue.modality, len(dialogue.turns))
        modality = name.partition("_")[0].lower() if "_" in name else "unknown"
        wanted = (split, (folder / "images" / f"{name}.png",), modality, len(turns))
        require(found == wanted, "another dialogue", (found, wanted))
        for texts, pieces in zip(dialogue.turns, turns, strict=True):
            for text, (words, box) in zip(texts, pieces, strict=True):
                require(words in text, "another text", text)
                boxes = [one.box for one in find_boxes(text)]
                wanted_boxes = [] if box is None else [box if is_valid(box) else clipped(box)]
                require(boxes == wanted_boxes, "another box", (boxes, wanted_boxes))
        in_answer = any(answer[1] is not None for _, answer in turns)
        require((dialogue.task == "vg") == in_answer, "another task", dialogue.task)
    told = bool(data.notes) or case.policy != "drop" or len(kept) == sum(map(len, case.splits))
    require(told, "dialogues were left out without a word")


TARGET = Target(INPUTS, check, 80)

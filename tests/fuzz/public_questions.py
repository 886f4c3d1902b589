"""VQA-RAD, SLAKE with its boxes, and VQA-Med 2019, built small in their released layout, against the rows written."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from preceptor.data.grounding.slake import read_slake_grounding
from preceptor.data.types import Sample
from preceptor.data.vqa.slake import read_slake
from preceptor.data.vqa.vqa_med_2019 import read_vqa_med_2019
from preceptor.data.vqa.vqa_rad import IMAGES, TABLE, read_vqa_rad
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely, texts
from tests.fuzz.outcome import attempt, command, require
from tests.fuzz.target import Target

QUESTION = st.sampled_from(["Is it large?", "What plane is shown?", "which organ is abnormal?", "肺在哪里？"])  # noqa: RUF001
ANSWER = st.sampled_from(["Yes", "no", "4", "left lung", "axial", "a#b", "肺"])
ODD = st.one_of(texts(), json_values(2))
WIDTH, HEIGHT = 20, 10
"""Size of every image, in pixels."""


@dataclass(frozen=True)
class ReleaseInput:
    """The rows of each table of a release, an odd value in one of them (table, number, value), and damage to bytes."""

    tables: tuple[tuple[Any, ...], ...]
    replaced: tuple[int, int, Any] | None
    damaged: int
    mutations: tuple[Mutation, ...]
    missing_image: bool
    by_command: bool


def releases(*tables: st.SearchStrategy[Any]) -> st.SearchStrategy[ReleaseInput]:
    """Return releases with rows that each of `tables` draws."""
    places = st.integers(0, len(tables) - 1)
    return st.builds(
        ReleaseInput,
        tables=st.tuples(*tables),
        replaced=mostly(st.none(), st.tuples(places, st.integers(0, 70), ODD), 3),
        damaged=places,
        mutations=DAMAGE,
        missing_image=rarely(16),
        by_command=rarely(40),
    )


def is_sound(case: ReleaseInput) -> bool:
    """Return whether the files hold what was drawn, so that the samples can be compared with it."""
    return case.replaced is None and not case.mutations and not case.missing_image


@functools.cache
def image(number: int, kind: str = "JPEG") -> bytes:
    """Return an image file; each number has another content."""
    file = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT), 20 * number).save(file, kind)
    return file.getvalue()


def write_json(case: ReleaseInput, number: int, path: Path) -> None:
    """Write a table as JSON, with the odd value and the damage if they are in this table."""
    content: Any = list(case.tables[number])
    if case.replaced is not None and case.replaced[0] == number:
        content = replace_nested(content, case.replaced[1], case.replaced[2])
    data = json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")
    path.write_bytes(mutate(data, case.mutations) if case.damaged == number else data)


def told(data: Any) -> str:
    """Return all notes and findings as one text."""
    return "\n".join([*data.notes, *(finding.reason for finding in data.findings)])


def require_alone(samples: list[Sample], notes: str) -> None:
    """Raise Wrong if an image is in training and in validation: only the test images of a release may be shared."""
    parts = {split: {s.image for s in samples if s.split == split} for split in ("train", "validation")}
    require(not parts["train"] & parts["validation"], "an image is in training and validation", notes)


# --- VQA-RAD ----------------------------------------------------------------------------------------------------------

RAD_SPLITS = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}


@st.composite
def rad_rows(draw: st.DrawFn) -> tuple[dict[str, Any], ...]:
    rows = []
    for number in range(draw(st.integers(8, 12))):
        phrase = "freeform" if number < 6 else draw(st.sampled_from(list(RAD_SPLITS)))
        rows.append(
            {
                "qid": draw(st.sampled_from([number, str(number)])),
                "phrase_type": phrase,
                "qid_linked_id": f"link{draw(st.integers(0, 20))}",
                "image_name": f"synpic{draw(st.integers(0, 7))}.jpg",
                "image_organ": draw(st.sampled_from(["CHEST", "HEAD", "ABD"])),
                "question": draw(QUESTION),
                "question_frame": draw(st.sampled_from(["NULL", None, "Is the thing large?", "Is/Are it there?"])),
                "question_type": draw(st.sampled_from(["PRES", "PRES, POS", "ATRIB"])),
                "answer": draw(st.one_of(ANSWER, st.sampled_from([4, 2.5]))),
                "answer_type": draw(st.sampled_from(["OPEN", "CLOSED", "CLOSED "])),
            }
        )
    return tuple(rows)


def check_rad(case: ReleaseInput, folder: Path) -> bool:
    """Read VQA-RAD in two variants; the rows of the release are in both, the frames of test rows in one only."""
    (folder / IMAGES).mkdir()
    for number in range(case.missing_image, 8):
        (folder / IMAGES / f"synpic{number}.jpg").write_bytes(image(number))
    write_json(case, 0, folder / TABLE)
    if case.by_command:
        return command("doctor", "mhkd-vqa-rad", f"data.root={folder}").accepted
    found = {v: attempt(lambda v=v: read_vqa_rad(folder, variant=v), place=folder.name) for v in ("clean", "published")}
    if not all(outcome.accepted for outcome in found.values()):
        return False
    names = {row["image_name"] for row in case.tables[0]}
    require(not case.missing_image or "synpic0.jpg" not in names or case.mutations or case.replaced, "no image")
    if not is_sound(case):
        return True
    for variant, outcome in found.items():
        samples = {sample.id: sample for sample in outcome.value.samples}
        require_alone(outcome.value.samples, told(outcome.value))
        test = set()
        for row in case.tables[0]:
            sample = samples.get(str(row["qid"]))
            require(sample is not None, "a row is missing", row["qid"])
            assert sample is not None
            test |= {sample.id} if RAD_SPLITS[row["phrase_type"]] == "test" else set()
            require((sample.split == "test") == (RAD_SPLITS[row["phrase_type"]] == "test"), "another split", row)
            require(sample.question == " ".join(row["question"].split()), "another question", sample.question)
            require(sample.answers == (str(row["answer"]),), "another answer", sample.answers)
            require(sample.image.name == row["image_name"], "another image", sample.image)
            require(sample.answer_type == row["answer_type"].strip().lower(), "another answer type", row)
        frames = {id.removesuffix("-frame") for id in samples if id.endswith("-frame")}
        framed = {str(row["qid"]) for row in case.tables[0] if row["question_frame"] not in ("NULL", None)}
        require(frames <= framed and len(samples) == len(case.tables[0]) + len(frames), "other frames", frames)
        require(variant == "published" or not frames & test, "a frame of a test row is used", frames & test)
        require(variant == "clean" or frames == framed, "a frame is missing", framed - frames)
    return True


# --- SLAKE ------------------------------------------------------------------------------------------------------------

MODALITIES = ("CT", "MRI", "X-Ray")
ORGANS = ("Liver", "Left Lung", "Lung Cancer")
CORNER = st.integers(0, 12)


@st.composite
def slake_rows(draw: st.DrawFn, first: int, images: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
    """Return rows about some images; the ids begin at `first`."""
    rows = []
    for number in range(draw(st.integers(2, 4))):
        name = draw(st.sampled_from(images))
        rows.append(
            {
                "img_id": name,
                "img_name": f"xmlab{name}/source.jpg",
                "question": draw(QUESTION),
                "answer": draw(ANSWER) if number else "Yes",
                "q_lang": draw(st.sampled_from(["en", "en", "zh"])) if number else "en",
                "location": "Abdomen",
                "modality": draw(st.sampled_from(MODALITIES)),
                "answer_type": draw(st.sampled_from(["OPEN", "CLOSED"])),
                "base_type": "vqa",
                "content_type": draw(st.sampled_from(["Organ", "Modality"])),
                "triple": ["vhead", "_", "_"],
                "qid": first + number,
            }
        )
    return tuple(rows)


SLAKE_FILES = ("train.json", "validate.json", "test.json")
SLAKE_SPLITS = ("train", "validation", "test")
BOX_ROWS = st.lists(
    st.tuples(st.sampled_from(ORGANS), st.tuples(CORNER, CORNER, st.integers(1, 12), st.integers(1, 12))).map(
        lambda pair: {pair[0]: [float(side) for side in pair[1]]}
    ),
    max_size=3,
).map(tuple)


def check_slake(case: ReleaseInput, folder: Path) -> bool:
    """Read the questions and the boxes of SLAKE, and compare both with the rows; the last table is the boxes."""
    for number in range(6):
        place = folder / "imgs" / f"xmlab{number}"
        place.mkdir(parents=True)
        if number or not case.missing_image:
            (place / "source.jpg").write_bytes(image(number))
        if number < 2:
            write_json(case, 3, place / "detection.json")
        else:
            (place / "detection.json").write_text("[]")  # every released image has the file
    for number, name in enumerate(SLAKE_FILES):
        write_json(case, number, folder / name)
    if case.by_command:
        return command("doctor", "clinkd-slake", f"data.root={folder}").accepted
    questions = attempt(lambda: read_slake(folder, language="both", variant="published"), place=folder.name)
    boxes = attempt(lambda: read_slake_grounding(folder), place=folder.name)
    english = attempt(lambda: read_slake(folder, language="en"), place=folder.name)  # the boxes have no other language
    require(english.accepted or not boxes.accepted, "boxes of questions that are refused", english.sentence)
    if not (questions.accepted and is_sound(case)):
        return questions.accepted and boxes.accepted
    samples = {sample.id: sample for sample in questions.value.samples}
    rows = [(row, split) for table, split in zip(case.tables, SLAKE_SPLITS, strict=False) for row in table]
    require(len(samples) == len(rows), "another number of questions", len(samples))
    for row, split in rows:
        sample = samples[str(row["qid"])]
        wanted = (row["question"], (row["answer"],), split, row["answer_type"].lower(), row["q_lang"])
        found = (sample.question, sample.answers, sample.split, sample.answer_type, sample.tags["language"])
        require(found == wanted, "another row", (found, wanted))
        require(sample.image == folder / "imgs" / row["img_name"], "another image", sample.image)
    require(boxes.accepted, "sound boxes are refused", boxes.sentence)
    compare_boxes(case, boxes.value)
    return True


def compare_boxes(case: ReleaseInput, data: Any) -> None:
    """Raise Wrong unless the boxes of an organ are those of detection.json, clipped to the image, in thousandths."""
    from preceptor.data.grounding.box_formats import find_boxes

    wanted: dict[str, set[tuple[int, ...]]] = {}
    for entry in case.tables[3]:
        for organ, (x, y, w, h) in entry.items():
            corners = (min(x, WIDTH), min(y, HEIGHT), min(x + w, WIDTH), min(y + h, HEIGHT))
            box = tuple(round(1000 * c / side) for c, side in zip(corners, (WIDTH, HEIGHT) * 2, strict=True))
            if box[0] < box[2] and box[1] < box[3]:
                wanted.setdefault(organ.lower(), set()).add(box)
    rows = {row["img_name"] for table in case.tables[:3] for row in table if row["q_lang"] == "en"}
    asked = bool(rows & {"xmlab0/source.jpg", "xmlab1/source.jpg"})
    found: set[tuple[int, ...]] = set()
    for dialogue in data.samples:
        for _, answer in dialogue.turns:
            if dialogue.task == "vg":
                found |= {tuple(round(c) for c in box.box) for box in find_boxes(answer) if box.box is not None}
    known = set().union(*wanted.values()) if wanted else set()
    require(found <= known, "a box that is not in detection.json", found - known)
    require(not asked or found == known, "a box of detection.json is missing", known - found)


SLAKE_TABLES = (slake_rows(0, (0, 1, 2)), slake_rows(100, (3, 1)), slake_rows(200, (4, 5, 2)), BOX_ROWS)

# --- VQA-Med 2019 -----------------------------------------------------------------------------------------------------

LINES = {
    "modality": "is this a ct scan?",
    "plane": "in what plane is this film?",
    "organ": "what part of the body is being imaged?",
    "abnormality": "is the mri normal?",
}
MED_ANSWER = st.sampled_from(["yes", "no", "axial", "skull and contents", "a#b", "xr - plain film", "a|b", "肺"])


@st.composite
def med_lines(draw: st.DrawFn, key: str) -> tuple[tuple[str, ...], ...]:
    rows = []
    for number in range(draw(st.integers(3, 5))):
        for category in draw(st.lists(st.sampled_from(sorted(LINES)), min_size=1, max_size=2, unique=True)):
            middle = (category,) if key == "test" else ()
            rows.append((f"syn{key}{number}", *middle, LINES[category], draw(MED_ANSWER)))
    return tuple(rows)


def check_med(case: ReleaseInput, folder: Path) -> bool:
    """Read VQA-Med 2019 with its test questions, and compare the samples with the lines."""
    names = ("All_QA_Pairs_train.txt", "All_QA_Pairs_val.txt", "VQAMed2019_Test_Questions_w_Ref_Answers.txt")
    written = list(zip(("train", "validation", "test"), names, case.tables, strict=True))
    for number, (split, name, rows) in enumerate(written):
        place = folder / split
        (place / f"{split}_images").mkdir(parents=True)
        cells = [list(row) for row in rows]
        if case.replaced is not None and case.replaced[0] == number:
            row = cells[case.replaced[1] % len(cells)]
            row[case.replaced[1] % len(row)] = str(case.replaced[2])
        data = "\n".join("|".join(row) for row in cells).encode(errors="surrogatepass")
        (place / name).write_bytes(mutate(data, case.mutations) if case.damaged == number else data)
        for index, shown in enumerate(sorted({row[0] for row in rows})[case.missing_image :]):
            (place / f"{split}_images" / f"{shown}.jpg").write_bytes(image(index + 5 * number % 12))
    if case.by_command:
        return command("doctor", "mhkd-vqa-med-2019", f"data.root={folder}", "data.variant=test").accepted
    outcome = attempt(lambda: read_vqa_med_2019(folder, variant="test"), place=folder.name)
    if not outcome.accepted:
        return False
    require(not case.missing_image or case.mutations or case.replaced, "a missing image")
    if not is_sound(case):
        return True
    rows = [(split, row) for split, _, rows in written for row in rows]
    require(len(outcome.value.samples) == len(rows), "another number of questions", len(outcome.value.samples))
    for sample, (split, row) in zip(outcome.value.samples, rows, strict=True):
        category = next(name for name, text in LINES.items() if text == row[-2])
        wanted = (split, row[0], row[-2], tuple(row[-1].split("#")), category)
        found = (sample.split, sample.image.stem, sample.question, sample.answers, sample.question_type)
        require(found == wanted, "another row", (found, wanted))
    return True


RAD = Target(releases(rad_rows()), check_rad, 40)
SLAKE = Target(releases(*SLAKE_TABLES), check_slake, 30)
MED = Target(releases(*map(med_lines, ("train", "val", "test"))), check_med, 40)

"""Read VQA-RAD (Lau et al., Scientific Data 2018) in its original release, with three variants of its splits.

`note_hub` describes the copy on the Hugging Face hub, which `data.vqa.parquet` reads.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from preceptor.data.findings import Finding
from preceptor.data.groups import shared_contents
from preceptor.data.images import require_images, resolve_image
from preceptor.data.locations import data_folder
from preceptor.data.splits import cut_validation
from preceptor.data.texts import MISSING, as_text, read_json_rows
from preceptor.data.types import AnswerType, Dataset, Sample, Split
from preceptor.data.vqa import parquet
from preceptor.data.vqa.release import released_counts, unused_images
from preceptor.errors import UserError, nearest

Variant = Literal["clean", "published", "no_frames"]

TABLE = "VQA_RAD Dataset Public.json"
IMAGES = "VQA_RAD Image Folder"
# Split of each `phrase_type`. Paraphrased and free-form questions are training rows unless marked as test.
SPLITS: dict[str, Split] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
ANSWER_TYPES: dict[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}
RELEASED_ROWS = 2248
CLOSED_TEST_ROWS = 272
"""Closed ones of the 451 test rows of the release, by its own answer types."""
IMAGE_WITHOUT_QUESTION = "synpic35356.jpg"
"""One of the 315 images of the release."""
KNOWN_ROWS = {
    (1793, 451): "the copy on the hub: the rows of the release without question frames, minus three repeated training "
    "rows and one training row that is also a test row",
    (1797, 451): "the release without question frames, with the four training rows that the copy on the hub lacks",
}
"""What parquet files with these numbers of training and test rows contain. The test rows are those of the release."""
TYPOS = {"PRSE": "PRES", "ATRIB": "ATTRIB"}
NEEDED = (
    "qid",
    "phrase_type",
    "qid_linked_id",
    "image_name",
    "image_organ",
    "question",
    "question_frame",
    "question_type",
    "answer",
    "answer_type",
)
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def read_vqa_rad(
    root: Path,
    *,
    variant: Variant = "clean",
    validation_fraction: float = 0.1,
    validation_by: Literal["image", "question"] = "image",
    seed: int = 0,
) -> Dataset[Sample]:
    """Read VQA-RAD from its folder, or from the folder above it.

    A row may have a `question_frame`: its question as a template, with the same image and answer. Frames that become
    training samples have the id `<qid>-frame` and the tag `phrase_type` = `frame`. All variants have the 451 test rows
    of the release. Their training samples are

    - `published`: the 1,797 training rows and the frames of all rows, including the test rows (3,064 samples). MEVF and
      most later papers use it. It leaks.
    - `no_frames`: the 1,797 training rows.
    - `clean` (the default): the 1,797 training rows and the frames of training rows, except frames whose image and
      question equal those of a test row or of the frame of a test row (ignoring case, punctuation and white space).

    Args:
        root: Folder of the release.
        variant: Variant of the splits.
        validation_fraction: Fraction of the training rows that becomes the validation split.
        validation_by: With `image` all questions about an image move to validation, which measures performance on new
            images. With `question` single questions move, as in the test split of the release: their images stay in
            training; their frames stay in training for `published` only.
        seed: Seed of the validation split.

    In every variant test images are also training images (202 of 203 for `clean` and `no_frames`, all for `published`);
    a note reports the number.

    Raises:
        UserError: the folder is not the release, a row is invalid, images are missing, or the variant is unknown.
    """
    if variant not in get_args(Variant):
        raise UserError(f"VQA-RAD variant {variant!r} is not known{nearest(variant, get_args(Variant))}")
    folder = _release_folder(root)
    rows = read_json_rows(folder / TABLE, NEEDED)
    samples: list[Sample] = []
    frames: list[Sample] = []
    places: dict[Path, str] = {}
    links: defaultdict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        sample = _sample(row, folder)
        samples.append(sample)
        places.setdefault(sample.image, f"qid {sample.id}")
        place = f"{folder / TABLE}: qid {sample.id}"
        if link := _optional(row["qid_linked_id"], f"{place}: qid_linked_id"):
            links[link].append(sample)
        if frame := _optional(row["question_frame"], f"{place}: question_frame"):
            frames.append(_frame(sample, frame))
    repeated = [id for id, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise UserError(f"{folder / TABLE}: qid {repeated[0]!r} occurs twice; take the file as released")
    require_images(places, folder / TABLE)

    test = {sample.id for sample in samples if sample.split == "test"}
    frames_of_test = [frame for frame in frames if frame.id.removesuffix("-frame") in test]
    frames_of_train = [frame for frame in frames if frame.id.removesuffix("-frame") not in test]
    test_keys = {_key(sample) for sample in samples if sample.split == "test"}
    test_keys |= {_key(frame) for frame in frames_of_test}
    clean_frames = [frame for frame in frames_of_train if _key(frame) not in test_keys]

    notes: list[str] = []
    duplicates = sum(sample.split == "train" and _key(sample) in test_keys for sample in samples)
    if variant == "published":
        notes.append(
            f"This split leaks: the question frames of {len(frames_of_test)} of the {len(test)} test questions are "
            "training rows, with the same image and the same answer. Its scores only compare with papers that used it."
        )
        samples += frames_of_train + frames_of_test
    elif variant == "clean":
        notes.append(
            f"Left out of training: the frames of {len(frames_of_test)} test questions, and "
            f"{len(frames_of_train) - len(clean_frames)} frames of training questions that equal a test question or "
            "its "
            "frame and have the same image."
        )
        samples += clean_frames
    shared_images = _note_shared_images(samples)
    notes.insert(0, shared_images)
    if duplicates:
        notes.append(f"In the release, {duplicates} training question(s) equal a test question about the same image.")
    crossing = sum(len({sample.split for sample in linked}) > 1 for linked in links.values())
    if crossing:
        notes.append(f"{crossing} question(s) have paraphrases both in training and in test (qid_linked_id).")
    if validation_by == "image":
        samples = cut_validation(samples, validation_fraction, seed)
    else:
        samples = _cut_questions(samples, validation_fraction, seed, keep_frames=variant == "published")
        notes.append(
            "Validation questions are about training images, as in the test split (data.validation_by=question)."
        )
    data = Dataset("vqa-rad", variant, folder, samples, notes, leaking=variant == "published" or crossing > 0)
    data.findings += [Finding((), None, shared_images, "warning")]
    data.findings += released_counts({folder / TABLE: len(rows)}, {folder / TABLE: RELEASED_ROWS})
    data.findings += unused_images(folder / IMAGES, {*places, folder / IMAGES / IMAGE_WITHOUT_QUESTION})
    return data


def note_hub(data: Dataset[Sample]) -> None:
    """Add notes about the copy of VQA-RAD on the hub (`flaviagiammarino/vqa-rad`).

    According to its card, the copy has the rows of the release without question frames, minus three repeated training
    rows and one that is also a test row: 1,793 training and 451 test rows. It corresponds to the variant `no_frames`:
    shared images are noted, and the data set does not count as leaking. Other numbers of rows are a finding.
    """
    shared_images = _note_shared_images(data.samples)
    data.notes.append(shared_images)
    data.findings.append(Finding((), None, shared_images, "warning"))
    test = [sample for sample in data.samples if sample.split == "test"]
    counts = (len(data.samples) - len(test), len(test))
    rows = "{:,} training and {:,} test rows".format
    if counts in KNOWN_ROWS:
        as_open = CLOSED_TEST_ROWS - sum(sample.answer_type == "closed" for sample in test)
        data.notes.append(
            f"VQA-RAD with {rows(*counts)} is {KNOWN_ROWS[counts]}. Scores of all 451 test questions compare with "
            "those of data.variant=no_frames, and with papers that do not train on question frames."
            + f" Those of open and closed do not: {as_open} of the {CLOSED_TEST_ROWS} closed test questions of the "
            "release count as open, because only yes and no are closed without answer types." * (as_open != 0)
        )
    else:
        reason = (
            f"the parquet files have {rows(*counts)}, but the copy of VQA-RAD on the hub has {rows(1793, 451)}, and "
            f"the release without question frames {rows(1797, 451)}; copy the files again from "
            "flaviagiammarino/vqa-rad, or do not compare the scores with those of VQA-RAD"
        )
        data.findings.append(Finding((), data.root, reason, "warning"))
    data.notes.append(
        "The hub's copy of VQA-RAD has no question frames, so none of them leaks. It does not mark paraphrases, so the "
        "308 free-form test questions cannot be scored separately."
    )
    test_keys = {_key(sample) for sample in test}
    duplicates = sum(sample.split != "test" and _key(sample) in test_keys for sample in data.samples)
    if duplicates:
        data.notes.append(f"{duplicates} training question(s) equal a test question about the same image.")
    triplets = Counter((*_key(sample), sample.answer.lower()) for sample in data.samples if sample.split != "test")
    repeated = triplets.total() - len(triplets)
    if repeated:
        data.notes.append(f"{repeated} training row(s) repeat the image, question and answer of another row.")


def _cut_questions(samples: list[Sample], fraction: float, seed: int, *, keep_frames: bool) -> list[Sample]:
    """Move single questions to validation, as in the test split of the release."""
    frames = {sample.id: sample for sample in samples if sample.id.endswith("-frame")}
    # Each question is its own group. Frames are copies of questions and cannot be chosen.
    questions = [replace(sample, group=sample.id) for sample in samples if sample.id not in frames]
    chosen = {sample.id for sample in cut_validation(questions, fraction, seed) if sample.split == "validation"}
    moved = [replace(sample, split="validation") if sample.id in chosen else sample for sample in samples]
    if keep_frames:
        return moved
    held_out = {_key(sample) for sample in samples if sample.id in chosen}
    held_out |= {_key(frames[f"{name}-frame"]) for name in chosen if f"{name}-frame" in frames}
    return [sample for sample in moved if not (sample.id in frames and _key(sample) in held_out)]


def _release_folder(root: Path) -> Path:
    content = f"{TABLE!r} and {IMAGES!r}"
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give the VQA-RAD folder, which contains {content}")
    found = [root] if (root / TABLE).is_file() else sorted(table.parent for table in root.glob(f"*/{TABLE}"))
    if len(found) != 1:
        state = "no VQA-RAD release" if not found else f"{len(found)} VQA-RAD releases"
        raise UserError(f"{root} contains {state}; give the folder that contains {content}, as the authors released it")
    if not (found[0] / IMAGES).is_dir():
        raise UserError(f"{found[0]} lacks the folder {IMAGES!r}; the VQA-RAD folder must contain {content}")
    return found[0]


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    place = f"{folder / TABLE}: qid {row['qid']!r}"

    def cell(name: str, read: Callable[[Any, str], str] = _text) -> str:
        return read(row[name], f"{place}: {name}")

    question, answer, phrase = cell("question"), cell("answer"), cell("phrase_type")
    kind = cell("answer_type").upper()
    if not (cell("qid") and question and answer):
        raise UserError(f"{place}: the id, the question or the answer is missing; fill it in or delete the entry")
    if phrase not in SPLITS:
        raise UserError(f"{place}: phrase_type {phrase!r} is not known{nearest(phrase, SPLITS)}")
    if kind not in ANSWER_TYPES:
        raise UserError(f"{place}: answer_type {kind!r} is not known{nearest(kind, ANSWER_TYPES)}")
    name = cell("image_name")
    return Sample(
        id=cell("qid"),
        image=resolve_image(folder / IMAGES, name, place),
        question=question,
        answers=(answer,),
        answer_type=ANSWER_TYPES[kind],
        group=name,
        split=SPLITS[phrase],
        question_type=_question_type(cell("question_type", _optional)),
        tags={"phrase_type": phrase, "image_organ": cell("image_organ", _optional).upper()},
    )


def _frame(sample: Sample, question: str) -> Sample:
    return Sample(
        id=f"{sample.id}-frame",
        image=sample.image,
        question=question,
        answers=sample.answers,
        answer_type=sample.answer_type,
        group=sample.group,
        split="train",
        question_type=sample.question_type,
        tags={**sample.tags, "phrase_type": "frame"},
    )


def _text(value: Any, place: str) -> str:
    """Return a cell as text. Some cells are integers, NULL is a missing value, and tabs and double spaces are typos."""
    text = " ".join(as_text(value, place).split())
    return "" if text == "NULL" else text


def _optional(value: Any, place: str) -> str:
    """Return the text of a cell that may be missing. Other programs save its NULL as None, which may be an answer."""
    text = _text(value, place)
    return "" if text.lower() in MISSING else text


def _question_type(text: str) -> str:
    kinds = {kind.strip().upper() for kind in text.split(",")} - {""}
    return ", ".join(sorted({TYPOS.get(kind, kind) for kind in kinds}))


def _key(sample: Sample) -> tuple[str, str]:
    """Return image and normalised question, which identify duplicates."""
    return sample.group, " ".join(sample.question.lower().translate(_PUNCTUATION).split())


def _note_shared_images(samples: list[Sample]) -> str:
    same = shared_contents(samples)
    test = {same.get(sample.image, sample.image) for sample in samples if sample.split == "test"}
    shared = test & {same.get(sample.image, sample.image) for sample in samples if sample.split != "test"}
    return (
        f"{len(shared)} of the {len(test)} test images are also training images, because the release is split by "
        "question, not by patient."
    )


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the variant of a recipe's data settings: the original release, or the parquet files of the hub."""
    root, variant = data_folder(config.name, config.root), config.variant
    if variant != "hub" and parquet.holds_parquet(root) and not (root / TABLE).is_file():
        if variant is not None:
            raise UserError(
                f"data.variant={variant} does not apply to the parquet files in {root}; set data.variant=hub"
            )
        variant = "hub"
    if variant != "hub":
        return read_vqa_rad(
            root,
            variant=variant or "clean",
            validation_fraction=config.validation_fraction,
            validation_by=config.validation_by,
            seed=config.split_seed,
        )
    if config.validation_by != "image":
        raise UserError("data.validation_by=question does not apply to data.variant=hub; remove it")
    data = parquet.read_configured(config, scratch, "hub")
    note_hub(data)
    return data

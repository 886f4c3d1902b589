"""VQA-RAD (Lau et al., Scientific Data 2018) in its original release: every quirk, and three named splits.

`note_hub` judges the copy on the Hugging Face hub, which `data.parquet` reads.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import cut_validation
from preceptor.data.texts import read_json_rows
from preceptor.data.types import AnswerType, Dataset, Sample, Split
from preceptor.errors import UserError, nearest

Variant = Literal["clean", "published", "no_frames"]

TABLE = "VQA_RAD Dataset Public.json"
IMAGES = "VQA_RAD Image Folder"
# What `phrase_type` says; para(phrased) and free-form questions alike are training rows unless marked as test.
SPLITS: dict[str, Split] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
ANSWER_TYPES: dict[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}
HUB_ROWS = (1793, 451)
"""Training and test rows of the copy on the Hugging Face hub."""
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

    `question_frame` is a template form of a row's question, with the row's image and answer; as training rows, frames
    have the id `<qid>-frame` and the tag `phrase_type` = `frame`. The splits share the 451 test rows of the release:

    - `published`: the 1,797 training rows and the frames of all rows, of test rows too: 3,064. This is what MEVF and
      most papers since train on; it leaks.
    - `no_frames`: the 1,797 training rows.
    - `clean`: these and the frames of training rows, less those whose image and question (letter case, punctuation
      and white space aside) are those of a test row or of a test row's frame.

    Validation is `validation_fraction` of the training rows, cut by image with `seed`: how a model does on new images.
    With `validation_by="question"` it is that share of the release's training questions, cut as the split cuts its test
    questions: their images stay in training, and so do their frames on `published`, but not on `clean`.

    No split keeps the test images out of training: of 203, `clean` and `no_frames` share 202 with it and `published`
    all; `notes` says so.

    Raises:
        UserError: the folder is not the release, a row is broken, images are missing, or the variant is unknown.
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
        if link := _text(row["qid_linked_id"]):
            links[link].append(sample)
        if frame := _text(row["question_frame"]):
            frames.append(_frame(sample, frame))
    repeated = [id for id, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise UserError(f"{folder / TABLE}: qid {repeated[0]!r} occurs twice; take the file as released")
    require_images(places)

    test = {sample.id for sample in samples if sample.split == "test"}
    frames_of_test = [frame for frame in frames if frame.id.removesuffix("-frame") in test]
    frames_of_train = [frame for frame in frames if frame.id.removesuffix("-frame") not in test]
    asked_in_test = {_key(sample) for sample in samples if sample.split == "test"}
    asked_in_test |= {_key(frame) for frame in frames_of_test}
    kept_frames = [frame for frame in frames_of_train if _key(frame) not in asked_in_test]

    notes: list[str] = []
    same = sum(sample.split == "train" and _key(sample) in asked_in_test for sample in samples)
    if variant == "published":
        notes.append(
            f"This split leaks: the question frames of {len(frames_of_test)} of the {len(test)} test questions are "
            "training rows, with the same image and the same answer. Its scores only compare with papers that used it."
        )
        samples += frames_of_train + frames_of_test
    elif variant == "clean":
        notes.append(
            f"Left out of training: the frames of {len(frames_of_test)} test questions, and "
            f"{len(frames_of_train) - len(kept_frames)} frames of training questions that ask the same of the same "
            "image as a test question or its frame."
        )
        samples += kept_frames
    notes.insert(0, _note_shared_images(samples))
    if same:
        notes.append(f"In the release, {same} training question(s) ask the same of the same image as a test question.")
    crossing = sum(len({sample.split for sample in linked}) > 1 for linked in links.values())
    if crossing:
        notes.append(f"{crossing} question(s) have paraphrases both in training and in test (qid_linked_id).")
    if validation_by == "image":
        samples = cut_validation(samples, validation_fraction, seed)
    else:
        samples = _cut_questions(samples, validation_fraction, seed, keep_frames=variant == "published")
        notes.append("Validation questions are about training images (data.validation_by=question), like the test's.")
    return Dataset("vqa-rad", variant, folder, samples, notes, leaking=variant == "published" or crossing > 0)


def note_hub(data: Dataset[Sample]) -> None:
    """Note what is known of the hub's copy of VQA-RAD (`flaviagiammarino/vqa-rad`), and what the rows show of it.

    Its card says: the release's rows without question frames, less three that are repeated in training and one that is
    a test row too, hence 1,793 and 451. It is judged as the split `no_frames`, whose rows it has: test images shared
    with training are noted and the split does not count as leaking.
    """
    data.notes.append(_note_shared_images(data.samples))
    data.notes.append(
        "The hub's copy of VQA-RAD has no question frames, so none leaks, and does not say which test questions are "
        "paraphrases, so that the 308 free-form ones cannot be scored."
    )
    test = [sample for sample in data.samples if sample.split == "test"]
    counts = (len(data.samples) - len(test), len(test))
    if counts != HUB_ROWS:
        data.notes.append("Rows: {:,} and {:,}; the hub's card says {:,} and {:,}.".format(*counts, *HUB_ROWS))
    asked = {_key(sample) for sample in test}
    same = sum(sample.split != "test" and _key(sample) in asked for sample in data.samples)
    if same:
        data.notes.append(f"{same} training question(s) ask the same of the same image as a test question.")
    triplets = Counter((*_key(sample), sample.answer.lower()) for sample in data.samples if sample.split != "test")
    repeated = triplets.total() - len(triplets)
    if repeated:
        data.notes.append(f"{repeated} training row(s) repeat image, question and answer of another.")


def _cut_questions(samples: list[Sample], fraction: float, seed: int, *, keep_frames: bool) -> list[Sample]:
    """Move whole questions to validation as the release moved its test questions."""
    frames = {sample.id: sample for sample in samples if sample.id.endswith("-frame")}
    # Every question a group of its own; a frame is the question's copy, and is no candidate.
    own = [replace(sample, group=sample.id) for sample in samples if sample.id not in frames]
    cut = {sample.id for sample in cut_validation(own, fraction, seed) if sample.split == "validation"}
    moved = [replace(sample, split="validation") if sample.id in cut else sample for sample in samples]
    if keep_frames:
        return moved
    asked = {_key(sample) for sample in samples if sample.id in cut}
    asked |= {_key(frames[f"{name}-frame"]) for name in cut if f"{name}-frame" in frames}
    return [sample for sample in moved if not (sample.id in frames and _key(sample) in asked)]


def _release_folder(root: Path) -> Path:
    holds = f"{TABLE!r} and {IMAGES!r}"
    if not root.is_dir():
        raise UserError(f"data.root {root} is no folder; give the VQA-RAD folder, which holds {holds}")
    found = [root] if (root / TABLE).is_file() else sorted(table.parent for table in root.glob(f"*/{TABLE}"))
    if len(found) != 1:
        state = "no VQA-RAD release" if not found else f"{len(found)} VQA-RAD releases"
        raise UserError(f"{root} holds {state}; give the folder that holds {holds}, as the authors released them")
    if not (found[0] / IMAGES).is_dir():
        raise UserError(f"{found[0]} lacks the folder {IMAGES!r}; the VQA-RAD folder must hold {holds}")
    return found[0]


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    place = f"{folder / TABLE}: qid {row['qid']!r}"
    question, answer, phrase = _text(row["question"]), _text(row["answer"]), _text(row["phrase_type"])
    kind = _text(row["answer_type"]).upper()
    if not (_text(row["qid"]) and question and answer):
        raise UserError(f"{place}: the id, the question or the answer is missing; fill it in or delete the entry")
    if phrase not in SPLITS:
        raise UserError(f"{place}: phrase_type {phrase!r} is not known{nearest(phrase, SPLITS)}")
    if kind not in ANSWER_TYPES:
        raise UserError(f"{place}: answer_type {kind!r} is not known{nearest(kind, ANSWER_TYPES)}")
    name = _text(row["image_name"])
    return Sample(
        id=_text(row["qid"]),
        image=resolve_image(folder / IMAGES, name, place),
        question=question,
        answers=(answer,),
        answer_type=ANSWER_TYPES[kind],
        group=name,
        split=SPLITS[phrase],
        question_type=_question_type(_text(row["question_type"])),
        tags={"phrase_type": phrase, "image_organ": _text(row["image_organ"]).upper()},
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


def _text(value: Any) -> str:
    """Return a cell as text: integers occur, NULL stands for a missing value, tabs and double spaces are slips."""
    text = " ".join(str(value).split())
    return "" if value is None or text == "NULL" else text


def _question_type(text: str) -> str:
    kinds = {kind.strip().upper() for kind in text.split(",")} - {""}
    return ", ".join(sorted({TYPOS.get(kind, kind) for kind in kinds}))


def _key(sample: Sample) -> tuple[str, str]:
    """What is asked of which image, letter case, punctuation and white space aside."""
    return sample.group, " ".join(sample.question.lower().translate(_PUNCTUATION).split())


def _note_shared_images(samples: list[Sample]) -> str:
    test = {sample.group for sample in samples if sample.split == "test"}
    shared = test & {sample.group for sample in samples if sample.split != "test"}
    return (
        f"{len(shared)} of the {len(test)} test images are also training images: the release is divided by question, "
        "not by patient."
    )

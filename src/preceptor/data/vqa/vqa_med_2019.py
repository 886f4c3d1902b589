"""VQA-Med 2019 of ImageCLEF (Ben Abacha et al., CLEF 2019): pairs of training and validation, and the test file.

Lines are ``image|question|answer``; the test file has ``image|category|question|answer``. `#` splits alternatives.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import cut_validation, group_by_content, note_leaks
from preceptor.data.texts import read_text
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import inferred_type
from preceptor.errors import UserError, nearest

Variant = Literal["val", "test"]
CATEGORIES = ("modality", "plane", "organ", "abnormality")
FILES = {"train": "All_QA_Pairs_train.txt", "val": "All_QA_Pairs_val.txt", "test": "*Test_Questions_w_Ref_Answers*.txt"}
_RELEASE = f"{FILES['train']} and {FILES['val']} in folders of their own, each beside a folder of images"
_WORDS = {
    "plane": re.compile(r"\bplanes?\b"),
    "organ": re.compile(r"\borgans?\b|\bpart of the body\b"),
    "abnormality": re.compile(r"abnormal|\bnormal\b|\balarming\b|\bwrong\b"),
}


def category_of(question: str) -> str:
    """Return the category of a question by its wording.

    The pair files of training and validation name none; by these rules all 14,792 of their questions fall where the
    release's ``QAPairsByCategory`` has them.
    """
    text = question.lower()
    return next((name for name, words in _WORDS.items() if words.search(text)), "modality")


def read_vqa_med_2019(
    root: Path, *, variant: Variant | None = None, validation_fraction: float = 0.1, seed: int = 0
) -> Dataset[Sample]:
    """Read VQA-Med 2019 from the folder that holds its two or three splits, packed out.

    - `val` (the default): the official validation split is the test split. Validation is cut from training by
      image.
      For choosing models and comparing while the test questions stay unseen.
    - `test`: the official splits, scored on the 500 test questions; needs the test file with its answers.

    An id is ``<image>-<category>``; `question_type` holds the category; every alternative of an answer is accepted and
    the first is learnt. Answers of yes or no are closed, the others open. The group is the image.

    Raises:
        UserError: files are missing, a line is broken, images are missing, or the variant is unknown.
    """
    variant = variant or "val"
    if variant not in get_args(Variant):
        raise UserError(f"VQA-Med 2019 variant {variant!r} is not known{nearest(variant, get_args(Variant))}")
    if not root.is_dir():
        raise UserError(f"data.root {root} is no folder; give the folder of VQA-Med 2019: {_RELEASE}")
    if variant == "test":
        splits: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}
    else:
        splits = {"train": "train", "val": "test"}
    samples: list[Sample] = []
    places: dict[Path, str] = {}
    for key, split in splits.items():
        table = _find(root, key)
        images = _image_folder(table)
        for line, text in enumerate(read_text(table).split("\n"), start=1):
            if text.strip():
                sample = _sample(text.rstrip("\r"), f"{table}:{line}", images, split, key)
                places.setdefault(sample.image, f"{table.name}:{line}")
                samples.append(sample)
    repeated = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise UserError(
            f"{root}: {repeated[0]!r} occurs twice: an image has one question of a category; take the files as released"
        )
    require_images(places)
    samples = group_by_content(samples)
    notes = [
        "Categories of training and validation questions are inferred from their wording.",
        "Answer types are inferred: yes and no are closed, all others open.",
    ]
    if variant == "val":
        samples = cut_validation(samples, validation_fraction, seed)
        notes.append("Scored on the official validation split; validation is cut from training by image.")
    data = Dataset("vqa-med-2019", variant, root, samples, notes)
    note_leaks(data)
    return data


def _find(root: Path, key: str) -> Path:
    places = (FILES[key], f"*/{FILES[key]}", f"*/*/{FILES[key]}")
    # Archives packed on a Mac hold a "._name" beside a file.
    found = sorted({path for place in places for path in root.glob(place) if not path.name.startswith(".")})
    if len(found) == 1:
        return found[0]
    state = f"{len(found)} files named" if found else "no file named"
    fix = _RELEASE if key != "test" else "get the test file with its answers, or set data.variant=val"
    raise UserError(f"{root} holds {state} {FILES[key]}; needed: {fix}")


def _image_folder(table: Path) -> Path:
    """Return the one folder of images beside a table: `images` here, `Train_images` and its like in the release."""
    found = sorted(p for p in table.parent.iterdir() if p.is_dir() and p.name.lower().endswith("images"))
    if len(found) != 1:
        state = "no folder" if not found else f"{len(found)} folders"
        raise UserError(f"{table.parent} has {state} of images beside {table.name}; one must be named ...images")
    return found[0]


def _sample(text: str, place: str, images: Path, split: Split, key: str) -> Sample:
    wanted = 4 if key == "test" else 3
    # An answer may hold the sign itself; the first three (two) split the fields.
    fields = [" ".join(field.split()) for field in text.split("|", wanted - 1)]
    if len(fields) != wanted or not all(fields):
        form = "image|category|question|answer" if key == "test" else "image|question|answer"
        raise UserError(
            f"{place}: {len([f for f in fields if f])} of {wanted} fields of {form}; mend or delete the line"
        )
    name, question, answer = fields[0], fields[-2], fields[-1]
    category = fields[1].lower() if key == "test" else category_of(question)
    if category not in CATEGORIES:
        raise UserError(f"{place}: category {fields[1]!r} is not known{nearest(category, CATEGORIES)}")
    answers = tuple(text for text in (option.strip() for option in answer.split("#")) if text)
    if not answers:
        raise UserError(f"{place}: no answer between the # signs; mend or delete the line")
    return Sample(
        id=f"{name}-{category}",
        image=resolve_image(images, f"{name}.jpg", place),
        question=question,
        answers=answers,
        answer_type=inferred_type(answers[0]),
        group=name,
        split=split,
        question_type=category,
    )

"""Read VQA-Med 2019 of ImageCLEF (Ben Abacha et al., CLEF 2019).

Lines of the training and validation files are ``image|question|answer``, those of the test file are
``image|category|question|answer``. `#` separates alternative answers.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

from preceptor.data.findings import Finding
from preceptor.data.groups import group_by_content, note_leaks
from preceptor.data.images import require_images, resolve_image
from preceptor.data.locations import data_folder
from preceptor.data.splits import cut_validation
from preceptor.data.texts import read_text
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import inferred_type
from preceptor.data.vqa.release import released_counts, unused_images
from preceptor.errors import UserError, nearest

Variant = Literal["val", "test"]
CATEGORIES = ("modality", "plane", "organ", "abnormality")
FILES = {"train": "All_QA_Pairs_train.txt", "val": "All_QA_Pairs_val.txt", "test": "*Test_Questions_w_Ref_Answers*.txt"}
RELEASED_ROWS = {"train": 12792, "val": 2000, "test": 500}
_RELEASE = f"{FILES['train']} and {FILES['val']} in separate folders, each next to a folder of images"
_WORDS = {
    "plane": re.compile(r"\bplanes?\b"),
    "organ": re.compile(r"\borgans?\b|\bpart of the body\b"),
    "abnormality": re.compile(r"abnormal|\bnormal\b|\balarming\b|\bwrong\b"),
}


def category_of(question: str) -> str:
    """Return the category of a question, inferred from its wording.

    The training and validation files do not contain categories. For all 14,792 of their questions the result agrees
    with the ``QAPairsByCategory`` files of the release.
    """
    text = question.lower()
    return next((name for name, words in _WORDS.items() if words.search(text)), "modality")


def read_vqa_med_2019(
    root: Path, *, variant: Variant | None = None, validation_fraction: float = 0.1, seed: int = 0
) -> Dataset[Sample]:
    """Read VQA-Med 2019 from the folder with its two or three unpacked parts.

    Variants:

    - `val` (the default): the official validation split is the test split, and validation is cut from training by
      image. Use it to choose and compare models without touching the test questions.
    - `test`: the official splits, scored on the 500 test questions. It needs the test file with answers.

    The id of a sample is ``<image>-<category>``, its `question_type` is the category and its group is the image. All
    alternatives of an answer are accepted; the first is the training target. Answers of yes or no make a question
    closed.

    Raises:
        UserError: files or images are missing, a line is invalid, or the variant is unknown.
    """
    variant = variant or "val"
    if variant not in get_args(Variant):
        raise UserError(f"VQA-Med 2019 variant {variant!r} is not known{nearest(variant, get_args(Variant))}")
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give the folder of VQA-Med 2019: {_RELEASE}")
    if variant == "test":
        splits: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}
    else:
        splits = {"train": "train", "val": "test"}
    samples: list[Sample] = []
    places: dict[Path, str] = {}
    findings: list[Finding] = []
    for key, split in splits.items():
        table = _find(root, key)
        images = _image_folder(table)
        for line, text in enumerate(read_text(table).split("\n"), start=1):
            if text.strip():
                sample = _sample(text.rstrip("\r"), f"{table}:{line}", images, split, key)
                places.setdefault(sample.image, f"{table.name}:{line}")
                samples.append(sample)
        count = sum(sample.split == split for sample in samples)
        findings += released_counts({table: count}, {table: RELEASED_ROWS[key]})
        findings += unused_images(images, places)
    repeated = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise UserError(
            f"{root}: {repeated[0]!r} occurs twice; an image has one question per category, so take the files as "
            "released"
        )
    require_images(places, root)
    samples = group_by_content(samples)
    notes = [
        "Categories of training and validation questions are inferred from their wording.",
        "Answer types are inferred: yes and no are closed, all others open.",
    ]
    if variant == "val":
        samples = cut_validation(samples, validation_fraction, seed)
        notes.append("Scored on the official validation split; validation is cut from training by image.")
    data = Dataset("vqa-med-2019", variant, root, samples, notes)
    note_leaks(data, published=True)
    data.findings += findings
    return data


def _find(root: Path, key: str) -> Path:
    places = (FILES[key], f"*/{FILES[key]}", f"*/*/{FILES[key]}")
    # Archives packed on a Mac contain a "._name" for each file.
    found = sorted({path for place in places for path in root.glob(place) if not path.name.startswith(".")})
    if len(found) == 1:
        return found[0]
    state = f"{len(found)} files named" if found else "no file named"
    fix = f"it must contain {_RELEASE}" if key != "test" else "get the test file with answers, or set data.variant=val"
    raise UserError(f"{root} contains {state} {FILES[key]}; {fix}")


def _image_folder(table: Path) -> Path:
    """Return the only folder of images next to a table: `images` or, in the release, `Train_images` and the like."""
    found = sorted(p for p in table.parent.iterdir() if p.is_dir() and p.name.lower().endswith("images"))
    if len(found) != 1:
        state = "no folder" if not found else f"{len(found)} folders"
        raise UserError(
            f"{table.parent} has {state} of images next to {table.name}; exactly one must have a name that ends in "
            "`images`"
        )
    return found[0]


def _sample(text: str, place: str, images: Path, split: Split, key: str) -> Sample:
    count = 4 if key == "test" else 3
    # The answer is the last field, so that it may contain the separator.
    fields = [" ".join(field.split()) for field in text.split("|", count - 1)]
    if len(fields) != count or not all(fields):
        form = "image|category|question|answer" if key == "test" else "image|question|answer"
        filled = len([field for field in fields if field])
        raise UserError(f"{place}: {filled} of the {count} fields of {form}; correct or delete the line")
    name, question, answer = fields[0], fields[-2], fields[-1]
    # A copy may have the category of the test file, in its place or at the end.
    stray = [field.strip() for field in (question, *answer.split("|")[1:]) if field.strip().lower() in CATEGORIES]
    if stray and key != "test":
        raise UserError(f"{place}: {stray[0]!r} is a category, and the form is image|question|answer; remove it")
    category = fields[1].lower() if key == "test" else category_of(question)
    if category not in CATEGORIES:
        raise UserError(f"{place}: category {fields[1]!r} is not known{nearest(category, CATEGORIES)}")
    answers = tuple(text for text in (option.strip() for option in answer.split("#")) if text)
    if not answers:
        raise UserError(f"{place}: no answer between the # signs; correct or delete the line")
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


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the variant of a recipe's data settings."""
    return read_vqa_med_2019(
        data_folder(config.name, config.root),
        variant=config.variant,
        validation_fraction=config.validation_fraction,
        seed=config.split_seed,
    )

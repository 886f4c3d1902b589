"""Read SLAKE 1.0 (Liu et al., ISBI 2021): 642 images with questions in English and Chinese."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from preceptor.data.groups import group_by_content, note_leaks
from preceptor.data.images import require_images, resolve_image
from preceptor.data.locations import data_folder
from preceptor.data.texts import as_text, read_json_rows
from preceptor.data.types import AnswerType, Dataset, Sample, Split
from preceptor.data.vqa.release import MOST_LISTED, released_counts, unused_images
from preceptor.errors import UserError, nearest

Language = Literal["en", "zh", "both"]
Variant = Literal["clean", "published"]
FILES: dict[Split, str] = {"train": "train.json", "validation": "validate.json", "test": "test.json"}
HUB_VALIDATION = "validation.json"
"""Name of `validate.json` in the authors' copy on the Hugging Face hub."""
RELEASED_ROWS: dict[Split, int] = {"train": 9835, "validation": 2099, "test": 2094}
IMAGES = "imgs"
NAMES = {"en": "English", "zh": "Chinese"}
ANSWER_TYPES: dict[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}
NEEDED = ("qid", "img_id", "img_name", "question", "answer", "q_lang", "answer_type", "content_type")


def read_slake(root: Path, *, language: Language = "en", variant: Variant | None = None) -> Dataset[Sample]:
    """Read SLAKE from its folder with `train.json`, `validate.json` (or `validation.json`), `test.json` and `imgs/`.

    The splits are the official ones. Within a language they share no images, but across the languages they do. With
    `language="both"`, the variant `clean` (the default) drops training and validation samples about test images, and
    training samples about validation images. `published` keeps all samples and is marked as leaking. For one language
    both variants are the same; a note counts the test images that are training images in the other language.

    The id of a sample is the `qid` of the release, its group is the image, and its `question_type` is the content type
    (Modality, Organ, ...). The tags are `language`, `location`, `modality` and `base_type` (kvqa: the question needs
    knowledge beyond the image).

    Raises:
        UserError: files or images are missing, a row is invalid, or the language or the variant is unknown.
    """
    variant = variant or "clean"
    for what, value, known in (("variant", variant, get_args(Variant)), ("language", language, get_args(Language))):
        if value not in known:
            raise UserError(f"SLAKE {what} {value!r} is not known{nearest(value, known)}")
    folder = _release_folder(root)
    samples: list[Sample] = []
    places: dict[Path, str] = {}
    trained: defaultdict[str, set[str]] = defaultdict(set)  # training images of each language
    unanswered: list[str] = []
    counts: dict[Path, int] = {}
    all_images: set[Path] = set()
    files = _files(folder)
    for split, name in files.items():
        for number, row in enumerate(read_json_rows(folder / name, NEEDED), start=1):
            place = f"{folder / name}: entry {number} (qid {row['qid']!r})"
            counts[folder / name] = number
            all_images.add(folder / IMAGES / _cell(row, "img_name", place))
            row_language = _language(row, place)
            if split == "train":
                trained[row_language].add(_cell(row, "img_name", place))
            if language in ("both", row_language):
                if not _cell(row, "answer", place) and split != "test":
                    unanswered.append(_cell(row, "qid", place))  # one English training row of the release
                    continue
                sample = _sample(row, place, folder, split)
                places.setdefault(sample.image, f"{name}, qid {sample.id}")
                samples.append(sample)
    repeated = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise UserError(f"{folder}: qid {repeated[0]!r} occurs twice; take the files as released")
    if not samples:
        raise UserError(f"{folder} contains no question in the language {language!r}")
    require_images(places, folder)
    notes = []
    if unanswered:
        notes.append(
            f"{len(unanswered)} training or validation row(s) without an answer were left out: qid "
            f"{', '.join(unanswered[:MOST_LISTED])}{', ...' if len(unanswered) > MOST_LISTED else ''}."
        )
    if language != "both":
        _note_other_language(samples, language, trained, notes)
    samples = group_by_content(samples)
    if variant == "clean":
        samples = _drop_shared_images(samples, notes)
    label = "both-published" if (language, variant) == ("both", "published") else language
    data = Dataset("slake", label, folder, samples, notes)
    note_leaks(data, published=True)
    data.findings += released_counts(counts, {folder / name: RELEASED_ROWS[split] for split, name in files.items()})
    data.findings += unused_images(folder / IMAGES, all_images, "*/source.jpg")
    return data


def _note_other_language(
    samples: list[Sample], language: Language, trained: Mapping[str, set[str]], notes: list[str]
) -> None:
    """Add a note about the test images that are training images in the other language."""
    test = {sample.group for sample in samples if sample.split == "test"}
    for other in sorted(trained.keys() - {language}):
        if shared := test & trained[other]:
            notes.append(
                f"{len(shared)} of the {len(test)} test images are training images in {NAMES[other]}: a model that "
                f"was trained on SLAKE in {NAMES[other]} has seen them."
            )


def _drop_shared_images(samples: list[Sample], notes: list[str]) -> list[Sample]:
    """Drop training and validation samples whose image is also in a split that is held out more strictly."""
    rank: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
    strictest: dict[str, int] = {}
    for sample in samples:
        strictest[sample.group] = max(rank[sample.split], strictest.get(sample.group, 0))
    remaining = [sample for sample in samples if rank[sample.split] == strictest[sample.group]]
    if len(remaining) < len(samples):
        train = {sample.group for sample in samples if sample.split == "train"}
        shared = len({sample.group for sample in samples if sample.split == "test"} & train)
        notes.append(
            f"Left out: {len(samples) - len(remaining)} training and validation questions about images that are held "
            "out in "
            f"the other language ({shared} of the test images)."
        )
    return remaining


def _release_folder(root: Path) -> Path:
    content = f"{', '.join(FILES.values())} and {IMAGES}/"
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give the SLAKE folder, which contains {content}")
    found = [root] if (root / FILES["train"]).is_file() else sorted(p.parent for p in root.glob(f"*/{FILES['train']}"))
    if len(found) != 1:
        raise UserError(f"{root} contains {len(found)} SLAKE releases; give the folder that contains {content}")
    absent = [name for name in (*_files(found[0]).values(), IMAGES) if not (found[0] / name).exists()]
    if absent:
        raise UserError(f"{found[0]} lacks {', '.join(absent)}; the SLAKE folder must contain {content}")
    return found[0]


def _files(folder: Path) -> dict[Split, str]:
    """Return the file of each split in a folder. Raises UserError if the validation split is there under both names."""
    if not (folder / HUB_VALIDATION).exists():
        return FILES
    if (folder / FILES["validation"]).exists():
        raise UserError(f"{folder} contains {FILES['validation']} and {HUB_VALIDATION}; keep the one of your release")
    return {**FILES, "validation": HUB_VALIDATION}


def _language(row: dict[str, Any], place: str) -> str:
    language = _cell(row, "q_lang", place).lower()
    if language not in NAMES:
        raise UserError(f"{place}: q_lang {row['q_lang']!r} is not known; known: {', '.join(NAMES)}")
    return language


def _sample(row: dict[str, Any], place: str, folder: Path, split: Split) -> Sample:
    kind, question, answer = (
        _cell(row, "answer_type", place).upper(),
        _cell(row, "question", place),
        _cell(row, "answer", place),
    )
    if not (_cell(row, "qid", place) and question and answer):
        raise UserError(f"{place}: the id, the question or the answer is missing; fill it in or delete the entry")
    if kind not in ANSWER_TYPES:
        raise UserError(f"{place}: answer_type {kind!r} is not known{nearest(kind, ANSWER_TYPES)}")
    return Sample(
        id=_cell(row, "qid", place),
        image=resolve_image(folder / IMAGES, _cell(row, "img_name", place), place),
        question=question,
        answers=(answer,),
        answer_type=ANSWER_TYPES[kind],
        group=_cell(row, "img_name", place),
        split=split,
        question_type=_cell(row, "content_type", place),
        tags={
            "language": _language(row, place),
            "location": _cell(row, "location", place),
            "modality": _cell(row, "modality", place),
            "base_type": _cell(row, "base_type", place),
        },
    )


def _cell(row: dict[str, Any], name: str, place: str) -> str:
    return " ".join(as_text(row.get(name), f"{place}: {name}").split())


def read(config: Any, scratch: Path) -> Dataset[Sample]:
    """Read the language and the variant of a recipe's data settings."""
    root = data_folder(config.name, config.root)
    return read_slake(root, language=config.language or "en", variant=config.variant)

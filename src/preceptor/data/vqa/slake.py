"""SLAKE 1.0 (Liu et al., ISBI 2021): 642 images, questions in English and Chinese."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import group_by_content, note_leaks
from preceptor.data.texts import read_json_rows
from preceptor.data.types import AnswerType, Dataset, Sample, Split
from preceptor.errors import UserError, nearest

Language = Literal["en", "zh", "both"]
Variant = Literal["clean", "published"]
FILES: dict[Split, str] = {"train": "train.json", "validation": "validate.json", "test": "test.json"}
IMAGES = "imgs"
NAMES = {"en": "English", "zh": "Chinese"}
ANSWER_TYPES: dict[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}
NEEDED = ("qid", "img_id", "img_name", "question", "answer", "q_lang", "answer_type", "content_type")


def read_slake(root: Path, *, language: Language = "en", variant: Variant | None = None) -> Dataset[Sample]:
    """Read SLAKE from its folder: `train.json`, `validate.json`, `test.json` and `imgs/`.

    The splits are the official ones. Within a language they share no image; across the two languages they do, so with
    `language="both"` the variant `clean` (the default) leaves out training and validation rows about test images, and
    training rows about validation images. `published` keeps all rows, and says that it leaks. For one language the two
    are the same; the notes count the test images that are training images in the other one.

    An id is the release's `qid`; the group is the image; `question_type` is the content type (Modality, Organ, ...);
    tags: `language`, `location`, `modality`, `base_type` (kvqa: needs knowledge beyond the image).

    Raises:
        UserError: files are missing, a row is broken, images are missing, or language or variant are unknown.
    """
    variant = variant or "clean"
    for what, value, known in (("variant", variant, get_args(Variant)), ("language", language, get_args(Language))):
        if value not in known:
            raise UserError(f"SLAKE {what} {value!r} is not known{nearest(value, known)}")
    folder = _release_folder(root)
    samples: list[Sample] = []
    places: dict[Path, str] = {}
    trained: defaultdict[str, set[str]] = defaultdict(set)  # training images of each language
    unanswered = 0
    for split, name in FILES.items():
        for number, row in enumerate(read_json_rows(folder / name, NEEDED), start=1):
            place = f"{folder / name}: entry {number} (qid {row['qid']!r})"
            spoken = _language(row, place)
            if split == "train":
                trained[spoken].add(_cell(row, "img_name"))
            if language in ("both", spoken):
                if not _cell(row, "answer") and split != "test":
                    unanswered += 1  # one English training row of the release
                    continue
                sample = _sample(row, place, folder, split)
                places.setdefault(sample.image, f"{name}, qid {sample.id}")
                samples.append(sample)
    repeated = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise UserError(f"{folder}: qid {repeated[0]!r} occurs twice; take the files as released")
    if not samples:
        raise UserError(f"{folder} holds no question in the language {language!r}")
    require_images(places)
    notes = []
    if unanswered:
        notes.append(f"{unanswered} training or validation row(s) without an answer are left out.")
    if language != "both":
        _note_other_language(samples, language, trained, notes)
    samples = group_by_content(samples)
    if variant == "clean":
        samples = _drop_shared_images(samples, notes)
    label = "both-published" if (language, variant) == ("both", "published") else language
    data = Dataset("slake", label, folder, samples, notes)
    note_leaks(data)
    return data


def _note_other_language(
    samples: list[Sample], language: Language, trained: Mapping[str, set[str]], notes: list[str]
) -> None:
    """Note how many test images a model has seen that learnt from the other language before."""
    test = {sample.group for sample in samples if sample.split == "test"}
    for other in sorted(trained.keys() - {language}):
        if shared := test & trained[other]:
            notes.append(
                f"{len(shared)} of the {len(test)} test images are training images in {NAMES[other]}: a model that "
                f"was trained on SLAKE in {NAMES[other]} before has seen them."
            )


def _drop_shared_images(samples: list[Sample], notes: list[str]) -> list[Sample]:
    """Leave out the rows of training and validation whose image is in a split that is held out more strictly."""
    rank: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
    held: dict[str, int] = {}
    for sample in samples:
        held[sample.group] = max(rank[sample.split], held.get(sample.group, 0))
    kept = [sample for sample in samples if rank[sample.split] == held[sample.group]]
    if len(kept) < len(samples):
        train = {sample.group for sample in samples if sample.split == "train"}
        shared = len({sample.group for sample in samples if sample.split == "test"} & train)
        notes.append(
            f"Left out: {len(samples) - len(kept)} rows of training and validation about images that are held out in "
            f"the other language ({shared} of the test images)."
        )
    return kept


def _release_folder(root: Path) -> Path:
    holds = f"{', '.join(FILES.values())} and {IMAGES}/"
    if not root.is_dir():
        raise UserError(f"data.root {root} is no folder; give the SLAKE folder, which holds {holds}")
    found = [root] if (root / FILES["train"]).is_file() else sorted(p.parent for p in root.glob(f"*/{FILES['train']}"))
    if len(found) != 1:
        raise UserError(f"{root} holds {len(found)} SLAKE releases; give the folder that holds {holds}")
    absent = [name for name in (*FILES.values(), IMAGES) if not (found[0] / name).exists()]
    if absent:
        raise UserError(f"{found[0]} lacks {', '.join(absent)}; the SLAKE folder must hold {holds}")
    return found[0]


def _language(row: dict[str, Any], place: str) -> str:
    language = _cell(row, "q_lang").lower()
    if language not in NAMES:
        raise UserError(f"{place}: q_lang {row['q_lang']!r} is not known; known: {', '.join(NAMES)}")
    return language


def _sample(row: dict[str, Any], place: str, folder: Path, split: Split) -> Sample:
    kind, question, answer = _cell(row, "answer_type").upper(), _cell(row, "question"), _cell(row, "answer")
    if not (_cell(row, "qid") and question and answer):
        raise UserError(f"{place}: the id, the question or the answer is missing; fill it in or delete the entry")
    if kind not in ANSWER_TYPES:
        raise UserError(f"{place}: answer_type {kind!r} is not known{nearest(kind, ANSWER_TYPES)}")
    return Sample(
        id=_cell(row, "qid"),
        image=resolve_image(folder / IMAGES, _cell(row, "img_name"), place),
        question=question,
        answers=(answer,),
        answer_type=ANSWER_TYPES[kind],
        group=_cell(row, "img_name"),
        split=split,
        question_type=_cell(row, "content_type"),
        tags={
            "language": _language(row, place),
            "location": _cell(row, "location"),
            "modality": _cell(row, "modality"),
            "base_type": _cell(row, "base_type"),
        },
    )


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else " ".join(str(value).split())

"""A page that shows answers of a teacher with their images, for a look before and after a run of `preceptor teach`.

It contains pixels, questions and answers; no file name, id or group of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.data.images import load_image
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.grounding.box_convention import BoxConvention
from preceptor.grounding.report import plain, rectangles
from preceptor.report.format import percent
from preceptor.report.page import Fragment, Page, Section, Text
from preceptor.report.pictures import as_uri, encode_png
from preceptor.report.tables import Table
from preceptor.teachers.label_store import Label

PAGE = "labels.html"
SIDE = 480
"""Longest side of the pictures in pixels."""


@dataclass(frozen=True)
class LabelView:
    """An answer of a teacher: the dialogue that ends in its question, the label, and the true answer if known."""

    dialogue: Dialogue
    label: Label
    truth: str


def write_label_page(
    folder: Path,
    teacher: str,
    counts: tuple[int, Mapping[str, int]],
    convention: BoxConvention,
    random: Sequence[LabelView],
    boxes: Sequence[LabelView],
    unusable: Sequence[LabelView],
) -> Path:
    """Write FOLDER/labels.html and return its path.

    Args:
        folder: folder of the store.
        teacher: name of the model, or fingerprint of its weights.
        counts: number of usable answers, and of the others by reason.
        convention: how the teacher writes boxes.
        random: answers drawn at random.
        boxes: answers to questions about places, drawn at random.
        unusable: one example of each reason.
    """
    usable, bad = counts
    total = usable + sum(bad.values())
    rows = [[name, f"{n:,}", percent(n / max(1, total))] for name, n in [("usable", usable), *bad.items()]]
    measured = convention.sentence()
    about = Text(f"{measured[0].upper()}{measured[1:]}.")
    sections = [
        Section("counts", "Answers", [about, Table("", ["Answers", "n", "%"], rows)]),
        Section("random", "Random answers", _pictures(random)),
        Section("boxes", "More answers with boxes", _pictures(boxes)),
        Section("unusable", "Unusable answers", _pictures(unusable)),
    ]
    facts = [f"Teacher {teacher[:40]}: {total:,} answers, {usable:,} of them usable"]
    path = folder / PAGE
    write_text(path, Page("Pseudo-labels", facts, sections, style="grounding/templates/report.css").render())
    return path


def _pictures(views: Sequence[LabelView]) -> list[Any]:
    pictures = [_picture(view) for view in views]
    keys = {box["key"] for picture in pictures for box in picture["boxes"]}
    legend = [pair for pair in (("teacher", "teacher's box"), ("true", "true box")) if pair[0] in keys]
    data = {"legend": legend, "pictures": pictures}
    return [Fragment("grounding/templates/boxes.html.j2", data)] if pictures else []


def _picture(view: LabelView) -> dict[str, Any]:
    label, dialogue = view.label, view.dialogue
    try:
        image = load_image(dialogue.images[0]) if dialogue.images else None
    except UserError:
        image = None
    height = 1000.0 if image is None else round(1000 * image.height / image.width, 1)
    verdict = f"not usable: {', '.join(label.reasons)}" if label.reasons else "usable"
    texts = [("Teacher", plain(label.answer))]
    texts += [("Before its boxes were read", plain(label.raw))] if label.raw else []
    texts += [("True", plain(view.truth))] if view.truth else []
    return {
        "image": "" if image is None else as_uri(encode_png(image, SIDE)),
        "height": height,
        "question": plain(dialogue.turns[-1][0]),
        "boxes": [*rectangles(view.truth, "true", height), *rectangles(label.answer, "teacher", height)],
        "answers": [{"title": title, "text": _short(text)} for title, text in [*texts, ("Check", verdict)]],
    }


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]} …"

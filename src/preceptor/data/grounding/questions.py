"""Generate questions about the boxes of an image from templates: where it is, what it is, what it looks like.

These are three tasks of Med-GRIT-270k: visual grounding, referring object classification and referring captioning. The
same boxes always give the same dialogues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.data.grounding.box_formats import write, write_box, write_reference
from preceptor.data.grounding.boxes import Box
from preceptor.data.types import Dialogue, GroundingTask, Split

_ASK = {
    "en": (
        "Where is {name}? Answer with boxes.",
        "What is in the region {box}? Answer with its name.",
        "Describe the region {box}.",
    ),
    "zh": ("{name}在哪里？请用方框回答。", "区域{box}里是什么？请回答名称。", "请描述区域{box}。"),
}
_SAY = {
    "en": ("{kind} in the {place} part of this {modality} image of the {location}: {name}.", "an organ", "a finding"),
    "zh": ("这张{location}的{modality}图像的{place}部分，{kind}：{name}。", "器官", "异常"),
}
_PLACES = {
    "en": (
        ("upper left", "upper middle", "upper right"),
        ("middle left", "central", "middle right"),
        ("lower left", "lower middle", "lower right"),
    ),
    "zh": (("左上", "上中", "右上"), ("左中", "中央", "右中"), ("左下", "下中", "右下")),
}


@dataclass(frozen=True)
class Picture:
    """An image with labeled boxes.

    Attributes:
        image: Path of the image.
        key: Identifier of the image in the ids of dialogues.
        group: Group of the dialogues.
        split: Split of the dialogues.
        modality: Modality as Med-GRIT-270k spells it.
        shown_as: Modality as it appears in descriptions.
        location: Part of the body as it appears in descriptions.
        language: `en` or `zh`.
    """

    image: Path
    key: str
    group: str
    split: Split
    modality: str
    shown_as: str
    location: str
    language: str = "en"

    def dialogue(self, id: str, question: str, answer: str, task: GroundingTask) -> Dialogue:
        return Dialogue(
            f"{id}-{self.language}",
            (self.image,),
            ((question, answer),),
            task,
            self.modality,
            self.group,
            self.split,
            {"language": self.language},
        )


@dataclass(frozen=True)
class LabeledBox:
    """The boxes of one name, in thousandths. `finding` distinguishes findings from organs."""

    name: str
    boxes: tuple[Box, ...]
    finding: bool


def ask_about_boxes(picture: Picture, marked: Sequence[LabeledBox]) -> list[Dialogue]:
    """Return one `vg` dialogue per name, and one `roc` and one `rc` dialogue per box.

    Left and right in descriptions are those of the image, not of the patient.
    """
    dialogues = []
    where, what, describe = _ASK[picture.language]
    for label in marked:
        answer = write(label.boxes, label.name)
        digest = hashlib.sha256(f"{picture.key}|{label.name}|{picture.language}".encode()).hexdigest()[:8]
        id = f"{picture.key}-{digest}"
        dialogues.append(picture.dialogue(f"vg-{id}", where.format(name=write_reference(label.name)), answer, "vg"))
        for number, box in enumerate(label.boxes):
            written = write_box(box)
            dialogues.append(picture.dialogue(f"roc-{id}-{number}", what.format(box=written), label.name, "roc"))
            text = _description(picture, label, box)
            dialogues.append(picture.dialogue(f"rc-{id}-{number}", describe.format(box=written), text, "rc"))
    return dialogues


def _description(picture: Picture, label: LabeledBox, box: Box) -> str:
    sentence, organ, finding = _SAY[picture.language]
    row, column = (min(2, int((low + high) / 2 * 3 / 1000)) for low, high in ((box[1], box[3]), (box[0], box[2])))
    text = sentence.format(
        kind=finding if label.finding else organ,
        place=_PLACES[picture.language][row][column],
        modality=picture.shown_as,
        location=picture.location,
        name=label.name,
    )
    return text[0].upper() + text[1:]

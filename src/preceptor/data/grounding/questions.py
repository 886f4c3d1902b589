"""Questions about the boxes of a picture, made by fixed templates: where it is, what it is, what it looks like.

They are Med-GRIT-270k's tasks of visual grounding, referring object classification and referring captioning; the same
boxes give the same dialogues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.data.grounding.boxes import Box, Style, write_box, write_reference
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
    """An image that is asked about. `key` stands for it in ids; `modality` is Med-GRIT's word, `shown_as` the one that
    is said, of `location`; `language` is en or zh."""

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
    """What lies in boxes, in thousandths: its name as it is said, and whether it is a finding or an organ."""

    name: str
    boxes: tuple[Box, ...]
    finding: bool


def ask_about_boxes(picture: Picture, marked: Sequence[LabeledBox], style: Style = "qwen") -> list[Dialogue]:
    """Return the dialogues about what is marked in a picture: one of `vg` for each name, one of `roc` and one of `rc`
    for each box. Sides in descriptions are those of the picture, not of the patient."""
    made = []
    where, what, describe = _ASK[picture.language]
    for one in marked:
        name = write_reference(one.name, style=style)
        answer = name + "".join(write_box(box, style) for box in one.boxes)
        digest = hashlib.sha256(f"{picture.key}|{one.name}|{picture.language}".encode()).hexdigest()[:8]
        id = f"{picture.key}-{digest}"
        made.append(picture.dialogue(f"vg-{id}", where.format(name=name), answer, "vg"))
        for number, box in enumerate(one.boxes):
            written = write_box(box, style)
            made.append(picture.dialogue(f"roc-{id}-{number}", what.format(box=written), one.name, "roc"))
            text = _description(picture, one, box)
            made.append(picture.dialogue(f"rc-{id}-{number}", describe.format(box=written), text, "rc"))
    return made


def _description(picture: Picture, one: LabeledBox, box: Box) -> str:
    sentence, organ, finding = _SAY[picture.language]
    row, column = (min(2, int((low + high) / 2 * 3 / 1000)) for low, high in ((box[1], box[3]), (box[0], box[2])))
    text = sentence.format(
        kind=finding if one.finding else organ,
        place=_PLACES[picture.language][row][column],
        modality=picture.shown_as,
        location=picture.location,
        name=one.name,
    )
    return text[0].upper() + text[1:]

"""Marks in texts that stand for images: check them against the images of a dialogue, and keep their positions.

``<image>`` is the mark of LLaVA and LLaMA-Factory. Other families' marks are refused, because a model would read them
as text.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path

from preceptor.errors import UserError

MARK = "<image>"
_LEADING = re.compile(rf"\s*(?:{MARK}\s*)+")
_PLACEHOLDER = re.compile(
    r"</?(?:img|image|video|audio|vision|picture|frame)(?:[\s_-]?(?:\d+|start|end|pad|token|placeholder|here|soft_token))?"
    r"(?:\s[^<>]*)?/?>"
    r"|<\|/?(?:begin_of_|end_of_|start_of_)?(?:img|image|video|audio|vision|media)"
    r"(?:_?(?:\d+|start|end|pad|token|begin|soft_token))?\|>"
    r"|</?(?:start_of|end_of)_(?:image|video|audio)>"
    r"|\[/?(?:IMG|IMAGE|VIDEO|AUDIO)(?:_?(?:\d+|BREAK|END|START))?\]"
    r"|<(?:IMG_CONTEXT|ImageHere|bbox|ref-object)>",
    re.IGNORECASE,
)


def place_images(
    turns: Sequence[Sequence[str]], images: int, place: str, known: Container[str] = ()
) -> list[list[str]]:
    """Check the image marks of a dialogue's texts, and remove those that only say that the images come first.

    Without marks, or if all marks are at the beginning of the first question, the images precede it. Otherwise the
    marks stay where they are, one for each image, in order (see `split_at_images`).

    Args:
        turns: (question, answer) texts.
        images: number of images.
        place: place of the dialogue, for messages.
        known: marks that stand for something else, and stay.

    Raises:
        UserError: the number of marks is not that of the images, an answer contains a mark, or a text contains the mark
            of another model family.
    """
    count = 0
    for question, answer in turns:
        for text in (question, answer):
            for match in _PLACEHOLDER.finditer(text):
                if match[0] != MARK and match[0] not in known:
                    raise UserError(
                        f"{place}: the mark {match[0]!r} is not known; write {MARK} in a question for each image, and "
                        "boxes with their numbers"
                    )
        if MARK in answer:
            raise UserError(f"{place}: an answer contains {MARK}; a model writes no images, so move it into a question")
        count += question.count(MARK)
    if count not in (0, images):
        raise UserError(
            f"{place}: {count} marks {MARK} and {images} images; write one mark for each image, or no marks if the "
            "images precede the text"
        )
    if count == 0:
        return [[question.strip(), answer.strip()] for question, answer in turns]
    (first, answer), *others = turns
    leading = _LEADING.match(first)
    if leading and leading[0].count(MARK) == images:
        first = first[leading.end() :]
    return [[first.strip(), answer.strip()], *([q.strip(), a.strip()] for q, a in others)]


def split_at_images(questions: Sequence[str], images: Sequence[Path]) -> list[list[str | Path]]:
    """Return the content of each question: texts and images in the order in which a model reads them.

    If the questions contain a mark for each image, the images are at the marks. Otherwise all precede the first text.
    """
    if not images or sum(question.count(MARK) for question in questions) != len(images):
        return [[*(images if number == 0 else ()), question] for number, question in enumerate(questions)]
    remaining = iter(images)
    contents: list[list[str | Path]] = []
    for question in questions:
        head, *tails = question.split(MARK)
        content: list[str | Path] = [head] if head else []
        for text in tails:
            content.append(next(remaining))
            content += [text] if text else []
        contents.append(content)
    return contents


def images_shown(questions: Sequence[str], images: tuple[Path, ...], number: int) -> tuple[Path, ...]:
    """Return the images that a model has read after the first `number` questions of a dialogue.

    With a mark for each image, those of later questions are not shown yet. Otherwise all images are.
    """
    marks = [question.count(MARK) for question in questions]
    return images[: sum(marks[:number])] if sum(marks) == len(images) else images

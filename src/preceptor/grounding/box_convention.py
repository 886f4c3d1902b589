"""How a teacher writes boxes: measured on questions whose boxes are known, or given by the user.

Questions are translated into the teacher's format before they are sent, and answers into the format of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from preceptor.data.grounding.box_detection import MARGIN, FormatMeasurement, measure_format, measure_scale
from preceptor.data.grounding.box_formats import (
    BOX_FORMATS,
    CANONICAL,
    Size,
    convert,
    find_boxes,
    from_canonical,
    is_native,
    written_boxes,
)
from preceptor.data.grounding.boxes import Box
from preceptor.data.images import image_size
from preceptor.data.types import Dialogue
from preceptor.errors import UserError, nearest
from preceptor.grounding.pseudo_labels import Prompt

SCALE_GAIN = 0.1
"""Gain in mean IoU from which a common factor of all boxes is an error of scale, not of precision."""
FEWEST = 4
"""Smallest number of answers to questions with known boxes that a format is measured on."""


def true_boxes(answer: str) -> list[Box]:
    """Return the boxes of an answer of the data."""
    return [found.box for found in find_boxes(answer) if found.box is not None]


def mentions_box(prompt: Prompt) -> bool:
    """Return whether a prompt asks for boxes, or has boxes in its questions or earlier answers."""
    return prompt.wants_box or any(find_boxes(text) for turn in prompt.dialogue.turns for text in turn)


@dataclass(frozen=True)
class BoxSettings:
    """How the teacher's way to write boxes is found.

    Args:
        format: name of the format (`data.grounding.box_formats`); None to measure it.
        measured: dialogues whose first question has boxes as its answer; the format is measured on them.
        min_iou: smallest mean IoU of the teacher's boxes with the known ones.
        candidates: formats that are tried.
        size_sent: size of an image as it is sent to the teacher.
    """

    format: str | None = CANONICAL
    measured: Sequence[Dialogue] = ()
    min_iou: float = 0.2
    candidates: Sequence[str] = tuple(BOX_FORMATS)
    size_sent: Callable[[Path], Size] = image_size

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in BOX_FORMATS:
            raise UserError(f"--box-format {self.format!r} is not known{nearest(self.format, BOX_FORMATS)}")
        if not 0 <= self.min_iou <= 1:
            raise UserError(f"--min-iou {self.min_iou:g} must be in [0, 1]")

    def given(self) -> BoxConvention | None:
        """Return the convention that the user has named."""
        return None if self.format is None else BoxConvention(self.format, settings=self)

    def require_measurable(self) -> None:
        """Raise UserError if there are too few questions to measure the format on."""
        if len(self.measured) < FEWEST:
            known = f"only {len(self.measured)}" if self.measured else "none"
            raise UserError(
                f"some questions ask for boxes, and {known} of the training questions have known boxes, so that the "
                "teacher's box format cannot be measured: name it with --box-format, one of "
                f"{', '.join(BOX_FORMATS)}"
            )

    def measure(self, answers: Sequence[tuple[Dialogue, str, Sequence[Box]]]) -> BoxConvention:
        """Return the format that agrees best with known boxes, from (dialogue, answer, known boxes).

        Raises UserError if no format agrees, if several formats agree that read different boxes, or if the boxes agree
        much better after a change of scale.
        """
        if len(answers) < FEWEST:
            raise UserError(
                f"the teacher answered {len(answers)} of {len(self.measured)} questions with known boxes, too few to "
                "measure its box format; look at the log of the server, then run the same command again"
            )
        sizes = [self.size_sent(dialogue.images[0]) if dialogue.images else None for dialogue, *_ in answers]
        found = measure_format(
            [text for _, text, _ in answers], [boxes for *_, boxes in answers], sizes, formats=self.candidates
        )
        scale = measure_scale([text for _, text, _ in answers], [boxes for *_, boxes in answers], sizes)
        if scale is not None and scale.mean_iou >= found.mean_iou[found.best] + SCALE_GAIN and scale.mean_iou >= 0.5:
            raise UserError(
                f"the teacher's boxes are in no known format: the best one is {found.best} with a mean IoU of "
                f"{found.mean_iou[found.best]:.2f} on {found.answers} questions, but {scale.mean_iou:.2f} if all "
                f"numbers are divided by {scale.factor:.4g} and read as {scale.unit}, as if the server had "
                "resized the images; resize them with --max-pixels, or ask for thousandths with --system-prompt"
            )
        if found.mean_iou[found.best] < self.min_iou:
            raise UserError(
                f"the teacher's boxes agree with the known ones in no format: {_listed(found)}, measured on "
                f"{found.answers} questions, below --min-iou {self.min_iou:g}; use a teacher that "
                "was trained on boxes, or tell it how to write them with --system-prompt"
            )
        best = _clearest(found, [text for _, text, _ in answers])
        if best is None:
            raise UserError(
                f"the teacher's box format is not clear: {_listed(found)}, measured on {found.answers} "
                "questions; name it with --box-format, or ask more questions with --measure"
            )
        return BoxConvention(best, dict(found.mean_iou), found.answers, self)


def _clearest(found: FormatMeasurement, answers: Sequence[str]) -> str | None:
    """Return the best format; of several that are about as good, the one in whose syntax the answers are written.

    Pixels of the original and of the resized image differ by a few per cent, but only the latter are written in the
    JSON of Qwen2.5-VL. The result is None if the syntax does not decide.
    """
    if found.clear or len(found.mean_iou) == 1:
        return found.best
    near = [name for name, value in found.mean_iou.items() if value > found.mean_iou[found.best] - MARGIN]
    boxed = [text for text in answers if written_boxes(text)]
    native = [name for name in near if all(is_native(text, name) for text in boxed)]
    return native[0] if len(native) == 1 else None


def _listed(found: FormatMeasurement) -> str:
    rows = sorted(found.mean_iou.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {value:.2f}" for name, value in rows)


@dataclass(frozen=True)
class BoxConvention:
    """How a teacher writes boxes.

    Attributes:
        format: name of the format.
        mean_iou: mean IoU with known boxes of every format that was tried; empty if it was not measured.
        answers: number of answers that it was measured on.
    """

    format: str = CANONICAL
    mean_iou: Mapping[str, float] = field(default_factory=dict)
    answers: int = 0
    settings: BoxSettings = BoxSettings()

    def as_dict(self) -> dict[str, Any]:
        rounded = {name: round(value, 4) for name, value in self.mean_iou.items()}
        return {"format": self.format, "mean_iou": rounded, "answers": self.answers}

    @classmethod
    def restore(cls, stored: Mapping[str, Any], settings: BoxSettings) -> Self:
        """Return what `as_dict` returned."""
        return cls(stored["format"], stored["mean_iou"], stored["answers"], settings)

    def sentence(self) -> str:
        """Return the format with the IoU that it was measured at."""
        if not self.answers:
            return f"the teacher's boxes are read in the format {self.format} (not measured)"
        rows = sorted(self.mean_iou.items(), key=lambda pair: -pair[1])
        second = next((row for row in rows if row[0] != self.format), None)
        others = "" if second is None else f"; the next one, {second[0]}: {second[1]:.2f}"
        return (
            f"the teacher writes boxes in the format {self.format}: mean IoU {self.mean_iou[self.format]:.2f} with the "
            f"known boxes of {self.answers} questions{others}"
        )

    def _size(self, dialogue: Dialogue) -> Size | None:
        """Return the size that numbers refer to: of the image, if all images of a dialogue have the same."""
        if "pixels" not in BOX_FORMATS[self.format].unit:
            return None
        sizes = {self.settings.size_sent(path) for path in dialogue.images}
        return BOX_FORMATS[self.format].size_seen(sizes.pop()) if len(sizes) == 1 else None

    def can_read(self, prompt: Prompt) -> bool:
        """Return False if a prompt is about boxes in pixels of images of different sizes."""
        in_pixels = "pixels" in BOX_FORMATS[self.format].unit
        return not in_pixels or not mentions_box(prompt) or self._size(prompt.dialogue) is not None

    def translate(self, prompt: Prompt) -> Prompt:
        """Return a prompt with its boxes in the teacher's format, which translates answers back."""
        if self.format == CANONICAL:
            return replace(prompt, read=partial(convert, source=CANONICAL, target=CANONICAL))
        size = self._size(prompt.dialogue)
        if size is None and not self.can_read(prompt):
            return prompt
        turns = tuple(
            (self._write(question, size), self._write(answer, size)) for question, answer in prompt.dialogue.turns
        )
        read = partial(_read, format=self.format, size=size)
        return replace(prompt, dialogue=replace(prompt.dialogue, turns=turns), read=read)

    def _write(self, text: str, size: Size | None) -> str:
        # The marks of a name are no boxes: they stay, as the teacher is asked the same question whatever its format.
        return from_canonical(text, self.format, size) if find_boxes(text) else text


def _read(text: str, *, format: str, size: Size | None) -> str:
    if size is None and "pixels" in BOX_FORMATS[format].unit:
        return text  # no image, or several sizes, and no box was asked for
    return convert(text, format, CANONICAL, size)

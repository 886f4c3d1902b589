"""A trained grounded vision-language model on the user's images and questions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from preceptor.arguments import as_list, as_pairs, as_path, as_positive, as_question, as_text
from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.grounding.boxes import Box
from preceptor.data.images import ImageError, load_image
from preceptor.data.types import Dialogue
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError
from preceptor.grounding.config import DialogueDataConfig, GroundingRecipe
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.settings import MODALITIES, as_modality
from preceptor.grounding.sources import read_images
from preceptor.pipeline.image_limits import limits_of_run, name_recipe
from preceptor.pipeline.model_files import require_finite
from preceptor.pipeline.predictions import require_json_lines
from preceptor.pipeline.run_dir import model_folder

BATCH_SIZE = 8
"""Questions that are answered together, if the caller does not say how many."""
MAX_NEW_TOKENS = 128
"""Largest number of tokens of an answer, if the caller does not say how many."""


@dataclass(frozen=True)
class GroundedAnswer:
    """The answer of a vision-language model.

    Attributes:
        id: id of the dialogue, or the file name of the image.
        text: the answer, with its boxes as (x1,y1),(x2,y2) in thousandths, whatever the format of the model.
        probability: mean probability of the tokens of the answer.
        boxes: (x1, y1, x2, y2) of each box in the answer, in thousandths of the width and height of the image.
        unreadable: number of boxes in the answer that cannot be read, such as boxes that are cut off.
    """

    id: str
    text: str
    probability: float
    boxes: tuple[Box, ...]
    unreadable: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary ready for JSON. `unreadable_boxes` is left out if there are none."""
        row = {
            "id": self.id,
            "answers": [{"answer": self.text, "probability": self.probability}],
            "boxes": [list(box) for box in self.boxes],
        }
        return row | {"unreadable_boxes": self.unreadable} if self.unreadable else row


class GroundingModel:
    """A trained grounded vision-language model. Load it with `preceptor.load`."""

    batch_size: ClassVar[int] = BATCH_SIZE
    """Number of items that `predict_rows` computes together."""
    options: ClassVar[Mapping[str, Any]] = {"modality": ""}
    """Inputs of `preceptor predict` that change its rows, with their defaults."""
    default_output: ClassVar[Path | None] = None
    """Where `preceptor predict` writes without `output`; None: nowhere."""

    def __init__(self, vlm: GroundedVlm, folder: Path | None = None) -> None:
        self.vlm, self.folder = vlm.eval(), folder
        self._recipe, limits = limits_of_run(folder, GroundingRecipe)
        self._run_limits = DialogueDataConfig.model_validate(limits)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> Self:
        """Load a run, a stage or a model folder. Raises UserError if a file is missing or damaged."""
        place = model_folder(Path(folder))
        vlm = GroundedVlm.load(place)
        return cls(vlm.to(device) if device is not None else vlm, place)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.vlm.lm_head_weight.device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder, which `preceptor.load` and transformers read."""
        self.vlm.save(Path(folder))

    def ask(
        self,
        image: str | Path | Sequence[str | Path],
        question: str,
        *,
        modality: str = "",
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> GroundedAnswer:
        """Ask a question about one image or several.

        Args:
            image: path or paths.
            question: the question.
            modality: ct, mr, x, pet, endoscopy, dermoscopy, fundus or ultrasound; a model that guides its positions by
                the modality needs it.
            history: earlier (question, answer) turns of the dialogue.
            max_new_tokens: largest number of tokens of the answer, 1 or more.

        Raises:
            UserError: the question is empty or not a text, there is no image, one cannot be read, the modality is
                unknown, or it is needed and missing; or `history` is not a list of pairs.
        """
        paths = [as_path(path, "the image") for path in as_list(image, "image")]
        dialogue = as_dialogue(paths, question, as_modality(modality), history)
        return next(iter(self.ask_dialogues([dialogue], max_new_tokens=max_new_tokens)))

    def ask_many(
        self,
        questions: Iterable[tuple[str | Path, str]],
        *,
        modality: str = "",
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Iterator[GroundedAnswer]:
        """Yield the answers to (image, question) pairs in order. One batch is in memory at a time.

        Raises:
            UserError: as `ask`; `questions` is not a list of pairs; or `batch_size` is below 1.
        """
        modality = as_modality(modality)
        pairs = as_pairs(questions, "questions", "image, question")
        dialogues = (as_dialogue([as_path(image, "the image")], question, modality) for image, question in pairs)
        return self.ask_dialogues(dialogues, batch_size=batch_size, max_new_tokens=max_new_tokens)

    def ask_dialogues(
        self, dialogues: Iterable[Dialogue], *, batch_size: int = BATCH_SIZE, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> Iterator[GroundedAnswer]:
        """Yield the answer to the last question of each dialogue in order.

        Raises UserError if `batch_size` or `max_new_tokens` is below 1.
        """
        size, most = as_positive(batch_size, "batch_size"), as_positive(max_new_tokens, "max_new_tokens")
        return self._answers(dialogues, _DEFAULTS, batch_size=size, max_new_tokens=most)

    def _answers(
        self, dialogues: Iterable[Dialogue], limits: DialogueDataConfig, *, batch_size: int, max_new_tokens: int
    ) -> Iterator[GroundedAnswer]:
        remaining = iter(dialogues)
        while group := list(islice(remaining, batch_size)):
            self._require_modalities(group)
            with self._reading(limits):
                answers = self.vlm.generate(
                    group, max_new_tokens=max_new_tokens, with_confidence=True, batch_size=batch_size
                )
            for dialogue, (answer, *_) in zip(group, answers, strict=True):
                found = find_boxes(answer.text)
                boxes = tuple(box.box for box in found if box.box is not None)
                assert answer.confidence is not None
                require_finite(torch.tensor(answer.confidence), self.folder)
                yield GroundedAnswer(dialogue.id, answer.text, answer.confidence, boxes, len(found) - len(boxes))

    def _require_modalities(self, dialogues: Sequence[Dialogue]) -> None:
        if self.vlm.guidance.kind != "clip":
            return
        for dialogue in dialogues:
            if dialogue.modality not in MODALITIES:
                raise UserError(
                    f"this model guides positions by the modality of an image, and that of {dialogue.id} is "
                    f"{dialogue.modality!r}; give --modality, one of {', '.join(MODALITIES)}"
                )

    @contextmanager
    def _reading(self, limits: DialogueDataConfig) -> Iterator[None]:
        """Read images up to `limits`, and name the setting of the run in an error about them.

        No image is kept: the file at its path may change, and a server promises to remove uploads after the answer.
        """
        encoder = self.vlm.encoder
        before = encoder.max_image_bytes, encoder.max_image_pixels
        encoder.max_image_bytes, encoder.max_image_pixels = limits.max_image_bytes, limits.max_image_pixels
        try:
            yield
        except ImageError as error:
            raise name_recipe(error, self._recipe if limits is self._run_limits else None) from error.__cause__
        finally:
            encoder.max_image_bytes, encoder.max_image_pixels = before
            encoder.forget_images()
            self.vlm.forget_images()

    # What `preceptor predict` calls

    def prediction_file(self, output: Path) -> Path:
        """Return the file that predictions are appended to. Raises UserError if it is a CSV file."""
        return require_json_lines(output)

    def items(
        self,
        *,
        image: Path | None = None,
        question: str | None = None,
        table: Path | None = None,
        modality: str = "",
        **_: Any,
    ) -> Sequence[Dialogue]:
        """Return the dialogues of an image, of a folder of images or of a table.

        Raises UserError if the inputs do not belong together, or if the modality is unknown.
        """
        modality = as_modality(modality)
        if table is not None and image is None and question is None:
            samples = read_table(table, answered=False).samples
            return [replace(as_dialogue([s.image], s.question, modality), id=s.id, group=s.group) for s in samples]
        if image is not None and question is not None and table is None:
            if image.is_dir():
                data = read_images(image, [as_question(question)])
                for finding in data.findings:
                    logging.getLogger("preceptor").warning("%s: %s", finding.file, finding.reason)
                return [replace(row, modality=modality or row.modality) for row in data.samples]
            limits = self._run_limits
            with self._reading(limits):  # names a broken file before anything is computed
                load_image(image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
            return [as_dialogue([image], question, modality)]
        raise UserError("this model needs --image FILE_OR_FOLDER with --question TEXT, or --table FILE")

    def predict_rows(self, items: Sequence[Dialogue], **_: Any) -> Iterator[dict[str, Any]]:
        """Yield one JSON-able row per dialogue. Images may be as large as those of the run."""
        answers = self._answers(items, self._run_limits, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)
        return (answer.to_dict() for answer in answers)


_DEFAULTS = DialogueDataConfig()


def as_dialogue(
    images: Sequence[Path], question: str, modality: str = "", history: Sequence[tuple[str, str]] = ()
) -> Dialogue:
    """Return the dialogue that asks a question about images.

    Raises UserError if there is no image, for a question that is empty or no text, and for a history without pairs.
    """
    if not images:
        raise UserError("no image was given; give at least one")
    pairs = as_pairs(history, "history", "question, answer")
    turns = [(as_text(asked, "history"), as_text(answer, "history")) for asked, answer in pairs]
    return Dialogue(images[0].name, tuple(images), (*turns, (as_question(question), "")), "mia", modality, "", "test")


MODEL = GroundingModel

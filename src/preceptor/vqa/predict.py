"""A trained VQA model on the user's images and questions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from preceptor.arguments import as_pairs, as_path, as_positive, as_question
from preceptor.data.image_folder import find_images
from preceptor.data.images import ImageError, load_image
from preceptor.data.types import Sample
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError
from preceptor.pipeline.image_limits import limits_of_run, name_recipe
from preceptor.pipeline.model_files import require_finite
from preceptor.pipeline.predictions import require_json_lines
from preceptor.pipeline.run_dir import model_folder
from preceptor.vqa.activation_map import activation_map
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import DataConfig, VqaRecipe

log = logging.getLogger("preceptor")

BATCH_SIZE = 64
"""Questions that are answered together, if the caller does not say how many."""
TOP = 3
"""Answers to a question, if the caller does not say how many."""


@dataclass(frozen=True)
class Answer:
    """The answer to a question about an image.

    Attributes:
        id: id of the question, or the file name of the image.
        text: the most probable answer.
        probability: its softmax probability.
        alternatives: the most probable answers with their probabilities, best first; `text` is the first one.
        warnings: sentences for the reader of the answer, such as that the question was truncated.
    """

    id: str
    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]
    _sample: Sample = field(repr=False, compare=False)
    _model: VqaModel = field(repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    def heatmap(self, answer: str | None = None) -> np.ndarray:
        """Return the Grad-CAM map (side, side) in [0, 1] of an answer class, row 0 at the top of the image.

        Without `answer`, the map of the most probable answer. The image file is read again.

        Raises UserError for a text that is no answer class, and if the image cannot be read.
        """
        return self._model.heatmap(self._sample, answer or self.text)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary ready for JSON: `id`, `answers` with their probabilities, best first, and `warnings`."""
        answers = [{"answer": text, "probability": p} for text, p in self.alternatives]
        return {"id": self.id, "answers": answers, "warnings": list(self.warnings)}


class VqaModel:
    """A trained VQA model with its tokenizer, preprocessing and answer classes. Load it with `preceptor.load`."""

    batch_size: ClassVar[int] = BATCH_SIZE
    """Number of items that `predict_rows` computes together."""
    options: ClassVar[Mapping[str, Any]] = {"top": TOP}
    """Inputs of `preceptor predict` that change its rows, with their defaults."""
    default_output: ClassVar[Path | None] = None
    """Where `preceptor predict` writes without `output`; None: nowhere."""

    def __init__(self, bundle: VqaBundle, folder: Path | None = None) -> None:
        self.bundle, self.folder = bundle, folder
        self.bundle.model.eval()
        self._recipe, limits = limits_of_run(model_folder(folder) if folder is not None else None, VqaRecipe)
        self._run_limits = DataConfig.model_validate(limits)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> Self:
        """Load a run, a stage or a model folder. Raises UserError if a file is missing or damaged."""
        bundle = VqaBundle.load(Path(folder))
        if device is not None:
            bundle.model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(bundle, Path(folder))

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(self.bundle.model.parameters()).device

    def answer(self, image: str | Path, question: str, *, top: int = TOP) -> Answer:
        """Answer a question about an image file (PNG, JPEG, DICOM, ...).

        Args:
            image: path of the image.
            question: the question.
            top: number of alternatives to return, 1 or more; at most all answers of the model are.

        Raises:
            UserError: the question is empty or not a text, the image cannot be read, or `top` is below 1.
        """
        return next(iter(self.answer_many([(image, question)], top=top)))

    def answer_many(
        self, questions: Iterable[tuple[str | Path, str]], *, top: int = TOP, batch_size: int = BATCH_SIZE
    ) -> Iterator[Answer]:
        """Yield the answers to (image, question) pairs in order. One batch is in memory at a time.

        Raises:
            UserError: as `answer`; `questions` is not a list of pairs; or `batch_size` is below 1.
        """
        pairs = as_pairs(questions, "questions", "image, question")
        samples = (as_sample(as_path(image, "the image"), question) for image, question in pairs)
        return self.answer_samples(samples, top=top, batch_size=batch_size)

    def answer_samples(
        self, samples: Iterable[Sample], *, top: int = TOP, batch_size: int = BATCH_SIZE
    ) -> Iterator[Answer]:
        """Yield the answers to samples in order.

        A warning is logged once if a question is longer than the model reads. Raises UserError if `top` or `batch_size`
        is below 1.
        """
        size, top = as_positive(batch_size, "batch_size"), as_positive(top, "top")
        return self._answers(samples, _DEFAULTS, top=top, batch_size=size)

    def _answers(self, samples: Iterable[Sample], limits: DataConfig, *, top: int, batch_size: int) -> Iterator[Answer]:
        remaining, warned = iter(samples), False
        truncation = (
            f"question has more than {self.bundle.preprocessing.max_question_tokens} tokens and is truncated; shorten "
            "it, or train the model with a larger data.max_question_tokens"
        )
        classes = self.bundle.vocabulary.answers
        while group := list(islice(remaining, batch_size)):
            examples = self.bundle.examples(group, limits)
            if any(examples.truncated) and not warned:
                warned = True
                log.warning("A %s", truncation)
            with self._reading(limits):
                batch = next(iter(examples.loader([list(range(len(group)))]))).to(self.device)
            with torch.inference_mode():
                logits = self.bundle.model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
            require_finite(logits, self.folder)
            best = logits.softmax(-1).topk(min(top, len(classes)))
            rows = zip(group, examples.truncated, best.indices.tolist(), best.values.tolist(), strict=True)
            for sample, truncated, indices, values in rows:
                alternatives = tuple((classes[i], p) for i, p in zip(indices, values, strict=True))
                warnings = (f"The {truncation}.",) if truncated else ()
                yield Answer(sample.id, *alternatives[0], alternatives, sample, self, warnings)

    def heatmap(self, sample: Sample, answer: str) -> np.ndarray:
        """Return the Grad-CAM map (side, side) in [0, 1] of an answer class for a sample."""
        classes = self.bundle.vocabulary.answers
        if answer not in classes:
            raise UserError(f"{answer!r} is not among the {len(classes)} answers of this model")
        with self._reading(_DEFAULTS):
            batch = next(iter(self.bundle.examples([sample], _DEFAULTS).loader([[0]]))).to(self.device)
        return activation_map(self.bundle.model, batch, classes.index(answer))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder, which `preceptor.load` and transformers read."""
        self.bundle.save(Path(folder))

    @contextmanager
    def _reading(self, limits: DataConfig) -> Iterator[None]:
        """Name the setting of the run in an error about an image that was read with `limits`."""
        try:
            yield
        except ImageError as error:
            raise name_recipe(error, self._recipe if limits is self._run_limits else None) from error.__cause__

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
    ) -> Sequence[Sample]:
        """Return the samples of an image, of a folder of images or of a table.

        `modality` is accepted, so that a question can be put to models of both tasks, and has no effect.

        Raises UserError if the inputs do not belong together.
        """
        if table is not None and image is None and question is None:
            return read_table(table, answered=False).samples
        if image is not None and question is not None and table is None:
            if not image.is_dir():
                limits = self._run_limits
                with self._reading(limits):  # names a broken file before anything is computed
                    load_image(image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
                return [as_sample(image, question)]
            files, findings = find_images(image)
            for finding in findings:
                log.warning("%s: %s", finding.file, finding.reason)
            return [as_sample(file, question, file.relative_to(image).as_posix()) for file in files]
        raise UserError("a VQA model needs --image FILE_OR_FOLDER with --question TEXT, or --table FILE")

    def predict_rows(self, items: Sequence[Sample], *, top: int = TOP, **_: Any) -> Iterator[dict[str, Any]]:
        """Yield one JSON-able row per sample. Images may be as large as those of the run.

        Raises:
            UserError: at once, if `top` is below 1.
        """
        answers = self._answers(items, self._run_limits, top=as_positive(top, "top"), batch_size=BATCH_SIZE)
        return (answer.to_dict() for answer in answers)


_DEFAULTS = DataConfig()


def as_sample(image: Path, question: str, id: str | None = None) -> Sample:
    """Return the sample of a question about an image file. Raises UserError for a question that is empty or no text."""
    return Sample(id or image.name, image, as_question(question), ("",), "open", "", "test")


MODEL = VqaModel

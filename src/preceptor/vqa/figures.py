"""The pictures of a VQA report, made at evaluation: images of some test questions with class activation maps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.images import ImageError, load_image
from preceptor.data.types import Dataset, Sample
from preceptor.report.pictures import FigureWriter
from preceptor.vqa.activation_map import activation_map, color_map, describe_peak
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.dataset import VqaExamples

LONGEST_SIDE = 256  # pixels of an image
MAP_SIDE = 96  # pixels of a map, which the page enlarges


def write_figures(
    folder: Path,
    model: VqaBundle,
    data: Dataset[Sample],
    recipe: VqaRecipe,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Store `recipe.report.questions` test questions with their images and Grad-CAM maps in ``folder/figures``.

    Args:
        folder: folder of the stage.
        model: the trained model; its map is that of the answer that it gave.
        data: the data set.
        recipe: settings of the report and limits for images.
        rows: scored predictions by protocol id, the main protocol first.
    """
    answers = {str(row["id"]): row["answer"] for row in next(iter(rows.values()), [])}
    chosen = choose([sample for sample in data.split("test") if sample.id in answers], recipe.report.questions)
    examples = VqaExamples(chosen, model.tokenizer, model.vocabulary, model.preprocessing, recipe.data)
    classes = {answer: label for label, answer in enumerate(model.vocabulary.answers)}
    device = next(model.model.parameters()).device
    writer, questions = FigureWriter(folder), []
    for number, sample in enumerate(chosen):
        entry: dict[str, Any] = {"id": sample.id, "question": sample.question, "answers": list(sample.answers)}
        entry |= {"answer_type": sample.answer_type, "question_type": sample.question_type}
        try:
            image = load_image(
                sample.image, max_bytes=recipe.data.max_image_bytes, max_pixels=recipe.data.max_image_pixels
            )
        except ImageError:
            image = None
        if image is not None:
            name = f"question-{number + 1:02}"
            entry["image"] = writer.add(name, image.convert("RGB"), LONGEST_SIDE)
            batch = examples.collate([examples[number]]).to(device)
            # The answer of a broken image is empty and has no class: the map is that of the most probable class.
            values = activation_map(model.model, batch, classes.get(answers[sample.id]))
            entry["map"] = writer.add(f"{name}-map", color_map(values, MAP_SIDE), MAP_SIDE)
            entry["peak"] = describe_peak(values)
        questions.append(entry)
    writer.finish({"questions": questions})


def choose(samples: Sequence[Sample], number: int) -> list[Sample]:
    """Choose `number` questions, the same for every model and whatever the order of `samples`.

    Each step takes the question whose kind is rarest among the chosen ones. The order of the kinds is: open or closed,
    question type, image. The hash of the id breaks ties.
    """
    remaining = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode()).hexdigest())
    taken: Counter[tuple[str, Any]] = Counter()
    chosen: list[Sample] = []
    while remaining and len(chosen) < number:
        best = min(remaining, key=lambda sample: [taken[kind] for kind in _kinds(sample)])
        remaining.remove(best)
        chosen.append(best)
        taken.update(_kinds(best))
    return chosen


def _kinds(sample: Sample) -> list[tuple[str, Any]]:
    return [("answer", sample.answer_type), ("type", sample.question_type), ("image", sample.image)]

"""The questions that a report shows: which ones, what each model answered, and where it looked."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from preceptor.data.images import ImageError, load_image
from preceptor.data.types import Dataset, Sample
from preceptor.errors import UserError
from preceptor.report.contents import RunRecord, StageRecord
from preceptor.vqa.config import VqaRecipe

LONGEST_SIDE = 288  # pixels of an image in the report
JPEG_QUALITY = 84


@dataclass
class AnswerView:
    """One model's answer. `picture` is its class activation map as a data URI, `where` the same in words."""

    stage: StageRecord
    answer: str
    probability: float | None
    correct: bool
    picture: str = ""
    where: str = ""


@dataclass
class Question:
    """A question of the report. Without the data set, `text` and `picture` are empty and `target` is normalised."""

    id: str
    target: str
    answer_type: str
    question_type: str
    text: str = ""
    picture: str = ""
    shown: list[AnswerView] = field(default_factory=list)


def choose(rows: Sequence[Mapping[str, Any]], number: int, images: Mapping[str, str] | None = None) -> list[str]:
    """Return the ids of `number` rows, the same whatever the order of `rows`.

    One after the other, the row is taken whose kind is rarest among those taken so far: first right or wrong together
    with open or closed, then the question type, then the image (`images[id]`); among equals the hash of the id decides.
    """
    images = images or {}
    kinds = {
        str(row["id"]): (
            ("answer", row.get("correct"), row.get("answer_type")),
            ("type", row.get("question_type")),
            ("image", images.get(str(row["id"]), str(row["id"]))),
        )
        for row in rows
    }
    left = sorted(kinds, key=lambda id: hashlib.sha256(id.encode()).hexdigest())
    taken: Counter = Counter()
    chosen: list[str] = []
    while left and len(chosen) < number:
        best = min(left, key=lambda id: [taken[kind] for kind in kinds[id]])
        left.remove(best)
        chosen.append(best)
        taken.update(kinds[best])
    return chosen


def questions(run: RunRecord, data: Dataset[Sample] | None, recipe: VqaRecipe | None, number: int) -> list[Question]:
    """Return the chosen questions of the main protocol with every model's answer and class activation map.

    Maps need `data`, `recipe` and the stage's student folder; where one is missing they are left out.
    """
    protocol = next((name for name in run.protocols if run.focus.rows.get(name)), None)
    if protocol is None or number == 0:
        return []
    samples = {sample.id: sample for sample in data.split("test")} if data else {}
    images = {id: str(sample.image) for id, sample in samples.items()}
    rows = {str(row["id"]): row for row in run.focus.rows[protocol]}
    chosen = choose(list(rows.values()), number, images)
    found = {}
    for id in chosen:
        row = rows[id]
        found[id] = Question(id, row.get("target", ""), row.get("answer_type", ""), row.get("question_type", ""))
    pictures = _load_pictures(found, samples, recipe)
    for stage in run.stages:
        if stage.name == stage.kind:  # of an ensemble of teachers, the first alone
            _answer(stage, protocol, found, samples, pictures, recipe)
    return list(found.values())


def _load_pictures(
    found: Mapping[str, Question], samples: Mapping[str, Sample], recipe: VqaRecipe | None
) -> dict[str, Image.Image]:
    """Fill in the text and picture of the questions; return the images by id, without those that cannot be read."""
    limits = {}
    if recipe:
        limits = {"max_bytes": recipe.data.max_image_bytes, "max_pixels": recipe.data.max_image_pixels}
    pictures = {}
    for id, question in found.items():
        if id not in samples:
            continue
        question.text, question.target = samples[id].question, " / ".join(samples[id].answers)
        try:
            image = load_image(samples[id].image, **limits).convert("RGB")
        except ImageError:
            continue
        scale = LONGEST_SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        pictures[id] = image.resize((width, height), Image.Resampling.LANCZOS)
        question.picture = data_uri(pictures[id])
    return pictures


def _answer(
    stage: StageRecord,
    protocol: str,
    found: Mapping[str, Question],
    samples: Mapping[str, Sample],
    pictures: Mapping[str, Image.Image],
    recipe: VqaRecipe | None,
) -> None:
    """Add a stage's answers to the questions, with maps where the model and the image are there."""
    rows = {str(row["id"]): row for row in stage.rows.get(protocol, [])}
    mapped = [id for id in found if id in pictures and id in rows and rows[id].get("prediction")]
    maps = _maps(stage, {id: rows[id]["prediction"] for id in mapped}, samples, recipe) if recipe and mapped else {}
    for id, question in found.items():
        if id not in rows:
            continue
        row = rows[id]
        shown = AnswerView(stage, row.get("prediction", ""), row.get("probability"), bool(row.get("correct")))
        if id in maps:
            from preceptor.vqa.activation_map import overlay, place

            shown.picture, shown.where = data_uri(overlay(pictures[id], maps[id])), place(maps[id])
        question.shown.append(shown)


def _maps(
    stage: StageRecord, answers: Mapping[str, str], samples: Mapping[str, Sample], recipe: VqaRecipe
) -> dict[str, Any]:
    """Return the class activation map of each given answer, by question id; none where the model is gone."""
    from preceptor.vqa.activation_map import activation_map
    from preceptor.vqa.bundle import VqaBundle
    from preceptor.vqa.dataset import VqaExamples

    try:
        bundle = VqaBundle.load(stage.folder / "model")
    except UserError:
        return {}
    classes = {answer: label for label, answer in enumerate(bundle.vocabulary.answers)}
    chosen = [samples[id] for id in answers]
    examples = VqaExamples(chosen, bundle.tokenizer, bundle.vocabulary, bundle.preprocessing, recipe.data)
    maps = {}
    for index, (id, answer) in enumerate(answers.items()):
        # A protocol may write an answer in other words than the classes; it is the most probable class all the same.
        maps[id] = activation_map(bundle.model, examples.collate([examples[index]]), classes.get(answer))
    return maps


def data_uri(image: Image.Image) -> str:
    """Return the image as a JPEG inside a data URI, with no metadata."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

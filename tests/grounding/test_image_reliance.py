"""What other images change in dialogues: known answers of models that find a box, or ignore the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import preceptor
from preceptor.data.grounding.box_formats import write_box
from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.grounding.image_reliance import mirror_boxes
from preceptor.grounding.report import score_tables
from preceptor.tasks import load_recipe
from tests.fault.tiny import CLINKD, write_recipe

WIDTH, HEIGHT = 40, 20


def made_data(folder: Path, patients: int = 12) -> GroundingDataset:
    """One image per patient with a bright square, never in the middle; a question where it is, one what the box is."""
    rows = []
    for number in range(patients):
        x0 = (2, 6, 24, 28)[number % 4]
        image = np.full((HEIGHT, WIDTH), 10, np.uint8)
        image[4:12, x0 : x0 + 8] = 250
        path = folder / f"{number}.png"
        Image.fromarray(image).save(path)
        box = write_box((1000 * x0 / WIDTH, 200, 1000 * (x0 + 8) / WIDTH, 600))
        where = (("Where is the square?", f"It is at {box}"),)
        what = ((f"What is in {box}?", "square"),)
        for task, turns in (("vg", where), ("roc", what)):
            rows.append(Dialogue(f"{number}-{task}", (path,), turns, task, "ct", f"p{number}", "test"))  # type: ignore[arg-type]
    return GroundingDataset("made", "given", folder, rows)


class Answerer:
    """A model that answers by a rule about the pixels (height, width) and the question."""

    def __init__(self, rule: Callable[[np.ndarray, str], str]) -> None:
        self.rule, self.asked = rule, list[Dialogue]()
        self.encoder = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5, 0.4, 0.6]), modality_rows=None)

    def generate(self, dialogues: Sequence[Dialogue], **_: Any) -> list[list[Any]]:
        self.asked += dialogues
        answers = []
        for row in dialogues:
            pixels = np.asarray(Image.open(row.images[0]).convert("RGB"))[:, :, 0]
            answers.append([SimpleNamespace(text=self.rule(pixels, row.turns[-1][0]), confidence=1.0, ended=True)])
        return answers


def finds_the_square(pixels: np.ndarray, question: str) -> str:
    rows, columns = np.nonzero(pixels > 200)
    if len(rows) == 0:
        return "nothing"
    if question.startswith("What"):
        return "square"
    x0, x1 = (1000 * value / pixels.shape[1] for value in (columns.min(), columns.max() + 1))
    return write_box((x0, 1000 * rows.min() / HEIGHT, x1, 1000 * (rows.max() + 1) / HEIGHT))


def measure(folder: Path, model: Any, kinds: Sequence[str] = ("blank", "shuffled", "mirrored")) -> dict[str, Any]:
    recipe = load_recipe("clinkd-demo", [f"output={folder / 'run'}"])
    assert isinstance(recipe, GroundingRecipe)
    experiment = GroundingExperiment(recipe, made_data(folder))
    evaluation = experiment.evaluate(model, protocol="made/given/strict")
    return experiment.image_reliance(model, kinds, evaluation)["made/given/strict"]


def test_a_model_that_finds_the_box_follows_it_into_the_mirrored_image(tmp_path: Path) -> None:
    """It is right on real and mirrored images, wrong on blank ones, and its answers move with the square."""
    found = measure(tmp_path, Answerer(finds_the_square))["vg"]
    assert {kind: entry["score"] for kind, entry in found.items() if kind != "shuffled"} == {
        "real": 1.0,
        "blank": 0.0,
        "mirrored": 1.0,
    }
    assert found["shuffled"]["score"] < 0.5
    assert found["mirrored"]["changed"]["share"] == 1.0
    assert found["blank"]["verdict"] == "worse for this seed"
    assert found["mirrored"]["verdict"] == "undecided"


def test_a_model_that_ignores_the_image_keeps_its_answers(tmp_path: Path) -> None:
    """It always answers the first box, which is right for a quarter of the images."""
    first = write_box((50, 200, 250, 600))
    found = measure(tmp_path, Answerer(lambda _, question: first if question.startswith("Where") else "square"))
    for kind in ("blank", "shuffled", "mirrored"):
        assert found["vg"][kind]["changed"]["share"] == 0.0
        assert found["roc"][kind]["score"] == 1.0
    assert found["vg"]["blank"]["score"] == found["vg"]["real"]["score"] > 0
    assert found["vg"]["shuffled"]["difference"] == 0.0


def test_questions_have_mirrored_boxes_and_images_keep_their_size(tmp_path: Path) -> None:
    model = Answerer(finds_the_square)
    measure(tmp_path, model, ["blank", "mirrored"])
    real, blank, mirrored = (model.asked[start : start + 24] for start in (0, 24, 48))
    for one, plain, other in zip(real, blank, mirrored, strict=True):
        assert other.turns == tuple((mirror_boxes(q), mirror_boxes(a)) for q, a in one.turns)
        assert plain.turns == one.turns
    assert len({row.images for row in mirrored}) == 12  # one file per image, not per question
    assert "(750,200),(950,600)" in mirrored[1].turns[0][0]
    assert "(50,200),(250,600)" in real[1].turns[0][0]
    assert not mirrored[0].images[0].exists()  # the written images are deleted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no box", "no box"),
        ("at <|box_start|>(0,1),(400,5)<|box_end|>.", "at <|box_start|>(600,1),(1000,5)<|box_end|>."),
        ("<|box_start|>(1,2)<|box_end|>", "<|box_start|>(1,2)<|box_end|>"),
    ],
)
def test_mirroring_boxes_twice_gives_the_text(text: str, expected: str) -> None:
    assert mirror_boxes(text) == expected
    assert mirror_boxes(expected) == text


def test_the_modality_of_an_image_is_that_of_the_file_that_it_was_made_from(tmp_path: Path) -> None:
    """The modality probabilities of a scorer are known by path."""
    model, asked = Answerer(finds_the_square), []
    model.encoder.modality_rows = known = lambda dialogue: asked.append(dialogue.images)
    generate = model.generate

    def with_modalities(dialogues: Sequence[Dialogue], **options: Any) -> Any:
        for row in dialogues:
            model.encoder.modality_rows(row)
        return generate(dialogues, **options)

    model.generate = with_modalities  # type: ignore[method-assign]
    measure(tmp_path, model, ["mirrored", "shuffled"])
    assert asked[24:48] == asked[:24]
    assert set(asked[48:]) == set(asked[:24])
    assert all(one != other for one, other in zip(asked[48:], asked[:24], strict=True))
    assert model.encoder.modality_rows is known


def test_the_report_has_a_table_for_each_task(tmp_path: Path) -> None:
    found = measure(tmp_path, Answerer(lambda *_: "square"))
    stages = {"baseline": {"protocols": {"p": {"mean": {}, "n": 24}}, "image_reliance": {"p": found}}}
    titles = [table.title.replace("\u00a0", " ") for table in score_tables({"stages": stages})]
    assert titles[1:] == [
        "p, grounding: asked about other images. In %.",
        "p, classification: asked about other images. In %.",
    ]


@pytest.mark.slow
def test_report_and_card_of_a_trained_model_have_the_tables(tmp_path: Path) -> None:
    settings = ["stages=[baseline]", "student.train.epochs=1", f"data.root={tmp_path / 'data'}"]
    run = preceptor.train(str(write_recipe(tmp_path, CLINKD)), [*settings, f"output={tmp_path / 'run'}"])
    found = preceptor.evaluate(run.folder, images=["blank", "mirrored"])["image_reliance"]
    assert set(found["phantom-grounding/given/strict"]["roc"]) == {"real", "blank", "mirrored"}
    for text in ((run.folder / "report.html").read_text(), (run.folder / "model" / "README.md").read_text()):
        assert "asked about other images" in text

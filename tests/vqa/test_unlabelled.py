"""Images without labels: read, cleared of held-out images, and answered by the teacher alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.api import run_recipe
from preceptor.errors import UserError
from preceptor.tasks import load_recipe
from preceptor.vqa.data import read_data
from preceptor.vqa.experiment import VqaExperiment
from tests.auditing.made import picture, row, write_table
from tests.fault.tiny import write_recipe


def labelled(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number, part in enumerate(["train"] * 8 + ["validation"] * 2 + ["test"] * 2):
        picture(number, 128).save(folder / f"{number}.png")
        rows += [
            row(f"{part}-{number}-{n}", f"{number}.png", part, f"Question {n}?", f"a{n}") | {"group": f"g{number}"}
            for n in range(3)
        ]
    return write_table(folder, rows)


def images(folder: Path, numbers: list[int], side: int) -> Path:
    folder.mkdir()
    for number in numbers:
        picture(number, 128).resize((side, side)).save(folder / f"scan{number}.png")
    return folder


def recipe(tmp_path: Path, table: Path, *overrides: str):
    common = ["data.name=table", f"data.root={table}", "teacher.train.epochs=1", f"output={tmp_path / 'run'}"]
    return load_recipe(str(write_recipe(tmp_path)), [*common, *overrides])


def test_a_folder_of_images_less_those_of_held_out_parts(tmp_path: Path) -> None:
    # 8 and 9 validate, 10 and 11 test; they come again resized.
    folder = images(tmp_path / "more", [8, 10, 40, 41, 42], 90)
    config = recipe(tmp_path, labelled(tmp_path / "own"), f"data.unlabelled=[{folder}]").data
    data = read_data(config, tmp_path / "run" / "data")
    found = data.split("unlabelled")
    assert [s.id for s in found] == ["more:scan40.png", "more:scan41.png", "more:scan42.png"]
    assert all(s.answers == () and s.question == "" for s in found)
    assert any(
        "3 images (0 questions) without labels" in note and "2 images that are also validation or test" in note
        for note in data.notes
    )


def test_a_table_of_questions_and_the_rest_of_a_share(tmp_path: Path) -> None:
    folder = images(tmp_path / "more", [40], 90)
    (folder / "asked.csv").write_text("image,question\nscan40.png,What is it?\n", "utf-8")
    table = labelled(tmp_path / "own")
    config = recipe(tmp_path, table, "data.train_share=0.5", f"data.unlabelled=[rest, {folder / 'asked.csv'}]").data
    data = read_data(config, tmp_path / "run" / "data")
    train, found = data.split("train"), data.split("unlabelled")
    assert (len(train), len(found)) == (12, 13)
    assert {s.question for s in found} == {"Question 0?", "Question 1?", "Question 2?", "What is it?"}
    assert not {s.image for s in found} & {s.image for s in data.samples if s.split != "unlabelled"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [("rest", "set it below 1"), ("vqa-radd", "did you mean 'vqa-rad'"), ("{empty}", "contains no image files")],
)
def test_wrong_entries(tmp_path: Path, entry: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    config = recipe(tmp_path, labelled(tmp_path / "own"), f"data.unlabelled=[{entry.format(empty=tmp_path / 'empty')}]")
    with pytest.raises(UserError, match=said):
        read_data(config.data, tmp_path / "run" / "data")


def test_rows_that_only_the_teacher_answers_are_marked(tmp_path: Path) -> None:
    folder = images(tmp_path / "more", [40], 90)
    made = recipe(
        tmp_path,
        labelled(tmp_path / "own"),
        f"data.unlabelled=[{folder}]",
        "method.teaching.cross_questions=1",
        "data.minimum_answer_count=4",
    )
    experiment = VqaExperiment.read(made)
    # The three answers about one image are too rare to be a class.
    train = experiment.data.split("train")
    rare = train[0].image
    experiment.data.samples = [replace(s, answers=("rare",)) if s.image == rare else s for s in experiment.data.samples]
    examples = experiment.context.training_examples(0, with_teacher=True)
    batch = examples.collate([examples[n] for n in range(len(examples))])
    answered = [id for id, one in zip(batch.ids, batch["answered"].tolist(), strict=True) if one]
    assert sorted(answered) == sorted(sample.id for sample in train)
    assert len(batch) > len(train) == 24
    assert (batch["labels"] >= 0).sum() == 21


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["online", "cached"])
def test_the_distilled_student_alone_sees_them(tmp_path: Path, kind: str) -> None:
    folder = images(tmp_path / "more", [40, 41], 90)
    made = recipe(
        tmp_path,
        labelled(tmp_path / "own"),
        f"data.unlabelled=[{folder}]",
        f"method.teaching.kind={kind}",
        "data.augment.views=1",
        "stages=[teacher, baseline, distilled]",
    )
    results = run_recipe(made)
    stages = results["stages"]
    assert stages["distilled"]["data"]["unlabelled"] == 2
    assert "unlabelled" not in stages["baseline"]["data"]
    assert stages["distilled"]["training"]["steps"] == stages["baseline"]["training"]["steps"]
    assert any("without labels" in note for note in results["notes"])

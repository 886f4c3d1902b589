import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.vqa.baselines import baselines, look_up, majority, question_only
from preceptor.vqa.metrics import score
from preceptor.vqa.protocols import protocols_for


def sample(id, image, question, answer, split="train"):
    closed = answer.lower() in ("yes", "no")
    return Sample(id, Path(image), question, (answer,), "closed" if closed else "open", image, split)


TRAIN = [
    sample("t1", "a", "Is there a mass?", "Yes"),
    sample("t2", "b", "Is there a mass?", "No"),
    sample("t3", "b", "is there a mass", "No"),
    sample("t4", "a", "Which organ is shown here?", "Chest X-ray"),
    sample("t5", "c", "What is the plane of the image?", "Axial"),
    sample("t6", "c", "Is this abnormal?", "Yes"),
    sample("t7", "c", "Is it bright?", "Yes"),
]
TEST = [
    sample("q1", "a", "Is there a mass ?", "-", "test"),
    sample("q2", "a", "Which organ system is shown here?", "-", "test"),
    sample("q3", "new", "What plane is the image?", "-", "test"),
    sample("q4", "b", "What plane is the image?", "-", "test"),
]


def answers(predictions):
    return [p.answer for p in predictions]


def test_majority():
    assert majority(TRAIN, TEST)[0] == Prediction("q1", "yes", 3 / 7)
    assert answers(majority(TRAIN, TEST)) == ["yes"] * 4


def test_question_only():
    predictions = question_only(TRAIN, TEST)
    assert predictions[0] == Prediction("q1", "no", 2 / 3)
    assert answers(predictions) == ["no", "yes", "yes", "yes"]


def test_look_up():
    predictions = look_up(TRAIN, TEST)
    assert answers(predictions) == ["yes", "chest xray", "axial", "axial"]
    # which organ system is shown here / which organ is shown here; what plane is the image / what is the plane of ...
    assert [p.probability for p in predictions] == pytest.approx([1, 5 / 6, 5 / 6, 5 / 6])


def test_look_up_on_the_same_image():
    predictions = look_up(TRAIN, TEST, same_image=True)
    assert answers(predictions) == ["yes", "chest xray", "axial", "no"]  # q3: its image is new, so any will do
    assert predictions[3].probability == pytest.approx(1 / 8)


def test_a_question_without_words_is_answered():
    assert len(look_up(TRAIN, [sample("q", "a", "?", "-", "test")])) == 1


def test_no_test_label_is_read():
    """The same predictions when every label of the test rows is another one."""
    data = Dataset("mine", "", Path("."), TRAIN + TEST)
    masked = [
        replace(s, answers=("Axial",), answer_type="closed", question_type="x", group="g", tags={"x": "y"})
        for s in TEST
    ]
    assert baselines(data) == baselines(replace(data, samples=TRAIN + masked))


def test_validation_is_not_learnt_from():
    extra = [replace(s, id=f"v{i}", split="validation") for i, s in enumerate(TEST * 5)]
    data = Dataset("mine", "", Path("."), TRAIN + TEST)
    assert baselines(data) == baselines(replace(data, samples=extra + TRAIN + TEST))
    assert baselines(replace(data, samples=TEST)) == {}


def read_released(split):
    """A plain reading of the release: every training row, and for `published` every question frame."""
    folder = os.environ.get("PRECEPTOR_DATA")
    if not folder:
        pytest.skip("PRECEPTOR_DATA, the folder with the real data sets, is not set")
    rows = json.loads((Path(folder) / "vqa_rad" / "VQA_RAD Dataset Public.json").read_text())
    samples = []
    for number, row in enumerate(rows):
        part = "test" if row["phrase_type"].startswith("test") else "train"
        image, tags = row["image_name"], {"phrase_type": row["phrase_type"]}
        one = sample(f"{number}", image, row["question"], str(row["answer"]), part)
        samples.append(replace(one, answer_type=row["answer_type"].strip().lower(), tags=tags))
        if split == "published" and row["question_frame"] != "NULL":
            samples.append(replace(one, id=f"{number}-frame", question=row["question_frame"], split="train"))
    return Dataset("vqa-rad", split, Path(folder), samples, leaking=split == "published")


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "rows", "same_image"), [("published", 3064, 60.8), ("no_frames", 1797, 23.9)])
def test_look_up_shows_how_much_a_split_leaks(split, rows, same_image):
    """The image-blind look-up's accuracy on the 451 test rows, as the data set's notes give it."""
    data = read_released(split)
    assert len(data.split("train")) == rows
    protocol = protocols_for(data)[0]
    accuracy = {name: score(data.samples, p, protocol).as_dict() for name, p in baselines(data).items()}
    assert {(a["n"], a["n_open"], a["n_closed"]) for a in accuracy.values()} == {(451, 179, 272)}
    assert 100 * accuracy["look_up_same_image"]["accuracy"] == pytest.approx(same_image, abs=2)

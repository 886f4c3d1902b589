import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.types import Prediction, Sample
from preceptor.errors import UserError
from preceptor.vqa.metrics import OTHER, confusion, score
from preceptor.vqa.protocols import Protocol

EVERYTHING = Protocol("mine/test", "mevf", lambda sample: True, "all")
OPEN = Protocol("mine/open", "mevf", lambda sample: sample.answer_type == "open", "open questions")


def sample(id, answers, answer_type="open", question_type=""):
    return Sample(id, Path("x.jpg"), "q", tuple(answers), answer_type, "x", "test", question_type)


SAMPLES = [
    sample("1", ["Chest X-ray"], "open", "modality"),
    sample("2", ["Two"], "open", "count"),
    sample("3", ["Left lung", "the left hemithorax"], "open", "organ"),
    sample("4", ["Yes"], "closed", "presence"),
    sample("5", ["No"], "closed", "presence"),
]
ANSWERS = {"1": "chest xray", "2": "3", "3": "left hemithorax", "4": "yes", "5": "yes"}
PREDICTIONS = [Prediction(id, answer, 0.5) for id, answer in ANSWERS.items()]


def test_accuracies_by_hand():
    found = replace(score(SAMPLES, PREDICTIONS, EVERYTHING), ceiling=0.8).as_dict()
    assert found == {
        "metric": "accuracy",
        "accuracy": 3 / 5,
        "macro": (0 + 1 + 1 + 1 / 2) / 4,
        # Words in common: both ("X-ray" is one word), none, 2 of 2 and 3, all, none.
        "f1": pytest.approx((1 + 0 + 4 / 5 + 1 + 0) / 5),
        "bleu": found["bleu"],
        # Together: 5 of 7 words and 2 of 2 pairs; the nearest references have 7 words too.
        "bleu_1": pytest.approx(5 / 7),
        "bleu_2": pytest.approx((5 / 7) ** 0.5),
        "bleu_3": 0.0,
        "bleu_4": 0.0,
        "open": 2 / 3,
        "closed": 1 / 2,
        "n": 5,
        "n_open": 3,
        "n_closed": 2,
        "ceiling": 0.8,
        "question_types": {
            "count": {"accuracy": 0.0, "n": 1},
            "modality": {"accuracy": 1.0, "n": 1},
            "organ": {"accuracy": 1.0, "n": 1},
            "presence": {"accuracy": 0.5, "n": 2},
        },
    }


def test_rows():
    rows = score(SAMPLES, PREDICTIONS, EVERYTHING).rows()
    assert rows[2] == {
        "id": "3",
        "group": "1",
        "answer": "left hemithorax",
        "answers": ["Left lung", "the left hemithorax"],
        "prediction": "left hemithorax",
        "probability": 0.5,
        "target": "left hemithorax",  # the accepted answer that was matched
        "correct": True,
        "answer_type": "open",
        "question_type": "organ",
        "score": 1.0,
        "bleu": 1.0,
        "f1": 0.8,
    }
    assert rows[1]["target"] == "2"
    assert json.loads(json.dumps(rows)) == rows


def test_normaliser_is_the_protocols():
    strict = replace(EVERYTHING, normaliser="lower")
    assert score(SAMPLES[:1], PREDICTIONS[:1], strict).accuracy == 0
    assert score(SAMPLES[:1], PREDICTIONS[:1], EVERYTHING).accuracy == 1


@given(st.permutations(PREDICTIONS))
def test_position_does_not_matter(predictions):
    assert score(SAMPLES, predictions, EVERYTHING) == score(SAMPLES, PREDICTIONS, EVERYTHING)


def test_only_selected_questions_count_and_need_a_prediction():
    scores = score(SAMPLES, PREDICTIONS, OPEN)
    assert (scores.accuracy, scores.closed, len(scores.rows())) == (2 / 3, None, 3)
    assert score(SAMPLES, PREDICTIONS[:3], OPEN) == scores


def test_no_question():
    entry = replace(score([], [], EVERYTHING), ceiling=float("nan")).as_dict()
    assert (entry["accuracy"], entry["n"], entry["ceiling"]) == (None, 0, None)
    json.dumps(entry, allow_nan=False)


def test_missing_prediction():
    with pytest.raises(UserError, match="1 of 5 questions have no prediction, the first is '4'"):
        score(SAMPLES, [p for p in PREDICTIONS if p.id != "4"], EVERYTHING)


def test_duplicates():
    with pytest.raises(UserError, match="'5' occurs 2 times among the predictions"):
        score(SAMPLES, [*PREDICTIONS, Prediction("5", "no", 0.9)], EVERYTHING)
    with pytest.raises(UserError, match="'1' occurs 2 times among the samples"):
        score([*SAMPLES, SAMPLES[0]], PREDICTIONS, EVERYTHING)


def test_confusion_by_hand():
    targets = ["yes", "yes", "yes", "no", "no", "left", "right"]
    predictions = ["yes", "no", "left", "no", "yes", "left", "yes"]
    samples = [sample(str(i), [target]) for i, target in enumerate(targets)]
    rows = score(samples, [Prediction(str(i), p, 1.0) for i, p in enumerate(predictions)], EVERYTHING).rows()
    labels, matrix = confusion(rows, most=2)
    assert labels == ["yes", "no", OTHER]
    assert matrix.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 1]]


words = st.sampled_from(["yes", "no", "left", "right", "other", "lung", "liver"])


@given(st.lists(st.tuples(words, words), max_size=40), st.integers(1, 8))
def test_confusion_keeps_every_question(pairs, most):
    samples = [sample(str(i), [target]) for i, (target, _) in enumerate(pairs)]
    rows = score(samples, [Prediction(str(i), p, 1.0) for i, (_, p) in enumerate(pairs)], EVERYTHING).rows()
    labels, matrix = confusion(rows, most)
    assert matrix.shape == (len(labels), len(labels))
    assert matrix.sum() == len(pairs)
    for position, label in enumerate(labels[:-1]):
        assert matrix[position].sum() == sum(target == label for target, _ in pairs)
        assert matrix[position, position] == sum(pair == (label, label) for pair in pairs)
    assert np.all(np.diff(matrix.sum(1)[:-1]) <= 0)

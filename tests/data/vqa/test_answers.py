import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.types import Sample
from preceptor.data.vqa.answers import UNSEEN, AnswerVocabulary, inferred_type
from preceptor.errors import UserError


def sample(*answers, split="train", answer_type="open"):
    return Sample("id", Path("x.jpg"), "q", answers, answer_type, "x", split)


TRAIN = [sample(a) for a in ["Yes", "no", "the liver", "No.", "Liver", "NO", "Chest X-ray", "axial"]]


def test_classes_by_hand():
    vocabulary = AnswerVocabulary.build(TRAIN)
    assert vocabulary.answers == ["no", "liver", "axial", "chest xray", "yes"]
    assert len(vocabulary) == 5
    assert AnswerVocabulary.build(TRAIN, minimum_count=2).answers == ["no", "liver"]
    assert AnswerVocabulary.build(TRAIN, normaliser="lower").answers[0] == "no"
    assert len(AnswerVocabulary.build(TRAIN, normaliser="lower")) == 7


def test_encode():
    vocabulary = AnswerVocabulary.build(TRAIN)
    assert vocabulary.encode(["A liver"]) == 1
    assert vocabulary.encode(["spleen"]) == UNSEEN == -100
    assert vocabulary.encode(["spleen", "Yes", "No"]) == 4  # the first alternative that is known
    assert vocabulary.encode([]) == UNSEEN


def test_a_sample_counts_for_its_first_answer():
    assert AnswerVocabulary.build([sample("left", "right")]).answers == ["left"]


def test_ceiling():
    vocabulary = AnswerVocabulary.build(TRAIN)
    test = [sample("Yes", split="test"), sample("spleen", split="test"), sample("spleen", "liver", split="test")]
    assert vocabulary.ceiling(test) == pytest.approx(2 / 3)
    assert math.isnan(vocabulary.ceiling([]))


@given(
    st.lists(st.sampled_from(["Yes", "no", "The liver", "liver", "lung", "x-ray", "2", "two"]), min_size=1).flatmap(
        lambda answers: st.tuples(st.just(answers), st.permutations(answers))
    )
)
def test_order_of_the_rows_does_not_matter(orders):
    one, other = (AnswerVocabulary.build([sample(a) for a in answers]) for answers in orders)
    assert one == other
    assert one.fingerprint() == other.fingerprint()
    assert one.ceiling([sample(a) for a in orders[0]]) == 1
    assert [one.encode([answer]) for answer in one.answers] == list(range(len(one)))


def test_fingerprint_tells_order_and_normaliser_apart():
    prints = {
        AnswerVocabulary(answers, normaliser).fingerprint()
        for answers in (["yes", "no"], ["no", "yes"], ["yes"])
        for normaliser in ("mevf", "lower")
    }
    assert len(prints) == 6


def test_saved_and_read_again():
    vocabulary = AnswerVocabulary.build(TRAIN)
    again = AnswerVocabulary.from_dict(json.loads(json.dumps(vocabulary.as_dict())))
    assert again == vocabulary
    assert again.fingerprint() == vocabulary.fingerprint()
    assert again.encode(["liver"]) == 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_are_refused(split):
    with pytest.raises(UserError, match=f"'id' is in the {split} split"):
        AnswerVocabulary.build([*TRAIN, sample("yes", split=split)])


@pytest.mark.parametrize(
    ("arguments", "message"), [({"normaliser": "mefv"}, "'mevf'"), ({"minimum_count": 4}, "4 time")]
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        AnswerVocabulary.build(TRAIN, **arguments)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "'answers' must be a list"),
        ({"answers": ["yes", 2], "normaliser": "mevf"}, "'answers' must be a list"),
        ({"answers": ["yes"], "normaliser": None}, "'normaliser' must be"),
        ({"answers": ["yes"], "normaliser": "vqa"}, "unknown answer normaliser 'vqa'"),
        ({"answers": ["yes", "no", "yes"], "normaliser": "mevf"}, "'yes' occurs twice"),
    ],
)
def test_damaged_file(saved, message):
    with pytest.raises(UserError, match=message):
        AnswerVocabulary.from_dict(saved)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("frames", "classes", "ceilings"),
    [("all", 458, (90.5, 79.3, 97.8)), ("training rows'", 415, (75.4, 41.3, 97.8))],
)
def test_classes_of_vqa_rad_as_published(frames, classes, ceilings):
    """Classes and ceilings of the published split (3,064 rows) and the clean one, read from the release directly."""
    folder = os.environ.get("PRECEPTOR_DATA")
    if not folder:
        pytest.skip("PRECEPTOR_DATA, the folder with the real data sets, is not set")
    rows = json.loads((Path(folder) / "vqa_rad" / "VQA_RAD Dataset Public.json").read_text())
    train, test = [], []
    for row in rows:
        one = sample(str(row["answer"]), answer_type=row["answer_type"].strip().lower())
        held_out = row["phrase_type"].startswith("test")
        (test if held_out else train).append(replace(one, split="test") if held_out else one)
        if row["question_frame"] != "NULL" and (frames == "all" or not held_out):
            train.append(one)
    vocabulary = AnswerVocabulary.build(train)
    assert len(vocabulary) == classes
    parts = [test, *([s for s in test if s.answer_type == kind] for kind in ("open", "closed"))]
    assert [round(100 * vocabulary.ceiling(part), 1) for part in parts] == list(ceilings)


@pytest.mark.parametrize("answer", ["Yes", "Yes.", " yes ", "NO!", "no\u3002", "\u201cYes\u201d"])
def test_yes_and_no_are_closed_in_any_case_and_punctuation(answer):
    assert inferred_type(answer) == "closed"


@pytest.mark.parametrize("answer", ["yes, it is", "no one", "yes/no", "nope", ""])
def test_other_answers_are_open(answer):
    assert inferred_type(answer) == "open"

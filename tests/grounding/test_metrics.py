from __future__ import annotations

import pytest

from preceptor.data.grounding.box_formats import write_box, write_reference
from preceptor.errors import UserError
from preceptor.grounding import metrics as dialogues
from preceptor.grounding.captions import METRICS, caption_scores_by_group
from preceptor.grounding.metrics import headline_scores, row_score, score_rows, unit_scores

A, B, C = (100, 100, 300, 300), (500, 500, 700, 900), (0, 0, 50, 50)


def row(id: str, task: str, target: str, prediction: str, modality: str = "ct") -> dict:
    return {
        "id": id,
        "turn": 1,
        "task": task,
        "modality": modality,
        "question": "?",
        "target": target,
        "prediction": prediction,
    }


ROWS = [
    row("1", "vg", write_reference("liver") + write_box(A) + write_box(B), write_box(A) + write_box(C)),  # 1 of 2
    row("2", "vg", write_reference("heart") + write_box(B), "it is (500,500),(700,880)", "mr"),  # found, without marks
    row("3", "roc", "left lung", "The left lung."),  # right for birdeval alone
    row("4", "roc", "liver", "liver", "mr"),
    row("5", "roc", "liver", "spleen", "mr"),
    row("6", "mia", "a brain tumour is seen", "a brain tumour is seen"),
    row("7", "mia", "no", "yes", "mr"),
    row("8", "rc", "an organ: liver.", "an organ: spleen."),
]


@pytest.fixture
def without_java(monkeypatch):
    def missing() -> None:
        raise UserError("caption scores need Java")

    monkeypatch.setattr(dialogues, "require_captions", missing)


def test_by_hand(without_java):
    bird, strict = (score_rows(ROWS, protocol) for protocol in ("birdeval", "strict"))
    assert bird["n"] == 8
    assert bird["tasks"]["vg"]["recall"] == pytest.approx(2 / 3)
    assert bird["modalities"]["ct"]["vg"]["recall"] == pytest.approx(1 / 2)
    assert bird["mean"]["vg"]["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert bird["tasks"]["roc"] == {"accuracy": pytest.approx(2 / 3), "n": 3}
    assert bird["mean"]["roc"]["accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert strict["tasks"]["roc"]["accuracy"] == pytest.approx(1 / 3)
    assert strict["tasks"]["vg"]["recall"] == pytest.approx(2 / 3)
    assert "rc" not in bird["modalities"]["mr"]
    assert bird["mean"]["rc"]["f1"] == bird["tasks"]["rc"]["f1"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_texts_are_scored_by_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    found = score_rows(ROWS, "birdeval")
    (want,) = caption_scores_by_group(
        [({"a": ["a brain tumour is seen"], "b": ["no"]}, {"a": "a brain tumour is seen", "b": "yes"})]
    )
    assert {name: found["tasks"]["mia"][name] for name in want} == pytest.approx(want)
    assert found["notes"] == []


def test_one_call_scores_all_texts_of_both_protocols(monkeypatch):
    calls = []

    def counted(groups):
        calls.append(groups)
        return [dict.fromkeys((*METRICS, "mbmr"), float(len(references))) for references, _ in groups]

    monkeypatch.setattr(dialogues, "require_captions", lambda: None)
    monkeypatch.setattr(dialogues, "caption_scores_by_group", counted)
    dialogues._scored_texts.cache_clear()
    try:
        found = [score_rows(ROWS, protocol) for protocol in ("birdeval", "strict")]
    finally:
        dialogues._scored_texts.cache_clear()
    assert len(calls) == 1
    # All and ct have the same descriptions; all, ct and mr different questions.
    assert [len(references) for references, _ in calls[0]] == [1, 2, 1, 1]
    assert [scores["tasks"]["mia"]["mbmr"] for scores in found] == [2, 2]
    assert found[0]["modalities"]["mr"]["mia"]["mbmr"] == 1


def test_texts_are_cleaned_before_they_are_scored(monkeypatch):
    """As in the published eval_GC.py and eval_MII.py, which clean captions too."""
    seen = []

    def recorded(groups):
        seen.extend(groups)
        return [dict.fromkeys((*METRICS, "mbmr"), 0.0) for _ in groups]

    monkeypatch.setattr(dialogues, "require_captions", lambda: None)
    monkeypatch.setattr(dialogues, "caption_scores_by_group", recorded)
    rows = [row("1", "rc", "a liver.", "assistant\na liver.<|im_end|>\nuser")]
    dialogues._scored_texts.cache_clear()
    try:
        score_rows(rows, "birdeval")
    finally:
        dialogues._scored_texts.cache_clear()
    assert [responses for _, responses in seen] == [{"0": "assistant\na liver."}]
    assert row_score(row("1", "mia", "yes", "assistant\nyes\nuser"), "birdeval") == 1


def test_without_java_nothing_is_put_in_its_place(without_java):
    found = score_rows(ROWS, "birdeval")
    assert found["notes"] == ["caption scores need Java"]
    assert found["tasks"]["mia"]["mbmr"] is None
    assert found["mean"]["mia"]["meteor"] is None
    assert found["tasks"]["vg"]["recall"] == pytest.approx(2 / 3)


def test_rows():
    assert [row_score(r, "birdeval") for r in ROWS] == [0.5, 1, 1, 1, 0, 1, 0, pytest.approx(2 / 3)]
    assert row_score(row("9", "vg", "nothing there", write_box(A)), "strict") is None


def test_unit_scores(without_java):
    """One value per answer, turns of one dialogue are a group; the headline scores are those of the results."""
    rows = [*ROWS, dict(ROWS[0], turn=2), row("9", "vg", "nothing there", write_box(A))]
    scores = unit_scores(rows, "mine/given/birdeval")
    assert len(scores) == len(rows) - 1  # no score without a box to find
    assert {score.metric for score in scores} == {"vg/recall", "roc/accuracy", "rc/f1", "mia/f1"}
    assert [score.id for score in scores if score.group == ROWS[0]["id"]] == ["1", "1, turn 2"]
    assert dict(scores[0].categories) == {"modalities": ROWS[0]["modality"]}
    results = score_rows(ROWS, "birdeval")
    for key, value in headline_scores(ROWS, "mine/given/birdeval").items():
        expected = results
        for part in key.split("."):
            expected = expected[part]
        assert value == expected


def test_unknown_words():
    with pytest.raises(UserError, match=r"protocol 'bird' is not known"):
        score_rows(ROWS, "bird")
    with pytest.raises(UserError, match=r"row 1: task 'vgg'"):
        score_rows([row("1", "vgg", "", "")], "strict")

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.data.types import Prediction, Sample
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import read_predictions, write_predictions
from preceptor.vqa.metrics import score
from preceptor.vqa.predict import Answer
from preceptor.vqa.protocols import Protocol
from preceptor.vqa.score import score_file


def table(folder: Path) -> Path:
    Image.new("L", (8, 8)).save(folder / "a.png")
    rows = [
        {"id": "1", "image": "a.png", "question": "q", "answer": "Yes", "split": "test", "question_type": "presence"},
        {"id": "2", "image": "a.png", "question": "q", "answer": ["Left lung", "lung"], "split": "test"},
        {"id": "3", "image": "a.png", "question": "q", "answer": "two", "split": "test", "question_type": "count"},
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "mine.jsonl"


def predictions(folder: Path, rows: list[dict] | str) -> Path:
    path = folder / "said.jsonl"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return path


SAID = [{"id": "1", "answer": "yes."}, {"id": 2, "prediction": "LUNG"}, {"id": "3", "answer": "three"}]


def test_a_file_of_another_system_against_a_table(tmp_path):
    scored = score_file(predictions(tmp_path, SAID), "mine/given", root=table(tmp_path))
    found = scored.scores
    assert (found["accuracy"], found["closed"], found["open"]) == (pytest.approx(2 / 3), 1.0, 0.5)
    assert found["macro"] == 0.5
    assert scored.rows[1]["answers"] == ["Left lung", "lung"]
    assert not any("ignored" in note for note in scored.notes)
    more = score_file(predictions(tmp_path, [*SAID, {"id": "9", "answer": ""}]), "mine/given", root=table(tmp_path))
    assert more.scores == scored.scores
    assert "1 predictions for questions outside the protocol are ignored: '9' (line 4)." in more.notes


def test_another_normaliser_or_metric_is_noted(tmp_path):
    path, root = predictions(tmp_path, SAID), table(tmp_path)
    scored = score_file(path, "mine/given", root=root, normaliser="lower")
    assert scored.scores["accuracy"] == pytest.approx(1 / 3)
    assert "The normaliser is lower, not the protocol's mevf." in scored.notes
    scored = score_file(path, "mine/given", root=root, metric="bleu")
    assert scored.scores["metric"] == "bleu"
    assert "The metric is bleu, not the protocol's accuracy." in scored.notes
    with pytest.raises(UserError, match="unknown answer normaliser 'mevv'; did you mean 'mevf'"):
        score_file(path, "mine/given", root=root, normaliser="mevv")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "contains no predictions"),
        ('{"id": "1"', r"said\.jsonl:1: invalid JSON"),
        ("\n[1]\n", r"said\.jsonl:2: no id"),
        ('{"id": "1", "answer": 4}', "answer is 4; write the answer as a text"),
        ('{"id": "7", "answer": "x"}', "none of its 1 ids is one of mine/given, such as '1'"),
        (json.dumps(SAID[0]), "2 of 3 questions of mine/given have no prediction: '2', '3'; add a line for each"),
        (json.dumps(SAID[0]) + '\n{"id": "x", "answer": ""}', r"not in the protocol: 'x' \(line 2\)"),
        ("\n".join(json.dumps(row) for row in [*SAID, SAID[0]]), r"said\.jsonl:4: id '1' is also in line 1"),
        ('{"id": "1", "answer": "yes", "prediction": "no"}', "1: id '1' has both answer and prediction"),
        ('{"id": "1", "answer": "yes", "prediction": "no", "answers": ["yes"]}', "has both answer and prediction"),
        *(
            (json.dumps({"id": "1", "answer": "yes", key: value}), f"1: id '1' has both answer and {key}, and one")
            for key, value in {
                **dict.fromkeys(("pred", "output", "response", "model_answer", "predicted_answer", "generated"), "no"),
                **dict.fromkeys(("text", "candidate", "hypothesis", "prediction_text", "Prediction", "llava"), "no"),
                **dict.fromkeys(("pred", "model_answer", "predictedAnswer", "outputs", "result"), None),
                "pred_label": 3,
                "generated": 0,
                "prediction_id": "garbage",
                "output_type": "no",
                "response": True,
                "llava": False,
                "resps": [["no"]],
                "candidates": ["no"],
                "result": {"text": ""},
            }.items()
        ),
    ],
)
def test_faults_are_named(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        score_file(predictions(tmp_path, rows), "mine/given", root=table(tmp_path))


def test_a_reference_in_the_file_does_not_make_answer_the_prediction(tmp_path):
    row = {"id": "1", "answer": "yes", "target": "yes", "pred": "no"}
    with pytest.raises(UserError, match="name the system's answer prediction and the reference answers"):
        score_file(predictions(tmp_path, [row]), "mine/given", references="file")
    row = {"id": "1", "prediction": "no", "answers": ["yes"], "pred": "no", "model": "llava"}
    assert score_file(predictions(tmp_path, [row]), "mine/given", references="file").scores["accuracy"] == 0


def test_the_most_probable_answer_that_predict_wrote_is_the_prediction(tmp_path):
    ranked = {"1": ("yes", "no"), "2": ("brain", "lung"), "3": ("two", "three")}
    rows = [
        Answer(id, one, 0.6, ((one, 0.6), (other, 0.4)), None, None).to_dict()  # type: ignore[arg-type]
        for id, (one, other) in ranked.items()
    ]
    scored = score_file(predictions(tmp_path, rows), "mine/given", root=table(tmp_path))
    assert [row["prediction"] for row in scored.rows] == ["yes", "brain", "2"]
    assert [row["probability"] for row in scored.rows] == [0.6] * 3
    assert scored.scores["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match=r"said.jsonl:1: no answers to score against; add answers or target"):
        score_file(predictions(tmp_path, rows), "mine/given", references="file")


def test_answers_with_other_numbers_that_count_as_right_are_noted(tmp_path):
    pairs = [("15 cm", ["1,5 cm"]), ("1", ["-1"]), ("2", ["two"]), ("5 cm", ["5 cm.", "-5 cm"]), ("1,500", ["1500"])]
    rows = [{"id": str(n), "answer": answer, "answers": known} for n, (answer, known) in enumerate(pairs)]
    scored = score_file(predictions(tmp_path, rows), "mine/given", references="file")
    assert scored.scores["accuracy"] == 1
    (note,) = [note for note in scored.notes if "numbers differ" in note]
    assert note.startswith("2 answers, such as '15 cm' for '1,5 cm', count as right although their numbers differ")
    assert not any(
        "numbers differ" in note
        for note in score_file(predictions(tmp_path, rows[2:]), "mine/given", references="file").notes
    )


def test_a_json_list_is_read(tmp_path):
    expected = score_file(predictions(tmp_path, SAID), "mine/given", root=table(tmp_path)).scores
    for indent in (None, 1):
        path = predictions(tmp_path, json.dumps(SAID, indent=indent))
        assert score_file(path, "mine/given", root=table(tmp_path)).scores == expected
    with pytest.raises(UserError, match=r"said\.jsonl, record 4: id '1' is also in record 1; keep one prediction"):
        score_file(predictions(tmp_path, json.dumps([*SAID, SAID[0]])), "mine/given", root=table(tmp_path))


def test_deep_brackets_in_another_key_are_read(tmp_path):
    deep = '{"id": "1", "answer": "yes", "target": "yes", "x": ' + "[" * 900 + "1" + "]" * 900 + "}"
    assert score_file(predictions(tmp_path, deep), "mine/given", references="file").scores["accuracy"] == 1
    with pytest.raises(UserError, match="has both answer and x"):
        score_file(predictions(tmp_path, deep.replace("[1]", '["no"]')), "mine/given", references="file")


def test_an_answer_with_other_columns_of_the_table_is_the_prediction(tmp_path):
    more = {
        "question": "q",
        "image": "a.png",
        "split": "test",
        "group": "p",
        "answer_type": "open",
        "qid": "7",
        "image_id": "a",
        "question_type": "count",
        "target": "yes",
        "probability": 0.5,
        "seconds": 2,
        "response_time": 0.5,
        "output_tokens": 12,
        "error": None,
        "model": None,
    }
    rows = [{"answer": row.get("answer", row.get("prediction")), "id": row["id"], **more} for row in SAID]
    scores = score_file(predictions(tmp_path, rows), "mine/given", root=table(tmp_path)).scores
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_unknown_protocols_and_missing_references(tmp_path):
    path = predictions(tmp_path, SAID)
    with pytest.raises(UserError, match="give --root TABLE"):
        score_file(path, "mine/given")
    with pytest.raises(UserError, match="has no protocol 'mine/gven'; did you mean 'mine/given'"):
        score_file(path, "mine/gven", root=table(tmp_path))
    with pytest.raises(UserError, match="no answers to score against"):
        score_file(path, "mine/given", references="file")
    empty = predictions(tmp_path, [{"id": "1", "answer": "yes", "answers": ["yes", None]}])
    with pytest.raises(UserError, match=r"said\.jsonl:1: answers contains an empty one"):
        score_file(empty, "mine/given", references="file")
    path = predictions(tmp_path, SAID)
    with pytest.raises(UserError, match="there is no protocol 'vqa-rad/clean/307'"):
        score_file(path, "vqa-rad/clean/307", references="file")
    path.write_bytes(b'{"id": "1", "answer": "\xff"}')
    with pytest.raises(UserError, match="is not UTF-8"):
        score_file(path, "mine/given", root=table(tmp_path))


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("vqa-med-2019/strict", 0.5), ("vqa-med-2019/val/bleu", 0.75), ("slake-zh", 0.5), ("path-vqa", 0.5)],
)
def test_public_protocols_with_the_references_of_the_file(tmp_path, protocol, expected):
    rows = [
        {"id": "1", "answer": "axial", "target": "Axial"},
        {"id": "2", "answer": "left lung", "answers": ["right lung", "heart"], "answer_type": "open"},
    ]
    scores = score_file(predictions(tmp_path, rows), protocol, references="file").scores
    # BLEU of "left lung" for "right lung": one of two words, no pair, so (1/2) ** (1/4).
    assert scores["accuracy"] == pytest.approx((1 + 0.5**0.25) / 2 if "bleu" in protocol else expected)


ANSWERS = st.sampled_from(
    ["Yes", "no", "Left lung.", "left  lung", "The mass", "3", "three", "x-ray", "", "左肺", "a\u2028b", "a\x85b"]
)


@given(
    st.lists(st.tuples(ANSWERS, st.lists(ANSWERS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=9),
    st.sampled_from(["mevf", "lower", "vqa-v2"]),
    st.sampled_from(["accuracy", "bleu"]),
)
def test_our_own_files_give_the_same_numbers_again(tmp_path_factory, pairs, normaliser, metric):
    protocol = Protocol("own/test", normaliser, lambda sample: True, "all", metric=metric)
    samples = [
        Sample(str(n), Path(), "q", tuple(accepted), "open", "g", "test", f"kind {n % 2}")
        for n, (_, accepted) in enumerate(pairs)
    ]
    said = [Prediction(str(n), answer, 0.5) for n, (answer, _) in enumerate(pairs)]
    scores = score(samples, said, protocol)
    folder = tmp_path_factory.mktemp("own")
    write_predictions(folder, {"own/test": scores.rows()})
    assert read_predictions(folder, "own/test") == scores.rows()
    again = score_file(
        folder / "predictions" / "own-test.jsonl", "own/test", references="file", normaliser=normaliser, metric=metric
    )
    assert again.scores == scores.as_dict()


def test_the_command(tmp_path):
    path, root = predictions(tmp_path, SAID), table(tmp_path)
    out = tmp_path / "scored.jsonl"
    done = CliRunner().invoke(
        app, ["score", str(path), "--protocol", "mine/given", "--root", str(root), "--output", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["protocols"]["mine/given"]["accuracy"] == pytest.approx(2 / 3)
    assert [json.loads(line)["correct"] for line in out.read_text().splitlines()] == [True, True, False]

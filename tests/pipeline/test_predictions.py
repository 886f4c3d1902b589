"""Predictions that are written while they are made: a file that was cut anywhere is completed to the same rows."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import preceptor
from preceptor.data.types import Case, Dialogue, Sample, VolumeFile
from preceptor.errors import UserError
from preceptor.pipeline import predictions
from preceptor.pipeline.packed_model import pack, unpack
from preceptor.pipeline.predictions import Origin, model_sha256
from tests.fuzz.model_folders import templates


def item(id: str, text: str = "x", image: Path = Path(__file__)) -> Sample:
    return Sample(id, image, text, ("",), "open", "", "test")


ORIGIN = Origin("0123456789abcdef" * 4, {"top": 3, "post": False})
stream_predictions = partial(predictions.stream_predictions, origin=ORIGIN)


def predict(items: Sequence[Sample]) -> Iterable[dict[str, Any]]:
    return ({"id": one.id, "answer": one.question, "length": len(one.question) / 3} for one in items)


TEXTS = st.text(st.sampled_from('a,"\n\r\u2028 é') | st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
"""Any text, often with quotes, commas and line breaks."""


@settings(max_examples=20)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([".jsonl", ".csv"]))
@example(['a\n"b",\nc', "\n\n", '"\n"'], ".csv")
def test_a_file_cut_at_any_byte_is_completed_to_the_same_rows(texts, suffix) -> None:
    items = [item(f"row-{number}", text) for number, text in enumerate(texts)]
    expected = [row | ORIGIN.columns(one) for one, row in zip(items, predict(items), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out{suffix}"
        assert list(stream_predictions(path, items, predict)) == expected
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert list(stream_predictions(path, items, predict)) == expected
            assert path.read_bytes() == whole


def test_rows_that_are_written_are_not_predicted_again(tmp_path: Path) -> None:
    items = [item(str(number), "x") for number in range(4)]
    asked: list[str] = []

    def watched(remaining: Sequence[Sample]) -> Iterable[dict[str, Any]]:
        for one in remaining:
            asked.append(one.id)
            yield from predict([one])

    stream = stream_predictions(tmp_path / "out.jsonl", items, watched)
    assert [next(stream)["id"], next(stream)["id"]] == ["0", "1"]
    stream.close()
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 2, "each row is written before the next is predicted"
    assert len(list(stream_predictions(tmp_path / "out.jsonl", items, watched))) == 4
    assert asked == ["0", "1", "2", "3"]


@pytest.mark.parametrize("written", range(8))
def test_after_an_interruption_the_same_items_are_computed_together(tmp_path: Path, written: int) -> None:
    """The rows depend on their batch here, as numbers of a network do by rounding."""
    items, path = [item(str(number), "x") for number in range(7)], tmp_path / "out.jsonl"

    def in_batches(remaining: Sequence[Sample]) -> Iterable[dict[str, Any]]:
        for start in range(0, len(remaining), 3):
            batch = remaining[start : start + 3]
            yield from ({"id": one.id, "batch": "+".join(other.id for other in batch)} for one in batch)

    expected = list(stream_predictions(tmp_path / "whole.jsonl", items, in_batches, batch_size=3))
    stream = stream_predictions(path, items, in_batches, batch_size=3)
    assert [next(stream) for _ in range(written)] == expected[:written]
    stream.close()
    assert list(stream_predictions(path, items, in_batches, batch_size=3)) == expected
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("written", [0, 2, 4])
def test_progress_counts_the_rows_in_the_file(tmp_path: Path, written: int) -> None:
    items, path = [item(str(number), "x") for number in range(4)], tmp_path / "out.jsonl"
    list(stream_predictions(path, items[:written], predict))
    calls: list[tuple[int, int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total, path.read_text().count("\n") if path.exists() else 0))

    list(stream_predictions(path, items, predict, progress))
    assert calls == [(done, 4, done) for done in range(written, 5)]


@pytest.mark.parametrize(
    "content",
    [
        "image,question\na.png,where?\n",
        "[1]\n",
        "\xff\n",
        "\x89PNG\r\n\x1a\n\x00IHDR",
        "no line end",
        '{"id": "of a record without a line end"}',
        '{"id": "of another kind"}\n{"id": "and without a line end"}',
        '"id","name"\n"1","x"\n"2","y"',
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, content: str, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"give another --output"):
        list(stream_predictions(path, [item("1", "x")], predict))
    assert path.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("f" * 64, {"top": 3}, "by the model '0123456789abcdef', and this call uses 'ffffffffffffffff'"),
        ("0123456789abcdef" * 4, {"top": 5}, "by the options 'top=3', and this call uses 'top=5'"),
        ("0123456789abcdef" * 4, {"top": 3, "post": True}, "this call uses 'top=3, post'"),
    ],
)
def test_predictions_of_another_model_or_other_options_are_refused(
    tmp_path: Path, suffix: str, model: str, options: dict[str, Any], message: str
) -> None:
    """Also if no id occurs twice: a table has the columns of one model."""
    path = tmp_path / f"out{suffix}"
    list(stream_predictions(path, [item("1")], predict))
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        list(stream_predictions(path, [item("2")], predict, origin=Origin(model, options)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("task", ["vqa", "segmentation", "grounding"])
def test_every_file_that_a_model_reads_enters_its_hash(task: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(templates() / task, model)
    hashes = {model_sha256(model)}
    for file in list(model.iterdir()):
        file.write_bytes(file.read_bytes() + b" ")
        hashes.add(model_sha256(model))
    assert len(hashes) == len(list(model.iterdir())) + 1
    before = model_sha256(model)
    for name in ("README.md", "images.json", ".gitattributes"):  # the card, the training images, of the hub
        (model / name).write_text("{}")
        assert model_sha256(model) == before
    pack(model, tmp_path / "model.zip", {"results.json": b"{}"})
    assert model_sha256(unpack(tmp_path / "model.zip")) == before
    shutil.unpack_archive(tmp_path / "model.zip", tmp_path / "unzipped")
    assert model_sha256(tmp_path / "unzipped") == before


def test_a_model_whose_settings_have_changed_does_not_continue_a_file(tmp_path: Path) -> None:
    """The weights are the same, and the answers are not."""
    model, output = tmp_path / "model", tmp_path / "answers.jsonl"
    shutil.copytree(templates() / "grounding", model)
    ask = {"image": templates() / "image.png", "question": "Where is the liver?", "output": output}
    rows = preceptor.predict(model, **ask)
    assert preceptor.predict(model, **ask) == rows
    (model / "guidance.json").write_text('{"kind": "fixed", "gap": 8.0}')
    with pytest.raises(UserError, match=r"\(a hash of all files that it reads\); give another --output"):
        preceptor.predict(model, **ask)


def test_the_same_id_with_another_question_or_file_is_refused(tmp_path: Path) -> None:
    """Two patients may have images of the same name."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_text(name)
    first = item("x.png", "where?", tmp_path / "a" / "x.png")
    path = tmp_path / "out.jsonl"
    expected = list(stream_predictions(path, [first], predict))
    for other in (item("x.png", "why?", first.image), item("x.png", "where?", tmp_path / "b" / "x.png")):
        with pytest.raises(UserError, match=r"has a prediction of x\.png from other files or another question"):
            list(stream_predictions(path, [other], predict))
    (tmp_path / "copy").mkdir()
    moved = first.image.rename(tmp_path / "copy" / "x.png")
    assert list(stream_predictions(path, [item("x.png", "where?", moved)], predict)) == expected, "the content counts"


def test_only_the_rows_that_were_asked_for_are_returned(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    list(stream_predictions(path, [item("1"), item("2")], predict))
    assert [row["id"] for row in stream_predictions(path, [item("3"), item("2")], predict)] == ["2", "3"]
    assert path.read_text().count("\n") == 3


def test_all_files_of_an_input_enter_its_hash(tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    files = [tmp_path / "flair.nii", series / "1.dcm", series / "2.dcm"]
    for file in files:
        file.write_bytes(b"0")
    case = Case("p", {"flair": VolumeFile(files[0]), "t1": VolumeFile(series)}, None, "p", "test")
    dialogue = Dialogue("d", tuple(files), (("where?", ""),), "vg", "ct", "d", "test")
    for one in (case, dialogue):
        seen = {ORIGIN.columns(one)["input"]}
        for file in files:
            file.write_bytes(file.read_bytes() + b"1")
            seen.add(Origin("", {}).columns(one)["input"])
        assert len(seen) == 4
    mask = replace(case, mask=VolumeFile(tmp_path / "seg.nii"))
    assert Origin("", {}).columns(mask) == Origin("", {}).columns(case), "label maps are not read"

"""Predictions that are written while they are made: a file that was cut anywhere is completed to the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preceptor.errors import UserError
from preceptor.pipeline.predictions import stream_predictions


@dataclass(frozen=True)
class Item:
    id: str
    value: str


def predict(items: Sequence[Item]) -> Iterable[dict[str, Any]]:
    return ({"id": item.id, "answer": item.value, "length": len(item.value) / 3} for item in items)


TEXTS = st.text(st.sampled_from('a,"\n\r\u2028 é') | st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
"""Any text, often with quotes, commas and line breaks."""


@settings(max_examples=20)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([".jsonl", ".csv"]))
@example(['a\n"b",\nc', "\n\n", '"\n"'], ".csv")
def test_a_file_cut_at_any_byte_is_completed_to_the_same_rows(texts, suffix) -> None:
    items = [Item(f"row-{number}", text) for number, text in enumerate(texts)]
    expected = list(predict(items))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out{suffix}"
        assert list(stream_predictions(path, items, predict)) == expected
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert list(stream_predictions(path, items, predict)) == expected
            assert path.read_bytes() == whole


def test_rows_that_are_written_are_not_predicted_again(tmp_path: Path) -> None:
    items = [Item(str(number), "x") for number in range(4)]
    asked: list[str] = []

    def watched(remaining: Sequence[Item]) -> Iterable[dict[str, Any]]:
        for item in remaining:
            asked.append(item.id)
            yield from predict([item])

    stream = stream_predictions(tmp_path / "out.jsonl", items, watched)
    assert [next(stream)["id"], next(stream)["id"]] == ["0", "1"]
    stream.close()
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 2, "each row is written before the next is predicted"
    assert len(list(stream_predictions(tmp_path / "out.jsonl", items, watched))) == 4
    assert asked == ["0", "1", "2", "3"]


@pytest.mark.parametrize("written", range(8))
def test_after_an_interruption_the_same_items_are_computed_together(tmp_path: Path, written: int) -> None:
    """The rows depend on their batch here, as numbers of a network do by rounding."""
    items, path = [Item(str(number), "x") for number in range(7)], tmp_path / "out.jsonl"

    def in_batches(remaining: Sequence[Item]) -> Iterable[dict[str, Any]]:
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
    items, path = [Item(str(number), "x") for number in range(4)], tmp_path / "out.jsonl"
    list(stream_predictions(path, items[:written], predict))
    calls: list[tuple[int, int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total, path.read_text().count("\n") if path.exists() else 0))

    list(stream_predictions(path, items, predict, progress))
    assert calls == [(done, 4, done) for done in range(written, 5)]


@pytest.mark.parametrize("content", ["image,question\na.png,where?\n", "[1]\n", "\xff\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, content: str, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    path.write_text(content, "latin-1")
    with pytest.raises(UserError, match="holds something else than predictions; give another --output"):
        list(stream_predictions(path, [Item("1", "x")], predict))
    assert path.read_text("latin-1") == content

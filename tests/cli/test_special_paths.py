"""Pipes in the place of files, and the home folder in options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from preceptor.cli.options import expand_home
from preceptor.data.texts import read_text
from preceptor.errors import UserError
from preceptor.grounding.score import _text
from preceptor.pipeline.run_dir import read_predictions, read_results
from tests.command_line import call


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for read in (read_text, _text):
        with pytest.raises(UserError, match="is not a file"):
            read(tmp_path / "pipe.jsonl")
    code, _, err = call("new-vlm", tmp_path / "out", "--corpus", tmp_path / "pipe.jsonl")
    assert (code, "is not a file" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_the_home_folder_of_an_output_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand_home(Path("~/out")) == Path("/home/someone/out")
    assert expand_home(None) is None


@pytest.mark.parametrize("data", [b"null", b"[1]", b"{", b"\xff", b"1", b"[" * 100_000])
def test_damaged_files_of_a_run_are_named(tmp_path, data):
    (tmp_path / "results.json").write_bytes(data)
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        read_results(tmp_path)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "a-b.jsonl").write_bytes(b'{"id": 1}\n' + data + b"\n")
    with pytest.raises(UserError, match=r"a-b\.jsonl, line 2 is damaged"):
        read_predictions(tmp_path, "a/b")

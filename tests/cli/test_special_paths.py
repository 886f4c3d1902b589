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
from tests.fuzz.model_folders import templates


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


def test_the_home_folder_of_an_input_is_expanded(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name, source in (("a.png", "image.png"), ("flair.nii", "p0_flair.nii")):
        (home / name).write_bytes((templates() / source).read_bytes())
    (home / "t.jsonl").write_text('{"image": "a.png", "question": "Where?"}\n')
    vqa, segmentation = templates() / "vqa", templates() / "segmentation"
    for arguments in (
        (vqa, "--image=~/a.png", "--question", "Where?"),
        (vqa, "--table=~/t.jsonl"),
        (segmentation, "--case=~/flair.nii", "--output=~/a"),
        (segmentation, "flair=~/flair.nii", "--output=~/b"),
    ):
        code, _, err = call("predict", *arguments)
        assert code == 0, err
    assert {"a", "b"} <= {path.name for path in home.iterdir()}
    for arguments in (
        ("predict", vqa, "--image=~/none", "--question", "Where?"),
        ("audit", "slake", "--root=~/none"),
        ("audit", "slake", "--against", "vqa-rad", "--against-root=~/none"),
        ("serve", vqa, "--token-file=~/none"),
    ):
        code, _, err = call(*arguments)
        assert (code, f"'{home}/none' does not exist" in err) == (2, True), err
    code, _, err = call("doctor", "mhkd-demo", "--teacher=~/a.png")
    assert (code, f"Directory '{home}/a.png' is a file" in err) == (2, True), err
    code, _, err = call("export", vqa, "--output=~/c", "--table=~/a")
    assert (code, f"File '{home}/a' is a directory" in err) == (2, True), err


@pytest.mark.parametrize("data", [b"null", b"[1]", b"{", b"\xff", b"1", b"[" * 100_000])
def test_damaged_files_of_a_run_are_named(tmp_path, data):
    (tmp_path / "results.json").write_bytes(data)
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        read_results(tmp_path)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "a-b.jsonl").write_bytes(b'{"id": 1}\n' + data + b"\n")
    with pytest.raises(UserError, match=r"a-b\.jsonl, line 2 is damaged"):
        read_predictions(tmp_path, "a/b")

"""`preceptor teach` as a command: what it prints, its exit codes, and being killed and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.errors import UserError
from preceptor.grounding.pseudo_labels import PseudoLabels
from preceptor.grounding.sources import read_dialogues
from preceptor.teachers.label_store import Label, read_labels
from tests.grounding.answering_server import server_options, serving
from tests.grounding.asked_data import image


def file_of(folder: Path, records: int) -> Path:
    file = folder / "miller.jsonl"
    with file.open("w") as lines:
        for i in range(records):
            name = image(folder / "pictures", i % 5).name
            said = [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": "yes"}]
            row = {"image": f"pictures/{name}", "group": f"g{i % 5}", "split": "train", "conversations": said}
            lines.write(json.dumps(row) + "\n")
    return file


def teach(*arguments: object):
    return CliRunner().invoke(app, ["teach", *map(str, arguments)])


def test_answers_are_written_and_summed_up(tmp_path):
    file = file_of(tmp_path, 7)
    with serving() as asked:
        given = (file, *server_options(asked, tmp_path / "store"), "--json")
        done = teach(*given)
        again = teach(*given)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert {name: document[name] for name in ("questions", "before", "answered", "unanswered", "tokens")} == {
        "questions": 7,
        "before": 0,
        "answered": 7,
        "unanswered": {},
        "tokens": 7 * 13,
    }
    assert document["with_confidence"] == 7
    assert "7 questions: about 7 tokens of images" in done.stderr
    assert (json.loads(again.stdout)["before"], json.loads(again.stdout)["answered"]) == (7, 0)
    assert len(asked.bodies) == 7
    assert PseudoLabels.open(tmp_path / "store", read_dialogues(str(file))).coverage == 1
    assert b"miller" not in (tmp_path / "store" / "labels.sqlite").read_bytes()


def test_what_is_not_answered_gives_exit_code_1(tmp_path):
    file = file_of(tmp_path, 3)
    with serving(lambda number, body: (400, {}, "too long") if number == 1 else None) as asked:
        done = teach(file, *server_options(asked, tmp_path / "store"), "--concurrent", 1)
    assert done.exit_code == 1
    assert "not answered: 1: it answers with 400" in done.stdout
    assert len(list(read_labels(tmp_path / "store"))) == 2


def test_nothing_is_asked_before_the_estimate_is_confirmed(tmp_path):
    file = file_of(tmp_path, 3)
    with serving() as asked:
        server = ("--endpoint", asked.url, "--model", "m", "--output", tmp_path / "store")
        with pytest.raises(UserError, match="stdin is not a terminal"):
            CliRunner().invoke(app, ["teach", str(file), *map(str, server)], catch_exceptions=False)
        with pytest.raises(UserError, match="is above --max-tokens-total 100"):
            CliRunner().invoke(
                app, ["teach", str(file), *map(str, server), "--max-tokens-total", "100"], catch_exceptions=False
            )
        assert asked.bodies == []
        assert teach(file, *server, "--max-tokens-total", 10_000).exit_code == 0
    assert len(asked.bodies) == 3


def test_mistakes(tmp_path):
    file = file_of(tmp_path, 2)
    output = ("--output", tmp_path / "store")
    for arguments, said in [
        ((file,), "either --teacher DIR or --endpoint URL"),
        ((file, "--endpoint", "http://127.0.0.1:1/v1"), "belong together"),
        ((file, "--endpoint", "http://10.0.0.1/v1", "--model", "m"), "is not this machine"),
        (
            (file, "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--api-key-env", "NO_SUCH"),
            "variable does not exist",
        ),
        ((file, "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--split", "unlabelled"), "has no unlabelled"),
        (
            (file, file, "--root", tmp_path, "--endpoint", "http://127.0.0.1:1/v1", "--model", "m"),
            "one data set at a time",
        ),
        ((tmp_path / "none.jsonl", "--teacher", tmp_path), "none.jsonl does not exist"),
    ]:
        with pytest.raises(UserError, match=said):
            CliRunner().invoke(app, ["teach", *map(str, arguments), *map(str, output)], catch_exceptions=False)
    for wrong in (("--split", "test"), ("--teacher", tmp_path / "none")):
        result = CliRunner().invoke(app, ["teach", str(file), *map(str, wrong), *map(str, output)])
        assert result.exit_code == 2
        assert str(wrong[1]) in result.output
    assert not (tmp_path / "store").exists()


def test_images_of_the_test_part_are_not_asked_about(tmp_path):
    file = file_of(tmp_path, 5)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["split"] = "test"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving() as asked:
        done = teach(
            file,
            tmp_path / "pictures",
            "--question",
            "What?",
            "--split",
            "unlabelled",
            "--yes",
            "--json",
            "--endpoint",
            asked.url,
            "--model",
            "m",
            "--output",
            tmp_path / "store",
        )
    document = json.loads(done.stdout)
    assert document["questions"] == 4
    assert "1 dialogues about validation or test images were left out." in document["notes"]


def start(file: Path, url: str, output: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "preceptor",
        "teach",
        file,
        "--endpoint",
        url,
        "--model",
        "m",
        "--output",
        output,
        "--yes",
        "--temperature",
        "0.5",
        "--candidates",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_hears_interrupts
    )


def _hears_interrupts() -> None:
    """A shell starts its background jobs, and so whatever runs the tests, deaf to SIGINT; children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def lines(output: Path) -> list[Label]:
    """The labels of a store, by key; none as long as there is no store."""
    stored = read_labels(output) if (output / "labels.sqlite").is_file() else []
    return sorted(stored, key=lambda label: label.key)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_undisturbed(tmp_path):
    file = file_of(tmp_path, 60)
    with serving() as asked:
        process = start(file, asked.url, tmp_path / "whole")
        assert process.wait(300) == 0
    with serving(delay=0.1) as asked:
        for point in (1, 17, 35, 50):
            process = start(file, asked.url, tmp_path / "cut")
            deadline = time.monotonic() + 300
            while len(lines(tmp_path / "cut")) < point:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.01)
            process.kill()
            assert process.wait(300) == -signal.SIGKILL
            assert len(lines(tmp_path / "cut")) < 60
        assert start(file, asked.url, tmp_path / "cut").wait(300) == 0
        # Asked anew is only what was under way: at most eight at a time, four times.
        assert 60 <= len(asked.bodies) <= 60 + 4 * 8
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_interrupted_it_keeps_what_it_has(tmp_path):
    file = file_of(tmp_path, 30)
    with serving(lambda number, body: "hang" if number >= 12 else None) as asked:
        process = start(file, asked.url, tmp_path / "store")
        deadline = time.monotonic() + 300
        while len(asked.bodies) < 13 or len(lines(tmp_path / "store")) < 12:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        # The server would hang for another five minutes.
        assert process.wait(120) == 130
    assert process.stderr is not None
    said = process.stderr.read()
    assert "interrupted; the answers are saved" in said
    assert "Traceback" not in said
    assert len(list(read_labels(tmp_path / "store"))) == 12

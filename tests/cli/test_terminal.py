"""Tables, notes and progress at 80 and 120 columns."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console, Group

from preceptor.cli import terminal
from preceptor.training import progress
from preceptor.training.progress import Progress, duration

PROSE = "The teacher modalities are elected during training, and the remaining modalities learn similar features."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[80, 120])
def columns(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return request.param


def test_prose_is_left_aligned_and_wrapped_at_words(columns, capsys):
    rows = [["image-1.png", PROSE, "3"], ["image-2.png", "short", "12"]]
    terminal.table("findings", ["place", "finding", "rows"], rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    text = [line for line in lines if line.startswith(("image", " "))]
    begin = lines[2].index("finding")
    wrapped = [line[begin : lines[2].index("rows")].rstrip() for line in text]
    assert not any(part.startswith(" ") for part in wrapped)
    assert " ".join(" ".join(wrapped).split()) == f"{PROSE} short"
    assert text[0].rstrip().endswith("  3")


def test_numbers_are_aligned_right_and_never_cut(columns, capsys):
    rows = [["baseline", "9.1", "-", "1.2 to 3.4", "4.70 M"], ["distilled", "81.25", "12", "-", "12.00 M"]]
    terminal.table("scores " * 30, ["model", "accuracy on all", "n", "95 % interval", "parameters of the model"], rows)
    out = capsys.readouterr().out
    for row in rows:
        for cell in row:
            assert cell in out
    first, second = (next(line for line in out.splitlines() if line.startswith(row[0])) for row in rows)
    assert first.index("9.1") + 3 == second.index("81.25") + 5


def test_markup_in_a_cell_is_text(capsys):
    terminal.table("[bold]title", ["a"], [["[red]x[/red]"]])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "[bold]title" in out


def test_notes_are_wrapped_in_a_terminal_only(columns, monkeypatch, capsys):
    terminal.notes([PROSE * 2, PROSE * 2])
    assert capsys.readouterr().out == f"note: {PROSE * 2}\n"
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    terminal.notes([PROSE * 2])
    lines = shown.getvalue().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= columns
    assert " ".join(map(str.strip, lines)) == f"note: {PROSE * 2}"


def test_log_messages_are_wrapped_in_a_terminal(columns, monkeypatch):
    terminal.log_to_stderr()
    monkeypatch.setattr(sys, "stderr", Terminal())
    logging.getLogger("preceptor").info(PROSE * 2)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= columns
    assert " ".join(lines) == PROSE * 2


METRICS = {"step": 50, "epoch": 1.0, "lr": 0.1, "grad_norm": 2.0, "loss": 1.23456, "label": 0.5, "output": 0.73456}
MANY = {f"term{number}": 0.25 for number in range(20)}


@pytest.mark.parametrize("title", ["baseline", "distilled", "teacher 2"])
def test_a_terminal_shows_bar_step_time_left_and_loss_in_one_line(columns, title):
    with Progress(title, 123_456) as shown:
        shown.live = True
        shown.update(METRICS | MANY | {"samples/s": 12.0})
        shown.advance(50_000)
        console = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(Group(*shown.bar.get_renderables()))
        bar, terms, *rest = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert not [line for line in rest if line.strip()]
    assert len(bar) <= columns
    assert bar.startswith(title)
    assert "━" * 10 in bar
    assert "50000/123456" in bar
    assert " left " in bar
    assert bar.rstrip().endswith("loss 1.2346")
    assert terms.startswith("label 0.5000  output 0.7346")
    assert "lr" not in terms
    assert len(terms) <= columns


def test_plain_lines_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("distilled", 200, done=100) as shown:
        for step in range(101, 201):
            now[0] += 1
            shown.update(METRICS)
            shown.advance(step)
            if step == 150:
                shown.message("step 150: validation 0.8000 (best so far)")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "distilled: 115/200, 0:01:25 left, loss 1.2346"
    assert "distilled: step 150: validation 0.8000 (best so far)" in lines
    assert lines[-1] == "distilled: 200/200, 0:00:00 left, loss 1.2346"
    assert len(lines) == 8
    assert "\x1b" not in captured.err


def test_nothing_is_shown_by_other_processes(capsys):
    with Progress("distilled", 3, enabled=False) as shown:
        shown.advance(3)
        shown.message("done")
    assert capsys.readouterr() == ("", "")


def test_progress_of_a_command_is_plain_lines_without_a_terminal(capsys):
    with terminal.show_progress("predictions") as shown:
        for done in range(4):
            shown(done, 3)
    assert capsys.readouterr() == ("", "predictions: 3/3, 0:00:00 left\n")


def test_progress_of_one_item_is_not_shown(capsys):
    with terminal.show_progress("predictions") as shown:
        shown(0, 1)
        shown(1, 1)
    assert capsys.readouterr() == ("", "")


def test_the_bar_of_a_command_starts_at_what_is_done(columns, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.show_progress("predictions") as shown:
        shown(7, 40)
    assert "7/40" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_durations():
    assert duration(59.6) == "0:01:00"
    assert duration(36_000) == "10:00:00"


def test_log_messages_go_to_the_standard_error_of_the_moment(monkeypatch, capsys):
    terminal.log_to_stderr()
    terminal.log_to_stderr()
    other = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", other)
        logging.getLogger("preceptor").info("above the bar")
    logging.getLogger("preceptor").info("later")
    assert other.getvalue() == "above the bar\n"
    assert capsys.readouterr().err == "later\n"


def test_an_ascii_terminal_shows_escapes_and_json_stays_json():
    program = (
        "import preceptor.cli.errors as e, preceptor.cli.terminal as t; e.print_any_character(); "
        "t.say({'answer': '\\u80ba \\xe9 \\U0001f600'}, {}, lambda d: t.sentence(d['answer']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for as_json, expected in ((False, "\\u80ba \\xe9 \\U0001f600\n"), (True, None)):
        command = [sys.executable, "-c", program.replace("{}", str(as_json))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        if expected is None:
            assert json.loads(done.stdout) == {"answer": "肺 é 😀"}
        else:
            assert done.stdout == expected

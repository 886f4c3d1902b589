"""A second process that would write into the same place is refused; after SIGKILL of the first, nobody is blocked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fault.tiny import fork_cli, wait
from tests.fault.verbs import Inputs, Signal, contents, forked_call, hidden


@contextmanager
def stopped(command: list[object], place: Path, number: int, log: Path) -> Iterator[int]:
    """Run a command up to just before its `number`-th change of a file, and kill it at the end of the block."""
    pid = fork_cli(list(map(str, command)), log, Signal(place, number, signal.SIGSTOP))
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), log.read_text()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL


PAIRS = {
    "two teachers of one store": ("teach", "teach"),
    "two caches in one folder": ("cache", "cache"),
    "two caches of grounding in one folder": ("cache of grounding", "cache of grounding"),
    "two trainings in one folder": ("train", "train"),
    "two trainings of several seeds in one folder": ("train seeds", "train seeds"),
    "a training while a cache is written": ("cache", "train"),
    "two predictions into one file": ("predict", "predict"),
    "two predictions of masks into one folder": ("predict masks", "predict masks"),
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_the_second_is_refused_and_a_killed_first_one_blocks_nobody(
    inputs: Inputs, output: Path, tmp_path: Path, pair: str
):
    def command(verb: str) -> list[object]:
        name = verb.removesuffix(" seeds")
        arguments = inputs.arguments(verb if name == verb else "train", output)
        return arguments if name == verb else [*arguments, "--seeds", 2]

    first, second = map(command, PAIRS[pair])
    place, counter = output.parent, Signal(output.parent)
    before = contents(place)
    code, err = forked_call(first, counter)
    assert code == 0, err
    whole = contents(place)
    for name in set(whole) - set(before):
        (place / name).unlink()
    written = place / "cached" if "grounding" in pair else output
    with stopped(first, place, counter.count // 2 + 1, tmp_path / "log") as pid:
        code, err = forked_call(second)
        assert code == 2, err
        assert "Traceback" not in err
        sentence = " ".join(err[err.rindex("error: ") :].split())
        assert str(written) in sentence
        assert f"process {pid}" in sentence or "nother process" in sentence
    code, err = forked_call(first)
    assert code == 0, err
    assert contents(place) == whole
    assert hidden(place) == []

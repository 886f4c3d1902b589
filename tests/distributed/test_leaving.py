"""Each process leaves its group at exit: gloo's threads must not meet an interpreter that is shut down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_two_processes import ENVIRONMENT, LAUNCHERS

pytestmark = pytest.mark.slow


def end(folder: Path, situation: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "tests.distributed.leaving", str(folder), situation]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_the_group_and_its_threads_have_ended_when_the_interpreter_ends(tmp_path):
    done = end(tmp_path, "done")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"end-of-{rank}.txt").read_text() for rank in (0, 1)] == ["False 0", "False 0"]


def test_a_process_with_an_error_ends_although_the_other_one_never_joins_its_communication(tmp_path):
    done = end(tmp_path, "pending")
    assert done.returncode != 0
    assert "exitcode  : 2 " in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "end-of-1.txt").exists()
    assert not (tmp_path / "end-of-0.txt").exists(), "the launcher has stopped it"

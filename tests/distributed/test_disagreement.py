"""Two processes that see different scores take the same decisions, and neither waits for the other for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed.test_two_processes import ENVIRONMENT, LAUNCHERS


@pytest.mark.slow
def test_the_scores_of_the_first_process_count(tmp_path):
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "tests.distributed.disagreeing", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [file.read_text() for file in sorted(tmp_path.glob("steps-*.txt"))]  # printed lines may mix
    assert len(steps) == 2
    assert steps[0] == steps[1]

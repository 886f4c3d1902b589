"""Ctrl-C and SIGTERM at any moment, and checkpoints that a disk has damaged: the next run ends byte-equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STOPS = 10


def scenario(folder: Path) -> None:
    """Runs in a process of its own, which forks the runs that are stopped."""
    from tests.fault.test_kill import weights
    from tests.fault.tiny import fork_cli, wait, write_recipe

    recipe = str(write_recipe(folder))

    def start(output: Path) -> int:
        settings = [f"output={output}", f"data.root={folder / 'data'}", "stages=[teacher,baseline]", "data.workers=1"]
        epochs = ["teacher.train.epochs=10", "student.train.epochs=10"]
        return fork_cli(["train", recipe, *settings, *epochs], folder / "log")

    def steps(run: Path) -> int:
        return sum(path.read_bytes().count(b"\n") for path in run.glob("*/metrics.jsonl"))

    assert wait(start(folder / "whole")) == 0
    rng = random.Random(0)
    # Points of progress, not moments: how quick the machine is must not decide whether a run is caught.
    points = sorted(rng.sample(range(1, int(0.9 * steps(folder / "whole"))), STOPS))
    codes, damaged = [], False
    for point in points:
        pid = start(folder / "cut")
        deadline = time.monotonic() + 120
        while steps(folder / "cut") < point and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.002)
        os.kill(pid, rng.choice([signal.SIGINT, signal.SIGTERM]) if codes else signal.SIGINT)
        codes.append(wait(pid))
        if codes[-1] == 0:
            break
        saved = sorted((folder / "cut").glob("*/checkpoints/step-*/task.safetensors"), key=lambda p: p.stat().st_mtime)
        if len(saved) >= 2 and not damaged:
            data = bytearray(saved[-1].read_bytes())
            data[-3] ^= 0x10
            saved[-1].write_bytes(bytes(data))
            damaged = True
    assert damaged
    assert wait(start(folder / "cut")) == 0
    # 130 saved, -15 a SIGTERM outside the training loop, 0 where the run had ended already.
    assert set(codes) <= {130, -signal.SIGTERM, 0}, codes
    assert codes.count(130) >= 2, codes
    assert weights(folder / "cut") == weights(folder / "whole")
    said = (folder / "log").read_text()
    assert "run the same command again to resume" in said
    assert ": task.safetensors does not match its checksum" in said
    assert "Traceback" not in said, said[-3000:]


@pytest.mark.slow
def test_stopped_at_any_moment_and_damaged_is_byte_equal(tmp_path):
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "import preceptor.vqa.experiment, preceptor.vqa.report, preceptor.vqa.model_card, transformers, pathlib\n"
        "from tests.fault.test_interrupt import scenario\n"
        f"scenario(pathlib.Path({str(tmp_path)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]

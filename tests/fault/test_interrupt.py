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
SETTINGS = {
    "vqa": ["stages=[teacher,baseline]", "teacher.train.epochs=10", "student.train.epochs=10", "data.workers=1"],
    "segmentation": ["train.epochs=10", "data.workers=1"],
    "grounding": ["stages=[teacher,clinkd]"],
}
STOPS = {"vqa": 10, "segmentation": 5, "grounding": 5}


def scenario(folder: Path, task: str) -> None:
    """Stop and restart a training many times. Runs in its own process, which forks the trainings."""
    from tests.fault.test_kill import weights
    from tests.fault.tiny import CLINKD, LCKD, RECIPE, fork_cli, wait, write_recipe

    recipe = str(write_recipe(folder, {"vqa": RECIPE, "segmentation": LCKD, "grounding": CLINKD}[task]))

    def start(output: Path) -> int:
        places = [f"output={output}", f"data.root={folder / 'data'}"]
        return fork_cli(["train", recipe, *places, *SETTINGS[task]], folder / "log")

    def steps(run: Path) -> int:
        return sum(path.read_bytes().count(b"\n") for path in run.glob("*/metrics.jsonl"))

    assert wait(start(folder / "whole")) == 0
    rng = random.Random(0)
    # Steps instead of moments, so that the speed of the machine does not decide whether a run is stopped.
    points = sorted(rng.sample(range(1, int(0.9 * steps(folder / "whole"))), STOPS[task]))
    codes, damaged = [], False
    for point in points:
        pid = start(folder / "cut")
        deadline = time.monotonic() + 300
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
    # 130: stopped and saved; -15: SIGTERM outside of the training loop; 0: the run had ended.
    assert set(codes) <= {130, -signal.SIGTERM, 0}, codes
    assert codes.count(130) >= 2, codes
    assert weights(folder / "cut") == weights(folder / "whole")
    log = (folder / "log").read_text()
    assert "run the same command again to resume" in log
    assert ": task.safetensors does not match its checksum" in log
    assert "Traceback" not in log, log[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("task", SETTINGS)
def test_stopped_anywhere_and_damaged_a_run_ends_with_the_same_bytes(tmp_path: Path, task: str) -> None:
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "import preceptor.vqa.experiment, preceptor.vqa.report, preceptor.vqa.model_card, transformers, pathlib\n"
        "import preceptor.segmentation.experiment, preceptor.grounding.experiment\n"
        "from tests.fault.test_interrupt import scenario\n"
        f"scenario(pathlib.Path({str(tmp_path)!r}), {task!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]

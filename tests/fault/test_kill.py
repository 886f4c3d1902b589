"""SIGKILL at several moments, some of them while a checkpoint is saved: a restarted run equals one never killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = 5  # for each variant
VARIANTS = {
    "lckd": ["data.workers=2"],  # across elections
    "clinkd": ["data.workers=0"],  # across pseudo-labels and rounds of reflection
    "plain": [],
    "workers": ["data.workers=2"],
    "accumulation": ["teacher.train.gradient_accumulation_steps=3"],
    "distilled": [
        "stages=[teacher,baseline,distilled]",
        "data.augment.views=2",
        "teacher.train.epochs=2",
        "student.train.epochs=2",
        "method.teaching.kind=cached",
        "method.relation.weight=0.5",
        "method.teaching.cross_questions=1",
    ],
}


def weights(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("model.safetensors"))
    }


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def scenario(folder: Path, variant: str) -> None:
    """Kill and restart a training. Runs in its own process, which forks the trainings."""
    from tests.fault.tiny import CLINKD, LCKD, RECIPE, fork_cli, wait, write_recipe

    recipe = str(write_recipe(folder, {"lckd": LCKD, "clinkd": CLINKD}.get(variant, RECIPE)))
    whole, cut, log = folder / "whole", folder / "cut", folder / "log.txt"

    def start(output: Path) -> int:
        settings = [*VARIANTS[variant], f"output={output}", f"data.root={folder / 'phantom'}"]
        return fork_cli(["train", recipe, *settings], log)

    begun = time.monotonic()
    assert wait(start(whole)) == 0, log.read_text()[-2000:]
    length = time.monotonic() - begun
    want = weights(whole)
    assert want
    rng = random.Random(variant)
    kills = saves = 0
    for attempt in range(200):
        pid = start(cut)
        moment = time.monotonic() + rng.uniform(0.02, 0.7) * length
        in_save = attempt % 2 == 0  # every second kill waits for a save to begin
        while time.monotonic() < moment or in_save:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, log.read_text()[-2000:]
                break
            if in_save and (list(cut.rglob(".tmp-step-*")) or list(cut.rglob(".model.tmp"))):
                saves += 1
                break
            time.sleep(0.001)
        else:
            done = 0
        if done:
            if kills >= KILLS:
                break
            assert weights(cut) == want
            for path in (cut / "checkpoints", cut / "model"):  # it ended before it could be killed: once more
                subprocess.run(["rm", "-rf", str(path)], check=True)
            subprocess.run(["rm", "-rf", *map(str, cut.glob("*/checkpoints"))], check=True)
            continue
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        kills += 1
        if kills == KILLS:
            assert wait(start(cut)) == 0, log.read_text()[-2000:]
            break
    assert kills == KILLS
    assert saves >= 1
    assert weights(cut) == want
    difference = files(cut) ^ files(whole)  # a temporary file or a lock that is left
    assert not difference, difference


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_restarted_is_byte_equal(tmp_path, variant):
    program = (
        # Imported before the forks, so that a restart costs no time.
        "import torch; torch.set_num_threads(1)\n"
        "import preceptor.vqa.experiment, preceptor.vqa.report, preceptor.vqa.model_card, transformers\n"
        "import preceptor.segmentation.experiment, preceptor.grounding.experiment\n"
        "from pathlib import Path\n"
        "from tests.fault.test_kill import scenario\n"
        f"scenario(Path({str(tmp_path)!r}), {variant!r})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parents[1] / 'src'}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]

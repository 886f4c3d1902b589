"""Two gloo processes against one: the same order of samples and, at equal global batch, the same loss curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.tiny import write_recipe

PROGRAM = Path(sys.executable).with_name("preceptor")
SETTINGS = [
    "teacher.model.dropout=0", "teacher.train.epochs=2", "student.train.epochs=2", "stages=[teacher,distilled]",
    "data.augment.views=2", "method.relation.weight=0",
]  # fmt: skip
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"],
    "accelerate": [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29612",
    ],
}  # fmt: skip
WORLD = "import preceptor.train.order as o, os; print('world', os.environ['WORLD_SIZE'], flush=True)"


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def losses(run: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for stage in ("teacher", "distilled"):
        for line in (run / stage / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            for key in ("loss", "label", "validation/score"):
                if key in values:
                    found.setdefault(f"{stage} {key}", []).append(values[key])
    return found


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    recipe = str(write_recipe(tmp_path))

    def arguments(name: str) -> list[str]:
        # The launchers run a script or a module; `-m preceptor` is the command line.
        return [
            "-m",
            "preceptor",
            "train",
            recipe,
            *SETTINGS,
            f"output={tmp_path / name}",
            f"data.root={tmp_path / 'phantom'}",
        ]

    run([sys.executable, *arguments("one")], tmp_path)
    want = losses(tmp_path / "one")
    assert len(want["teacher loss"]) > 5
    for name, launcher in LAUNCHERS.items():
        probe = tmp_path / "probe.py"
        probe.write_text(WORLD)
        assert run([*launcher, str(probe)], tmp_path).count("world 2") == 2, f"{name} did not start two processes"
        run([*launcher, *arguments(name)], tmp_path)
        got = losses(tmp_path / name)
        assert got.keys() == want.keys()
        for key in want:
            assert got[key] == pytest.approx(want[key], abs=1e-5), f"{name}: {key}"

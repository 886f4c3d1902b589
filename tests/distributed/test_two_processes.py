"""Two gloo processes against one: the same order of samples and, at equal global batch, the same loss curve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fault.tiny import write_recipe

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def command(launcher: str | None, folder: Path, name: str, *settings: str) -> list[str]:
    """Return a training in `folder / name`; launchers run a script or a module, and `preceptor` is a module."""
    started = ["-m", *LAUNCHERS[launcher]] if launcher else []
    places = [f"output={folder / name}", f"data.root={folder / 'phantom'}"]
    return [sys.executable, *started, "-m", "preceptor", "train", str(write_recipe(folder)), *places, *settings]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def finish(arguments: list[str]) -> None:
    done = run(arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def losses(run: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for stage in ("teacher", "distilled"):
        for line in (run / stage / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            for key in values.keys() - {"step", "epoch", "lr", "samples/s"}:
                found.setdefault(f"{stage} {key}", []).append(values[key])
    return found


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    settings = [
        "teacher.model.dropout=0",
        "student.model.dropout=0",
        "teacher.train.epochs=2",
        "student.train.epochs=2",
        "stages=[teacher,distilled]",
        "data.augment.views=2",
        "student.train.accumulation=3",
    ]
    finish(command(None, tmp_path, "one", *settings))
    want = losses(tmp_path / "one")
    assert len(want["teacher loss"]) > 5
    assert "distilled grad_norm" in want
    for name in LAUNCHERS:
        # Two runs of one process each would give that curve too.
        refused = run(command(name, tmp_path, "odd", *settings, "teacher.train.batch_size=9"))
        assert "processes x accumulation = 2 x 1" in refused.stderr, refused.stderr[-3000:]
        finish(command(name, tmp_path, name, *settings))
        got = losses(tmp_path / name)
        assert got.keys() == want.keys()
        for key in want:
            assert got[key] == pytest.approx(want[key], abs=1e-5, rel=1e-5), f"{name}: {key}"


@pytest.mark.slow
def test_ctrl_c_stops_both_processes_at_one_step_and_they_go_on_exactly(tmp_path):
    """With dropout: its seeds are those of step and process."""
    settings = ["teacher.train.epochs=15", "teacher.train.checkpoint_every=100"]
    finish(command("torchrun", tmp_path, "whole", *settings))
    launched = subprocess.Popen(
        command("torchrun", tmp_path, "cut", *settings),
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while launched.poll() is None and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.005)
    os.killpg(launched.pid, signal.SIGINT)
    said = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    assert said.count("run the same command again to resume") == 2, said[-3000:]
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 1
    finish(command("torchrun", tmp_path, "cut", *settings))
    files = ["model/model.safetensors", "checkpoints/step-60/task.safetensors"]
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

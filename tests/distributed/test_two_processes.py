"""Two gloo processes against one, for each task: at equal global batch the same loss curve and the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fault.tiny import CLINKD, LCKD, RECIPE, write_recipe

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


RECIPES = {"vqa": RECIPE, "segmentation": LCKD, "grounding": CLINKD}
SETTINGS = {
    "vqa": [
        "teacher.model.dropout=0",
        "student.model.dropout=0",
        "teacher.train.epochs=2",
        "student.train.epochs=2",
        "stages=[teacher,distilled]",
        "data.augment.views=2",
        "student.train.gradient_accumulation_steps=3",
    ],
    # Dropout and modality dropout draw anew for each process, so the curves are compared without them.
    "segmentation": ["train.epochs=2", "method.modality_dropout.kind=none"],
    "grounding": ["stages=[teacher,baseline,clinkd]"],
}
COMPARED = {
    "vqa": ("teacher", "distilled"),
    "segmentation": ("baseline", "distilled"),
    # The third stage trains on answers that the teacher generates; a token may differ where two are equally likely.
    "grounding": ("teacher", "baseline"),
}


def command(launcher: str | None, folder: Path, name: str, *settings: str, task: str = "vqa") -> list[str]:
    """Return a training in `folder / name`; launchers run a script or a module, and `preceptor` is a module."""
    launch = ["-m", *LAUNCHERS[launcher]] if launcher else []
    places = [f"output={folder / name}", f"data.root={folder / 'phantom'}"]
    recipe = str(write_recipe(folder, RECIPES[task]))
    return [sys.executable, *launch, "-m", "preceptor", "train", recipe, *places, *settings]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=1200, env=ENVIRONMENT)


def finish(arguments: list[str]) -> None:
    done = run(arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def losses(stage: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in (stage / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for key in values.keys() - {"step", "epoch", "lr", "samples/s"}:
            found.setdefault(key, []).append(values[key])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "launchers"),
    [("vqa", ("torchrun", "accelerate")), ("segmentation", ("torchrun",)), ("grounding", ("torchrun",))],
)
def test_two_processes_give_the_curve_and_the_weights_of_one(
    tmp_path: Path, task: str, launchers: tuple[str, ...]
) -> None:
    finish(command(None, tmp_path, "one", *SETTINGS[task], task=task))
    for launcher in launchers:
        finish(command(launcher, tmp_path, launcher, *SETTINGS[task], task=task))
        assert_same(tmp_path / "one", tmp_path / launcher, COMPARED[task])


def assert_same(one: Path, two: Path, stages: tuple[str, ...]) -> None:
    """Compare two runs: their stages, and the loss curves and weights of `stages`."""
    expected_stages, found_stages = (json.loads((run / "results.json").read_text())["stages"] for run in (one, two))
    assert found_stages.keys() == expected_stages.keys()
    assert (two / "report.html").is_file()
    for stage in stages:
        expected, found = (losses(run / stage) for run in (one, two))
        assert len(expected["loss"]) > 4
        assert "grad_norm" in expected
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-4), f"{two.name}, {stage}: {key}"
        want, got = (load_file(run / stage / "model" / "model.safetensors") for run in (one, two))
        assert want.keys() == got.keys()
        # Adam follows the rounding errors of weights without a gradient, such as a bias before a normalisation, so the
        # distance of all weights together is compared.
        distance = torch.stack([(got[key] - tensor).norm() for key, tensor in want.items()]).norm()
        assert distance < 1e-3 * torch.stack([tensor.norm() for tensor in want.values()]).norm(), (two.name, stage)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path: Path, launcher: str) -> None:
    """This also shows that the launcher starts two processes: one would accept any batch."""
    refused = run(command(launcher, tmp_path, "odd", "teacher.train.batch_size=9"))
    assert refused.returncode != 0
    assert "processes x gradient_accumulation_steps = 2 x 1" in refused.stderr, refused.stderr[-3000:]


@pytest.mark.slow
def test_ctrl_c_stops_both_processes_at_one_step_and_they_resume_exactly(tmp_path: Path) -> None:
    """With dropout, whose seed depends on step and process."""
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
    messages = launched.communicate(timeout=300)[1]
    assert launched.returncode != 0
    assert messages.count("run the same command again to resume") == 2, messages[-3000:]
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 1
    finish(command("torchrun", tmp_path, "cut", *settings))
    files = ["model/model.safetensors", "checkpoints/step-60/task.safetensors"]
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

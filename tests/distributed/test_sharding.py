"""ClinKD in two gloo processes: both have the same state. FSDP2 trains, saves and resumes as DDP does."""

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

from tests.distributed.test_two_processes import ENVIRONMENT
from tests.fault.tiny import CLINKD, write_recipe

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(3600)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SETTINGS = [
    "method.pseudo_labels.curriculum.begin=0.05",
    "student.model.gradient_checkpointing=true",
    "data.test_rows=1",
    "student.train.gradient_accumulation_steps=2",
    "method.selection.candidates=1",
    "teacher.train.evaluate_every=10",
    "teacher.train.checkpoint_every=10",
]
CLOSE = {"abs": 1e-4, "rel": 1e-4}  # sums in another order


def command(folder: Path, name: str, *settings: str) -> list[str]:
    watched = folder / f"{name}-watched"
    watched.mkdir(exist_ok=True)
    places = [f"output={folder / name}", f"data.root={folder / 'phantom'}"]
    recipe = str(write_recipe(folder, CLINKD))
    return [*TWO, str(HERE / "watched.py"), str(watched), "train", recipe, *places, *SETTINGS, *settings]


def finish(arguments: list[str], **more: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1500, env=ENVIRONMENT | more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    finish(command(folder, "ddp"))
    return folder


@pytest.fixture(scope="module")
def fsdp(ddp) -> Path:
    messages = finish(command(ddp, "fsdp", *taught_by(ddp)), **FSDP2)
    assert "gathered" in messages, "the memory of a sharded training"
    return ddp


def taught_by(folder: Path) -> list[str]:
    return ["stages=[clinkd]", f"method.teaching_run={folder / 'ddp' / 'teacher'}"]


def check_rounds(watched: Path) -> None:
    for number in range(3):
        first, second = (json.loads((watched / f"round-{number}-of-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
    assert first["corrections"]


@pytest.mark.slow
def test_labels_are_written_once_and_corrections_are_the_same_in_both(ddp):
    watched = ddp / "ddp-watched"
    labels = (watched / "labels-of-0.txt").read_text().splitlines()
    assert len(labels) == len(set(labels)) > 20
    assert not (watched / "labels-of-1.txt").exists()
    check_rounds(watched)
    assert any("corrections" in line for line in lines(ddp / "ddp" / "clinkd"))
    assert any(line.get("teacher") for line in lines(ddp / "ddp" / "prior"))


@pytest.mark.slow
def test_fsdp_has_the_loss_curve_of_ddp(fsdp):
    for sharded, plain in (("fsdp/prior", "ddp/prior"), ("fsdp", "ddp/clinkd")):
        got, want = lines(fsdp / sharded), lines(fsdp / plain)
        assert len(got) == len(want) > 5
        for one, other in zip(got, want, strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"samples/s"}:
                near = CLOSE | ({"rel": 1e-3} if key == "grad_norm" else {})
                assert one[key] == pytest.approx(other[key], **near), f"{sharded} step {one['step']}: {key}"
    check_rounds(fsdp / "fsdp-watched")


@pytest.mark.slow
def test_micro_batches_of_one_dialogue_per_process_become_corrections(tmp_path):
    """A correction replaces the only row, in both processes at once, so that both run the model equally often."""
    only = ["stages=[clinkd]", "method.pseudo_labels.share=0", "student.train.gradient_accumulation_steps=4"]
    finish(command(tmp_path, "ddp", *only))
    finish(command(tmp_path, "fsdp", *only), **FSDP2)
    got, want = lines(tmp_path / "fsdp"), lines(tmp_path / "ddp")
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], **CLOSE), one["step"]
    # Three rounds divide the training into quarters, and there are no corrections in the first one.
    replaced = sum(line.get("corrections", 0) > 0 for line in want)
    assert replaced > len(want) / 4


@pytest.mark.slow
def test_the_exported_checkpoint_is_that_of_ddp_and_loads_in_transformers(fsdp):
    from transformers import AutoModelForImageTextToText

    found = AutoModelForImageTextToText.from_pretrained(fsdp / "fsdp" / "model").state_dict()
    want = AutoModelForImageTextToText.from_pretrained(fsdp / "ddp" / "clinkd" / "model").state_dict()
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype
        assert torch.allclose(found[name], value, atol=3e-4), name
    start = load_file(fsdp / "fsdp" / "prior" / "model" / "model.safetensors")
    moved = load_file(fsdp / "fsdp" / "model" / "model.safetensors")
    change = max(float((moved[name] - start[name]).abs().max()) for name in start)
    assert change > 5e-3, "more than the two may differ by"


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(fsdp):
    arguments = command(fsdp, "fsdp-cut", *taught_by(fsdp))
    cut, watched = fsdp / "fsdp-cut", fsdp / "fsdp-cut-watched"
    launched = subprocess.Popen(
        arguments, env=ENVIRONMENT | FSDP2, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = cut / "metrics.jsonl"
    while launched.poll() is None and not (metrics.exists() and '"step": 6,' in metrics.read_text()):
        time.sleep(0.02)
    assert launched.poll() is None, "it ended before it was killed"
    launched.kill()  # a round of reflection is over
    launched.wait()
    for rank in (0, 1):  # a killed launcher leaves its workers
        os.kill(int((watched / f"pid-of-{rank}").read_text()), signal.SIGKILL)
    assert list((cut / "checkpoints").glob("step-*"))
    finish(arguments, **FSDP2)
    for file in ("model/model.safetensors", "prior/model/model.safetensors", "model/guidance.json"):
        assert (cut / file).read_bytes() == (fsdp / "fsdp" / file).read_bytes(), file


@pytest.mark.slow
def test_a_process_without_images_does_not_block_the_other(tmp_path):
    cases = ("qwen2_vl full", "qwen3_vl full", "qwen2_vl lora", "qwen2_vl_dinov2 full", "qwen2_vl_dinov2 frozen_vision")
    arguments = [*TWO, str(HERE / "sharded_step.py"), str(tmp_path), *(case.replace(" ", "-") for case in cases)]
    # The script imports from the tests.
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    messages = finish(arguments, PYTHONPATH=path)
    for case in cases:
        assert messages.count(f"{case}: the same") == 2, messages

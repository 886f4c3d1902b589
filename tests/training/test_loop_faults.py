"""What a stage meets that the training data, the machine or a signal does to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from preceptor.config import TrainConfig
from preceptor.errors import UserError
from preceptor.recipe import differences
from preceptor.task import Batch, LossTerms, Task
from preceptor.training.batch_loader import BatchLoader
from preceptor.training.loop import FitArguments, fit
from preceptor.training.metrics_file import read_metrics
from preceptor.training.setup import make_accelerator


class Mean(Task):
    """Learns the mean of the rows it is shown."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(1, 4), nn.Dropout(dropout), nn.Linear(4, 1))

    def forward(self, batch: Batch) -> LossTerms:
        terms = LossTerms()
        terms.add("label", (self.student(batch["x"]) - batch["x"]).square().sum(), 1.0)
        return terms

    def units(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch)}


@dataclass
class Numbers(Dataset):
    """Rows 0 to 11. Rows of `broken` raise, rows of `skipped` are left out, each row takes `seconds`."""

    broken: set[int] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    seconds: float = 0.0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, item: tuple[int, int]) -> int:
        time.sleep(self.seconds)
        if item[0] in self.broken:
            raise UserError(f"scan-{item[0]}.png: the file is empty; copy it again")
        return item[0]

    def collate(self, items: list[int]) -> Batch:
        rows = [i for i in items if i not in self.skipped]
        skipped = [f"row{i}" for i in items if i in self.skipped]
        x = torch.tensor(rows, dtype=torch.float32)[:, None] / 12
        return Batch({"x": x}, [f"row{i}" for i in rows], [str(i) for i in rows], skipped)

    def job(self, folder: Path, workers: int = 0, **changes) -> FitArguments:
        def export(task: Task, target: Path) -> None:
            target.mkdir(parents=True, exist_ok=True)

        settings = {"validate": lambda task: {"score": 0.0}, "export": export, "resume_config": {}, **changes}
        return FitArguments(
            folder=folder,
            samples=12,
            epoch_samples=12,
            differences=differences,
            seed=0,
            loader=lambda batches: BatchLoader(
                self,
                batch_sampler=batches,
                collate_fn=self.collate,
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
            ),
            **settings,
        )


def config(**changes) -> TrainConfig:
    base = {"epochs": 4, "batch_size": 6, "precision": "fp32", "log_every": 1}
    return TrainConfig.model_validate({**base, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_row_is_named_in_one_sentence(tmp_path, workers):
    with pytest.raises(UserError) as caught:
        fit(Mean(), Numbers(broken={7}).job(tmp_path, workers), config())
    assert str(caught.value) == "scan-7.png: the file is empty; copy it again"


def test_what_was_saved_before_a_broken_row_stays_and_serves(tmp_path):
    rows = Numbers()

    class Breaking(Mean):
        def after_step(self, step: int) -> None:
            if step == 5:
                rows.broken.update(range(12))

    settings = config(checkpoint_every=0.5)
    with pytest.raises(UserError, match="the file is empty"):
        fit(Breaking(), rows.job(tmp_path / "cut"), settings)
    assert (tmp_path / "cut" / "checkpoints" / "step-5" / "state.json").is_file()
    mended, whole = Mean(), Mean()
    fit(mended, Numbers().job(tmp_path / "cut"), settings)
    fit(whole, Numbers().job(tmp_path / "whole"), settings)
    assert all(torch.equal(a, b) for a, b in zip(mended.parameters(), whole.parameters(), strict=True))


def test_skipped_rows_weigh_nothing_and_are_cached_features(tmp_path):
    """A step over the rows that are left equals one over a data set in which the others never were."""
    state = fit(Mean(), Numbers(skipped={1, 4}).job(tmp_path, skip_limit=0.2), config(epochs=1, batch_size=12))
    assert state.skipped == ["row1", "row4"]
    task = Mean()
    batch = Numbers(skipped={1, 4}).collate(list(range(12)))
    mean = float(task(batch).sums["label"].detach()) / 10
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["label"] == pytest.approx(mean, rel=1e-6)
    assert (
        fit(Mean(), Numbers().job(tmp_path, skip_limit=0.2), config(epochs=1, batch_size=12)).skipped == state.skipped
    )


def test_too_many_skipped_rows_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"2 of 12 training rows have a broken image.*skip_limit=0\.1"):
        fit(Mean(), Numbers(skipped={1, 4}).job(tmp_path, skip_limit=0.1), config())


def test_a_micro_batch_of_skipped_rows_alone_is_passed(tmp_path):
    settings = config(batch_size=6, gradient_accumulation_steps=6)
    state = fit(Mean(), Numbers(skipped={3}).job(tmp_path, skip_limit=0.1), settings)
    assert state.finished


def test_stages_of_different_precision_run_in_one_process(tmp_path):
    assert make_accelerator(config(precision="bf16"), tmp_path).mixed_precision == "bf16"
    assert make_accelerator(config(precision="fp32"), tmp_path).mixed_precision == "no"


@pytest.mark.parametrize(
    ("native", "precision", "chosen", "warns"),
    [
        (True, "auto", "bf16", False),
        (False, "auto", "no", False),
        (True, "bf16", "bf16", False),
        (False, "bf16", "bf16", True),
        (False, "fp32", "no", False),
    ],
)
def test_bf16_without_its_instructions_is_said(tmp_path, monkeypatch, caplog, native, precision, chosen, warns):
    """On a CPU without them, a step of lckd-brats-cubes took 28 s instead of 1 s."""
    monkeypatch.setattr("preceptor.training.setup.native_bf16", lambda: native)
    assert make_accelerator(config(precision=precision), tmp_path).mixed_precision == chosen
    assert ("train.precision=auto chooses fp32" in caplog.text) == warns


def test_parts_that_come_in_eval_mode_train(tmp_path):
    """from_pretrained gives eval mode. A first epoch without dropout would end otherwise than a resumed one."""
    modes = []

    class Pretrained(Mean):
        def forward(self, batch: Batch) -> LossTerms:
            modes.append(self.student[1].training)
            return super().forward(batch)

    task = Pretrained(0.5)
    task.student.eval()
    fit(task, Numbers().job(tmp_path), config(epochs=1))
    assert modes == [True, True]


def test_a_batch_that_cannot_be_shared_out_names_the_setting(tmp_path):
    with pytest.raises(
        UserError, match=r"train\.batch_size 6 must be a multiple of processes x gradient_accumulation_steps = 1 x 4"
    ):
        fit(Mean(), Numbers().job(tmp_path), config(gradient_accumulation_steps=4))


INTERRUPTED = """
import sys
from pathlib import Path
from preceptor.training.loop import Interrupted, fit
from tests.training.test_loop_faults import Mean, Numbers, config
try:
    fit(Mean(0.2), Numbers(seconds=0.05).job(Path(sys.argv[1]), workers=2), config(checkpoint_every=100))
except Interrupted:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_lets_the_workers_finish_the_step(tmp_path, number):
    """Ctrl-C in a terminal and a scheduler's SIGTERM reach the loader's workers too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "cut")],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.01)
    os.killpg(child.pid, number)
    assert child.wait(60) == 130, child.stderr.read()
    resumed, whole = Mean(0.2), Mean(0.2)
    settings = config(checkpoint_every=100)
    fit(resumed, Numbers().job(tmp_path / "cut"), settings)
    fit(whole, Numbers().job(tmp_path / "whole"), settings)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))

"""An error of one process ends both, with a message and a code, and the run resumes as if it had not happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preceptor.data.images import ImageError
from preceptor.training import loop
from preceptor.vqa.dataset import VqaExamples
from tests.distributed.pair import run_pair, run_scenario
from tests.fault.test_kill import weights
from tests.fault.tiny import RECIPE, write_recipe

pytestmark = pytest.mark.slow
STOPPED = "another process of this run has stopped"


def at_step(rank: int, step: int, action: Callable[[], object]) -> Callable[[int], None]:
    """Return a fault: one process does something in the middle of a training step."""

    def fault(own: int) -> None:
        counts = loop._counts

        def faulty(*arguments):
            faulty.step += 1
            if faulty.step == step:
                action()
            return counts(*arguments)

        faulty.step = 0
        if own == rank:
            loop._counts = faulty

    return fault


def interrupt() -> None:
    raise KeyboardInterrupt


def unreadable_image(rank: int) -> None:
    read = VqaExamples.__getitem__

    def faulty(self, item):
        faulty.reads += 1
        if faulty.reads == 14:
            raise ImageError("images/7.png cannot be read: the file is truncated")
        return read(self, item)

    faulty.reads = 0
    if rank == 1:
        VqaExamples.__getitem__ = faulty


def not_a_number(rank: int) -> None:
    collate = VqaExamples.collate

    def faulty(self, items):
        faulty.batches += 1
        batch = collate(self, items)
        if faulty.batches == 3:
            batch.tensors["pixels"][0] = torch.nan
        return batch

    faulty.batches = 0
    if rank == 1:
        VqaExamples.collate = faulty


def full_disk(rank: int) -> None:
    def faulty(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    if rank == 0:
        loop.checkpoint.save = faulty


FAULTS = {
    "not a number": (not_a_number, [2, 2], "the loss is not finite"),
    "unreadable image": (unreadable_image, [2, 2], "images/7.png cannot be read"),
    "killed": (at_step(1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL)), [2, -signal.SIGKILL], STOPPED),
    "interrupt outside of the handler": (at_step(1, 3, interrupt), [2, 130], STOPPED),
    "Ctrl-C": (at_step(1, 3, lambda: os.kill(os.getpid(), signal.SIGINT)), [130, 130], "again to resume"),
    "full disk of the first": (full_disk, [2, 2], "the disk is full"),
    "memory": (at_step(1, 3, lambda: torch.empty(2**60)), [2, 2], "there is not enough memory"),
}
"""Of each fault: its cause, the exit codes of both processes, and a part of the message."""


def scenario(folder: Path) -> None:
    """Each fault stops the run two steps after the one before."""
    recipe = str(write_recipe(folder, RECIPE))

    def arguments(name: str) -> list[str]:
        return ["train", recipe, f"output={folder / name}", f"data.root={folder / 'data'}"]

    codes, log = run_pair(arguments("whole"), folder)
    assert codes == [0, 0], log[-3000:]
    for name, (fault, expected, sentence) in FAULTS.items():
        codes, log = run_pair(arguments("cut"), folder, fault)
        assert codes == expected, f"{name}: {log[-3000:]}"
        assert sentence in log, f"{name}: {log[-3000:]}"
        if name not in ("not a number", "Ctrl-C"):  # which both find out
            assert STOPPED in log, f"{name}: {log[-3000:]}"
        assert "Traceback" not in log, f"{name}: {log[-3000:]}"
    codes, log = run_pair(arguments("cut"), folder)
    assert codes == [0, 0], log[-3000:]
    assert weights(folder / "cut") == weights(folder / "whole")


def test_an_error_of_one_process_ends_both_and_the_run_resumes(tmp_path):
    run_scenario(__name__, "scenario", tmp_path)

"""A recipe so small that it can be killed and restarted many times, and a way to run it in a forked process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RECIPE = """
task: vqa
name: tiny
stages: [teacher]
data:
  name: phantom
  image_size: 32
  phantom: {cases: 12, images_per_case: 2, questions_per_image: 3, seed: 1}
  augment: {views: 0}
teacher: &model
  model:
    vision: {conv: {channels: [8, 8], blocks: [1, 1], token_stages: [1]}}
    text: {scratch: {embedding: 8, width: 16, layers: 1, heads: 2}}
    width: 16
    layers: 2
    heads: 2
    dropout: 0.2
  train: {epochs: 4, batch_size: 12, learning_rate: 2.0e-3, ema_decay: 0.9, evaluate_every: 1, checkpoint_every: 0.4,
          log_every: 1, precision: fp32}
student: *model
report: {questions: 2, latency_questions: 2}
"""

LCKD = """
task: segmentation
name: tiny-lckd
stages: [baseline, distilled]
data:
  name: phantom
  patch_size: [16, 16, 16]
  phantom: {train: 6, validation: 2, test: 1, size: 32, seed: 1, missing: 0.2}
model: {channels: [4, 4, 8]}
train: {epochs: 5, batch_size: 2, learning_rate: 2.0e-3, ema_decay: 0.9, evaluate_every: 2, checkpoint_every: 0.4,
        log_every: 1, precision: fp32}
method: {name: lckd, teachers: per_task, cross_modal: {levels: all}, election: {every: 1, cases: 2}}
evaluation: {overlap: 0, validation_overlap: 0}
report: {cases: 1}
"""

CLINKD = """
task: grounding
name: tiny-clinkd
stages: [teacher, clinkd]
data:
  name: phantom-grounding
  tasks: [roc]
  train_share: 0.5
  unlabelled: rest
  test_rows: 2
  validation_rows: 4
  phantom: {cases: 8, images_per_case: 2, questions_per_image: 3, seed: 1}
  phantom_size: 56
teacher: &run
  model: {max_pixels: 3136, new: {vocabulary_size: 300}}
  train: &train {epochs: 10, batch_size: 8, learning_rate: 3.0e-3, evaluate_every: 5, checkpoint_every: 1, log_every: 1,
                 select: last, precision: fp32, pretrained_lr_scale: 1.0}
student:
  <<: *run
  train: {<<: *train, epochs: 8, ema_decay: 0.9}
method:
  name: clinkd
  guidance: {kind: clip, gap: 1.5, learnable: true}
  pseudo_labels: {share: 0.4, max_new_tokens: 8, top_k: 16}
  reflection: {rounds: 3, rows: 6, candidates: 2, ratio: 0.3, buffer: 8, max_new_tokens: 8}
  selection: {candidates: 2}
answers: {batch_size: 8, max_new_tokens: 8}
report: {pictures: 1}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def fork_cli(arguments: list[str], log: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Run the command line in a fork of this process, which has imported everything already; return its process id.

    `prepare` is called in the fork before.
    """
    import preceptor.cli.app

    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["preceptor", *arguments]
        prepare()
        preceptor.cli.app.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of a size such as ``1m`` in a new folder; skip the test without the rights to do so."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("NOT TESTED: a full disk. Mounting a file system needs the rights of root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def wait(pid: int) -> int:
    """Return the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

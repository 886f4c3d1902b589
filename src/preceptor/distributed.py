"""The processes of a run: one, or several started by torchrun or accelerate."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

DEEPSPEED = "PRECEPTOR_USE_DEEPSPEED"
"""Variable that says whether the launcher asked for DeepSpeed."""

PATIENCE = timedelta(days=2)
"""How long a process waits for another: while the first one has a teacher answer a data set, the rest do."""


def processes() -> PartialState:
    """Return the state of the processes; on a machine without a GPU they talk through gloo.

    Every room asks here: a first `PartialState()` without `cpu` would leave the processes of a launcher on a CPU each
    to itself, all writing the same folder.
    """
    if asked := os.environ.pop("ACCELERATE_USE_DEEPSPEED", None):
        # Else accelerate hands the training to DeepSpeed, but on GPUs alone: `train.zero` does it everywhere.
        os.environ[DEEPSPEED] = asked
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def broadcast_from_main(value: T) -> T:
    """Return the first process's `value` on every process. What each reads of a folder, or counts in floating point,
    may differ from what the first one did, and then they would no longer do the same."""
    if processes().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]

"""Processes of a run: one, or several started by torchrun or accelerate."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

DEEPSPEED = "PRECEPTOR_USE_DEEPSPEED"
"""Environment variable: whether the launcher requested DeepSpeed."""

TIMEOUT = timedelta(days=2)
"""Longest wait for another process, for example while the first one builds a teacher cache."""


def processes() -> PartialState:
    """Return the state of the processes. On a machine without a GPU they communicate through gloo.

    All modules call this function, because a first `PartialState()` without `cpu` would make every process of a
    launcher a separate run on CPU that writes to the same folder.
    """
    if asked := os.environ.pop("ACCELERATE_USE_DEEPSPEED", None):
        # Otherwise accelerate would hand the training to DeepSpeed, but only on GPUs; `training.zero` works everywhere.
        os.environ[DEEPSPEED] = asked
    return PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def broadcast_from_main(value: T) -> T:
    """Return the value of the first process on every process.

    Use it for values that processes may see differently, such as the state of a folder or a floating-point sum.
    """
    if processes().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]

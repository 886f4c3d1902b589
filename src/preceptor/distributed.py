"""Processes of a run: one, or several started by torchrun or accelerate."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from preceptor.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(days=2)
"""Longest wait for another process, for example while the first one builds a teacher cache."""


def processes() -> PartialState:
    """Return the state of the processes; on a machine without a GPU they communicate through gloo.

    All modules call this function instead of `PartialState`: without `cpu`, the processes of a launcher on CPUs would
    not find each other, and all of them would write the same folder.

    Raises UserError if the launcher asks for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "the accelerate configuration asks for DeepSpeed, which is not supported: use FSDP2, which shards the same "
            "states (`preceptor recipes accelerate fsdp2`, or fsdp2-zero2 in place of ZeRO-2)"
        )
    return PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def broadcast_from_main(value: T) -> T:
    """Return the value of the first process on every process.

    Use it for values that processes may see differently, such as the state of a folder or a floating-point sum.
    """
    if processes().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]

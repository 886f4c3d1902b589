"""Processes of a run: one, or several started by torchrun or accelerate."""

from __future__ import annotations

import atexit
import gc
import os
import threading
import time
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from preceptor.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(days=2)
"""Longest wait for another process, for example while the first one builds a teacher cache."""

LEAVE_SECONDS = 10
"""Longest wait, at exit, for a communication that another process does not take part in."""

RELEASE_SECONDS = 0.5
"""Time in which a thread of gloo, which has ended its communication, surely runs once more, even on a busy machine."""


def processes() -> PartialState:
    """Return the state of the processes; on a machine without a GPU they communicate through gloo.

    All modules call this function instead of `PartialState`: without `cpu`, the processes of a launcher on CPUs would
    not find each other, and all of them would write the same folder. A group that is joined here is left at exit.

    Raises UserError if the launcher asks for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "the accelerate configuration asks for DeepSpeed, which is not supported: use FSDP2, which shards the same "
            "states (`preceptor recipes accelerate fsdp2`, or fsdp2-zero2 in place of ZeRO-2)"
        )
    joined_before = torch.distributed.is_initialized()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    if torch.distributed.is_initialized() and not joined_before:
        _leave_at_exit()
    return state


def _leave_at_exit() -> None:
    """Leave the process group before the interpreter ends.

    The threads of gloo release tensors that belong to Python; if one of them does so while the interpreter is shut
    down, the process aborts ("terminate called without an active exception"). Leaving waits for these threads, without
    the other processes taking part. Where DistributedDataParallel was used, the threads outlive the group (PyTorch 2.13
    keeps a reference to it), so they get a moment for what the last communication left. After an error a communication
    may be pending that never ends, so a thread leaves and the wait is limited. The thread is started here because
    Python >= 3.12 starts none at exit.
    """
    ending = threading.Event()

    def leave() -> None:
        ending.wait()
        gc.collect()  # models wrapped for several processes keep their group
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        time.sleep(RELEASE_SECONDS)

    thread = threading.Thread(target=leave, name="leave process group", daemon=True)
    thread.start()

    @atexit.register
    def wait() -> None:
        ending.set()
        thread.join(LEAVE_SECONDS)


def broadcast_from_main(value: T) -> T:
    """Return the value of the first process on every process.

    Use it for values that processes may see differently, such as the state of a folder or a floating-point sum.
    """
    if processes().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]

"""The processes of a run: one, or several started by torchrun or accelerate."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return the state of the processes; on a machine without a GPU they talk through gloo.

    Every room asks here: a first `PartialState()` without `cpu` would leave the processes of a launcher on a CPU each
    to itself, all writing the same folder.
    """
    return PartialState(cpu=not torch.cuda.is_available())

"""Learning-rate factors as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal


def factor(
    step: int,
    steps: int,
    *,
    kind: Literal["cosine", "poly", "constant"],
    warmup: float,
    power: float = 0.9,
    restart: float = 0.0,
) -> float:
    """Return the factor on the learning rate of step `step` (from 0) of `steps`.

    It rises linearly over ``warmup * steps`` steps. Afterwards it follows half a cosine period to 0 (Loshchilov and
    Hutter 2017), the polynomial ``(1 - t)**power`` (DeepLab, nnU-Net), or stays constant. The polynomial reaches 0 a
    first time at ``t = restart``, and continues from there with the value that it has without a restart (published LCKD
    code).
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(1, steps - warmup_steps)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    if kind == "constant":
        return 1.0
    return (1 - (t / restart if t < restart else t)) ** power

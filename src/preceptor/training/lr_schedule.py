"""Learning-rate factors as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal


def factor(
    step: int, steps: int, *, kind: Literal["cosine", "poly", "constant"], warmup: float, power: float = 0.9
) -> float:
    """Return the factor on the learning rate of step `step` (from 0) of `steps`.

    Rises linearly over ``warmup * steps`` steps, then: cosine, half a period to 0 (Loshchilov and Hutter 2017);
    poly, ``(1 - t)**power`` (DeepLab, nnU-Net); constant.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    t = (step - rise) / max(1, steps - rise)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    return (1 - t) ** power if kind == "poly" else 1.0

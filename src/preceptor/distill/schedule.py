"""The weight of a loss term over the training."""

from __future__ import annotations

from preceptor.config import TermConfig


def scheduled_weight(term: TermConfig, progress: float) -> float:
    """Return the weight of a term at `progress`, the fraction of the training that is done, in [0, 1].

    The weight is 0 before `term.start` and after `term.end`. It rises linearly over `term.ramp`.
    """
    if progress < term.start or progress > term.end:
        return 0.0
    risen = 1.0 if term.ramp == 0 else min(1.0, (progress - term.start) / term.ramp)
    return term.weight * risen

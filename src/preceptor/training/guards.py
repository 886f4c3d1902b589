"""Checks that stop a run: a loss that is not finite, too many broken images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.task import Batch


class NonFiniteError(UserError):
    """The loss or a gradient is NaN or infinite. The step changed no parameter."""


def offenders(batches: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> list[str]:
    """Return the ids of the samples whose own loss is not finite."""
    ids = []
    for batch in batches:
        for i in range(len(batch)):
            one = batch.narrow(i, 1)
            with torch.no_grad():
                if not torch.isfinite(loss(one)).item():
                    ids += one.ids
    return ids


def refuse_non_finite(step: int, loss: float, norm: float, offending: Sequence[str], batch: Sequence[str]) -> None:
    """Raise NonFiniteError for a step whose loss or gradient norm is not finite.

    `offending`: ids of the samples whose own loss is not finite. `batch`: ids of all samples of the step.
    """
    quantity = "a gradient" if math.isfinite(loss) else "the loss"
    ids = list(offending or batch)
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    names = ", ".join(ids[:20]) + more
    source = f"samples {names}" if offending else f"the batch of samples {names} (each sample alone is finite)"
    raise NonFiniteError(
        f"step {step}: {quantity} is not finite (loss {loss}, gradient norm {norm}); it comes from {source}. The step "
        "was not taken and the last checkpoint is intact. Check these samples with `preceptor doctor`, or lower "
        "train.learning_rate, set train.clip_norm, or use train.precision=fp32"
    )


class SkipCounter:
    """Counts the rows that were skipped because their image is broken; stops above a share of all rows."""

    def __init__(self, limit: float, rows: int) -> None:
        self.limit, self.rows = limit, rows
        self.ids: set[str] = set()

    def add(self, ids: Sequence[str]) -> None:
        """Raise UserError once more than `limit` of the rows have been skipped."""
        self.ids.update(ids)
        if len(self.ids) > self.limit * self.rows:
            raise UserError(
                f"{len(self.ids)} of {self.rows} training rows have a broken image ({', '.join(sorted(self.ids)[:5])}"
                f"{', ...' if len(self.ids) > 5 else ''}), more than data.skip_limit={self.limit} allows; "
                "`preceptor doctor` lists them"
            )

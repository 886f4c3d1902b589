"""What stops a run before it does harm: non-finite numbers, too many broken images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.task import Batch


class NonFiniteError(UserError):
    """The loss or a gradient is NaN or infinite. No parameter has moved in this step."""


def offenders(batches: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> list[str]:
    """Return the ids of the samples whose own loss is not finite."""
    found = []
    for batch in batches:
        for i, name in enumerate(batch.ids):
            one = Batch({key: tensor[i : i + 1] for key, tensor in batch.tensors.items()}, [name], [batch.keys[i]])
            with torch.no_grad():
                if not torch.isfinite(loss(one)).item():
                    found.append(name)
    return found


def refuse_non_finite(step: int, loss: float, norm: float, guilty: Sequence[str], everyone: Sequence[str]) -> None:
    """Raise NonFiniteError for a step whose loss or gradient norm is not finite."""
    what = "the loss" if loss != loss or abs(loss) == float("inf") else "a gradient"
    shown = list(guilty or everyone)
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    names = ", ".join(shown[:20]) + more
    where = f"samples {names}" if guilty else f"the batch of samples {names} (each sample alone is finite)"
    raise NonFiniteError(
        f"step {step}: {what} is not finite (loss {loss}, gradient norm {norm}); it comes from {where}. The step was "
        "not taken and the last checkpoint stands. Look at these samples with `preceptor doctor`, or lower "
        "train.learning_rate, set train.clip_norm, or use train.precision=fp32"
    )


class SkipCounter:
    """Counts rows left out because their image is broken, and stops past the agreed share."""

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

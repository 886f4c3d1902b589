"""The encoded samples of a task, and the loader of their batches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from preceptor.errors import UserError
from preceptor.task import Batch

# Without it, an iterator whose workers cannot start prints a traceback of its own when it is freed.
torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown = True  # type: ignore[attr-defined]


class BatchLoader(DataLoader):
    """Raises a mistake that a worker finds as its one sentence, in front of which PyTorch puts the traceback."""

    def __iter__(self) -> Any:
        return self._read(super().__iter__())  # the workers start here, not with the first batch

    def _read(self, batches: Any) -> Iterator[Any]:
        try:
            yield from batches
        except UserError as error:
            # What follows the last name of an exception at the start of a line.
            text = re.split(r"^[\w.]+(?:Error|Refused): ", error.given, flags=re.MULTILINE)[-1].strip()
            raise UserError(text) from error
        finally:
            # Otherwise an exception that refers to the iterator keeps the workers alive, and the interpreter waits for
            # them.
            getattr(batches, "_shutdown_workers", lambda: None)()


class Examples(Dataset):
    """Base class of the encoded samples of a task."""

    def collate(self, items: Sequence[Any]) -> Batch:
        """Return the batch of items. The ids of unreadable ones become its `skipped`."""
        raise NotImplementedError

    def loader(self, batches: Iterable[Any], workers: int = 0) -> DataLoader:
        """Return a loader. Each element of `batches` is the list of items of one batch."""
        return BatchLoader(
            self,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )

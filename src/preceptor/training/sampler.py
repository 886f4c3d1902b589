"""Order of the samples: a function of seed, epoch and position that does not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def mix_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    return int(np.random.SeedSequence([part % 2**63 for part in parts]).generate_state(1, np.uint64)[0] >> 1)


class StepBatches:
    """Batch sampler of an infinite stream. Position p is sample ``permutation[p // n][p % n]``.

    A step takes the next `batch_size` positions (the global batch). Process `rank` of `world` takes a contiguous share,
    divided into `accumulation` micro-batches. At the end of an epoch the batch continues with the next epoch, so that
    no sample is dropped or repeated. Yields lists of ``(index, epoch)``.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        accumulation: int = 1,
        steps: int,
        start_step: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if samples < 1:
            raise ValueError("there is no training sample")
        if batch_size % (world * accumulation):
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of processes x gradient_accumulation_steps = "
                f"{world} x {accumulation}"
            )
        self.samples, self.batch_size, self.accumulation = samples, batch_size, accumulation
        self.steps, self.start_step, self.seed, self.rank, self.world = steps, start_step, seed, rank, world
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.accumulation

    def _at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        return int(self._permutation[offset]), epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world
        micro = share // self.accumulation
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.rank * share
            for part in range(self.accumulation):
                yield [self._at(first + part * micro + i) for i in range(micro)]

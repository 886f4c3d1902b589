from __future__ import annotations

import math
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.training.lr_schedule import factor
from preceptor.training.sampler import StepBatches, mix_seed


def steps_of(batches: StepBatches) -> list[list[tuple[int, int]]]:
    """Return what each step of this process takes, its micro-batches joined."""
    micro = list(batches)
    n = batches.accumulation
    return [list(chain.from_iterable(micro[i : i + n])) for i in range(0, len(micro), n)]


@given(
    samples=st.integers(1, 60),
    per=st.integers(1, 5),
    world=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 99),
    start=st.integers(0, 6),
)
def test_every_number_of_processes_sees_the_same_stream(samples, per, world, accumulation, seed, start):
    size = per * 4 * 6  # a multiple of every world x accumulation
    common = {"batch_size": size, "steps": 8, "seed": seed}
    alone = steps_of(StepBatches(samples, **common))
    ranks = [
        steps_of(StepBatches(samples, **common, accumulation=accumulation, start_step=start, rank=r, world=world))
        for r in range(world)
    ]
    together = [list(chain.from_iterable(rank[i] for rank in ranks)) for i in range(8 - start)]
    assert together == alone[start:]


@given(samples=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(samples, seed):
    stream = list(chain.from_iterable(StepBatches(samples, batch_size=7, steps=samples, seed=seed)))
    for epoch in range(7):
        taken = stream[epoch * samples : (epoch + 1) * samples]
        assert sorted(index for index, _ in taken) == list(range(samples))
        assert {number for _, number in taken} == {epoch}


def test_epochs_and_seeds_differ():
    def order(seed):
        return [i for i, _ in chain.from_iterable(StepBatches(40, batch_size=40, steps=2, seed=seed))]

    assert order(0)[:40] != order(0)[40:]
    assert order(0) != order(1)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="multiple of processes x gradient_accumulation_steps = 2 x 3"):
        StepBatches(10, batch_size=8, accumulation=3, steps=1, world=2)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=4), st.integers(0, 3))
def test_seeds_depend_on_every_part(parts, place):
    changed = list(parts)
    changed[place % len(parts)] += 1
    assert 0 <= mix_seed(*parts) < 2**63
    assert mix_seed(*parts) != mix_seed(*changed)


def test_schedules_in_closed_form():
    def at(step, kind, warmup=0.0):
        return factor(step, 100, kind=kind, warmup=warmup, power=0.9)

    assert [at(s, "cosine", 0.1) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert at(10, "cosine", 0.1) == 1.0
    assert at(55, "cosine", 0.1) == pytest.approx(0.5)
    assert at(25, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert at(50, "poly") == pytest.approx(0.5**0.9)
    assert at(99, "constant") == 1.0

"""The queue in front of the models: bounded, in order, with a limit of time; what waits can be cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from preceptor.serving.jobs import JobQueue, QueueFull, RequestTimeout


def test_jobs_run_one_at_a_time_and_in_order() -> None:
    queue, running, seen = JobQueue(10, 5), [], []

    def work(number: int) -> int:
        running.append(number)
        assert len(running) == 1
        seen.append(number)
        running.remove(number)
        return number * number

    async def main() -> list[int]:
        return await asyncio.gather(*(queue.run(work, number) for number in range(8)))

    assert asyncio.run(main()) == [number * number for number in range(8)]
    assert seen == list(range(8))
    assert queue.waiting == 0


def test_a_full_queue_refuses_and_recovers() -> None:
    queue, gate = JobQueue(2, 5), threading.Event()

    async def main() -> None:
        jobs = [asyncio.create_task(queue.run(gate.wait)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull):
            await queue.run(gate.wait)
        gate.set()
        await asyncio.gather(*jobs)
        await asyncio.sleep(0.05)
        assert await queue.run(lambda: 1) == 1

    asyncio.run(main())


def test_a_late_job_gives_up_and_its_place_is_free_when_it_ends() -> None:
    queue, gate = JobQueue(1, 0.05), threading.Event()

    async def main() -> None:
        with pytest.raises(RequestTimeout):
            await queue.run(gate.wait)
        assert queue.waiting == 1  # it still uses the processors
        gate.set()
        await asyncio.sleep(0.1)
        assert queue.waiting == 0

    asyncio.run(main())


def test_a_cancelled_job_that_waits_is_not_run() -> None:
    queue, gate, ran = JobQueue(3, 5), threading.Event(), []

    async def main() -> None:
        first = asyncio.create_task(queue.run(gate.wait))
        second = asyncio.create_task(queue.run(ran.append, "second"))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert queue.waiting == 0

    asyncio.run(main())
    assert ran == []


def test_the_error_of_a_job_reaches_the_caller() -> None:
    def fail() -> None:
        raise ZeroDivisionError("one")

    with pytest.raises(ZeroDivisionError, match="one"):
        asyncio.run(JobQueue(1, 5).run(fail))

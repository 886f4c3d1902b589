"""A queue of bounded length in front of the models: one computation at a time, the others wait or are refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class QueueFull(Exception):
    """The queue has no free place."""


class RequestTimeout(Exception):
    """A computation was not finished in time."""


class JobQueue:
    """Runs functions one after the other in a thread, because a network already uses all processors.

    Args:
        most_waiting: Number of functions that may wait or run at a time.
        seconds: Time after which `run` raises `RequestTimeout`. A function that has begun is not interrupted.
    """

    def __init__(self, most_waiting: int, seconds: float) -> None:
        self.most_waiting, self.seconds = most_waiting, seconds
        self.waiting = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a function. If the caller is cancelled, a function that still waits is dropped.

        Raises:
            QueueFull: `most_waiting` functions wait or run already.
            RequestTimeout: the result is not there after `seconds`.
            Exception: the error of the function.
        """
        with self._lock:
            if self.waiting >= self.most_waiting:
                raise QueueFull
            self.waiting += 1
        job = self._thread.submit(function, *arguments)
        job.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), self.seconds)
        except TimeoutError:
            raise RequestTimeout from None

    def _leave(self, job: Future[Any]) -> None:
        with self._lock:
            self.waiting -= 1

    def close(self) -> None:
        """Drop what waits; do not wait for what runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

"""Handle Ctrl-C and SIGTERM: finish the step, save, stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator


class Stop:
    """Whether a stop signal was received (`requested`), and when (`since`)."""

    def __init__(self) -> None:
        self.requested, self.since = False, 0.0


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request to finish the step and save.

    A second Ctrl-C after at least 3 seconds stops immediately. An earlier one is ignored, because a launcher forwards
    the signal that its workers have already received.
    """
    stop = Stop()

    def handle(number, frame) -> None:
        if stop.requested and number == signal.SIGINT and time.monotonic() - stop.since > 3:
            raise KeyboardInterrupt
        if not stop.requested:
            stop.requested, stop.since = True, time.monotonic()

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which handles the signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

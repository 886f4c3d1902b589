"""Ctrl-C and SIGTERM: finish the step, save, stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator


class Stop:
    def __init__(self) -> None:
        self.asked, self.since = False, 0.0


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C, 3 seconds later or more, stops at once.

    A launcher passes on the signal that its workers have got already, so a quick second one is the first again.
    """
    stop = Stop()

    def ask(number, frame) -> None:
        if stop.asked and number == signal.SIGINT and time.monotonic() - stop.since > 3:
            raise KeyboardInterrupt
        if not stop.asked:
            stop.asked, stop.since = True, time.monotonic()

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us owns the signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

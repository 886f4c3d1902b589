"""Progress on standard error: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 15.0  # between lines where there is no terminal


class Progress:
    """Shows step, loss terms, samples per second and time left."""

    def __init__(self, title: str, steps: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True)
        self.live = shown and self.console.is_terminal
        self.shown, self.title, self.steps = shown, title or "train", steps
        self.begun, self.begun_at, self.last_line = time.monotonic(), done, 0.0
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=self.console,
            disable=not self.live,
        )
        self.row = self.bar.add_task(self.title, total=steps, completed=done, terms="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def show(self, line: dict[str, float]) -> None:
        hidden = ("step", "epoch", "lr", "grad_norm", "samples/s")
        terms = " ".join(f"{name} {value:.3f}" for name, value in line.items() if name not in hidden)
        terms += f" {line['samples/s']:.0f}/s"
        if self.live:
            self.bar.update(self.row, terms=terms)
        elif self.shown and time.monotonic() - self.last_line > PLAIN_SECONDS:
            self.last_line = time.monotonic()
            done = int(line["step"]) - self.begun_at
            left = (time.monotonic() - self.begun) / max(1, done) * (self.steps - int(line["step"]))
            print(f"{self.title} step {int(line['step'])}/{self.steps} {terms} {left:.0f} s left", file=sys.stderr)

    def advance(self, step: int) -> None:
        self.bar.update(self.row, completed=step)

    def say(self, text: str) -> None:
        if self.live:
            self.bar.console.print(f"{self.title} {text}")
        elif self.shown:
            print(f"{self.title} {text}", file=sys.stderr)

"""Progress on standard error: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

PLAIN_SECONDS = 15.0
"""Seconds between two lines if standard error is not a terminal."""

_NOT_A_LOSS = ("step", "epoch", "lr", "grad_norm", "samples/s", "loss")


class Progress:
    """Show how far a stage is: bar, step, time left and loss in one line, the loss terms in the line below.

    Args:
        title: name of the stage.
        steps: number of steps.
        done: steps that an earlier, interrupted run has already made.
        enabled: whether anything is shown; True on the main process only.
    """

    def __init__(self, title: str, steps: int, done: int = 0, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self.live = enabled and console.is_terminal
        self.plain = enabled and not console.is_terminal
        self.title, self.steps, self.first = title or "train", steps, done
        self.started = self.last_line = time.monotonic()
        self.loss = ""
        self.bar = _Bar(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            _TimeLeft(),
            progress.TextColumn("{task.fields[loss]}"),
            console=console,
            disable=not self.live,
            expand=True,
        )
        self.row = self.bar.add_task(self.title, total=steps, completed=done, loss="", terms="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.update(self.row, terms="")
        self.bar.stop()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show the loss, the loss terms and the speed of the last steps."""
        self.loss = f"loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        terms = [f"{name} {value:.4f}" for name, value in metrics.items() if name not in _NOT_A_LOSS]
        if "samples/s" in metrics:
            terms.append(f"{metrics['samples/s']:.0f} samples/s")
        self.bar.update(self.row, loss=self.loss, terms="  ".join(terms))

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self.bar.update(self.row, completed=step)
        now = time.monotonic()
        if self.plain and (now - self.last_line >= PLAIN_SECONDS or step == self.steps):
            self.last_line = now
            left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
            parts = [f"{self.title}: {step}/{self.steps}", f"{duration(left)} left", self.loss]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self.live:
            self.bar.console.print(f"{self.title}: {text}", markup=False, highlight=False)
        elif self.plain:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class _Bar(progress.Progress):
    """A progress bar with the loss terms in a line of their own, cut at the width of the terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["terms"]:
                yield Text(task.fields["terms"], style="dim", no_wrap=True, overflow="ellipsis")


class _TimeLeft(progress.ProgressColumn):
    max_refresh = 0.5

    def render(self, task: progress.Task) -> Text:
        seconds = task.time_remaining
        return Text("-:--:-- left" if seconds is None else f"{duration(seconds)} left")

"""Run the command line and record what each process knows after every round of reflection."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from preceptor.grounding.task import ClinkdTask
from preceptor.teachers.label_store import LabelStore


def watch(folder: Path) -> None:
    rank = os.environ["RANK"]
    (folder / f"pid-of-{rank}").write_text(str(os.getpid()))
    on_interval, append = ClinkdTask.on_interval, LabelStore.append

    def watched(self: ClinkdTask, progress: float) -> None:
        before = len(self.buffer.rounds)
        on_interval(self, progress)
        if len(self.buffer.rounds) > before:
            (folder / f"round-{before}-of-{rank}.json").write_text(self.buffer.state(), "utf-8")

    def counted(self: LabelStore, labels) -> None:
        with (folder / f"labels-of-{rank}.txt").open("a") as file:
            file.writelines(f"{label.key}\n" for label in labels)
        append(self, labels)

    ClinkdTask.on_interval, LabelStore.append = watched, counted  # type: ignore[method-assign]


if __name__ == "__main__":
    import preceptor.cli.app

    watch(Path(sys.argv.pop(1)))
    preceptor.cli.app.main()

"""Write metrics to metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preceptor.files import write_text


class MetricsFile:
    """``metrics.jsonl`` with one line per logged step. On resume, lines of steps that are repeated are removed."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= start_step] if path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file without an incomplete last line."""
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines

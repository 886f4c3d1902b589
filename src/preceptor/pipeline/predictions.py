"""Predictions on the user's data, written while they are made; a second call continues where the first one stopped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.files import LockedError, json_lines, lock, naming


def stream_predictions(
    path: Path,
    items: Sequence[Any],
    predict: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield one row per item and append each to `path` at once, as JSON lines or, for a `.csv`, as CSV.

    Items whose id the file already holds are not predicted again; their rows come first. A line that an interrupted
    call wrote only in part is removed. ``progress(done, total)`` is called before the first item is predicted and after
    each row is written.

    `batch_size` is the number of items that `predict` computes together. A batch of which rows are missing is computed
    whole again, because the same items in other batches give numbers that differ by rounding.

    Raises:
        UserError: the file cannot be written, or holds something else than predictions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path.with_name(f".{path.name}.lock")))
        except LockedError as error:
            raise UserError(
                f"{path} is being written by {error.owner}: wait until it has finished, or choose another --output"
            ) from None
        rows = read_rows(path) if path.is_file() else []
        yield from rows
        done = {row["id"] for row in rows}
        batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        remaining = [item for batch in batches if any(one.id not in done for one in batch) for item in batch]
        count, report = sum(item.id in done for item in items), progress or (lambda done, total: None)
        report(count, len(items))
        stack.enter_context(naming(path))  # around the file, because closing it writes once more what failed
        file = stack.enter_context(path.open("a", encoding="utf-8", errors="backslashreplace", newline=""))
        for row in predict(remaining):
            if row["id"] in done:
                continue
            count += 1
            header = path.suffix == ".csv" and file.tell() == 0
            file.write(_csv_line(row, header) if path.suffix == ".csv" else json_lines([row]))
            file.flush()
            report(count, len(items))
            yield row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of predictions; cut off a last line that is not complete."""
    data, table = path.read_bytes(), path.suffix == ".csv"
    end = data.rfind(b"\n") + 1
    while table and data.count(b'"', 0, end) % 2:  # this line break is inside a quoted cell
        end = data.rfind(b"\n", 0, end - 1) + 1
    if end < len(data):
        os.truncate(path, end)
    try:
        text = data[:end].decode("utf-8")
        if not table:
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), quoting=csv.QUOTE_NONNUMERIC))
        for row in rows:
            row["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds something else than predictions; give another --output") from error
    return rows


def _csv_line(row: dict[str, Any], header: bool) -> str:
    buffer = io.StringIO(newline="")
    # Text is quoted and numbers are not, so that numbers are read back as numbers.
    writer = csv.DictWriter(buffer, list(row), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    if header:
        writer.writeheader()
    writer.writerow(row)
    return buffer.getvalue()

"""Predictions on the user's data, written while they are made; a second call continues where the first one stopped.

A row says which model, options and input it was made from, because ids do not: two patients may have a file of the same
name.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preceptor.data.provenance import PROVENANCE_FILE
from preceptor.data.types import Case, Dialogue, Sample
from preceptor.errors import UserError
from preceptor.files import LockedError, json_lines, lock, naming, sha256
from preceptor.pipeline.packed_model import CHECKSUMS, checksum_lines

_DIGITS = 16
"""Hexadecimal digits of a hash in a row."""

_NOT_READ = ("README.md", PROVENANCE_FILE, "results.json", CHECKSUMS)
"""Files of a model folder, or of a packed model, that no prediction depends on."""


def model_sha256(model: Path) -> str:
    """Return the SHA-256 of the files of a model folder on which predictions depend: not only of the weights.

    A model in a run, packed, and unpacked has the same hash: its card and the record of its training do not count.
    """
    files = (path for path in model.iterdir() if path.is_file() and not path.name.startswith("."))
    sums = {path.name: sha256(path) for path in files if path.name not in _NOT_READ}
    return hashlib.sha256(checksum_lines(sums).encode()).hexdigest()


class Origin:
    """What a row was made from.

    Args:
        model: SHA-256 of the model (`model_sha256`).
        options: Options of `preceptor predict` that change a row, by name. Those that are off are left out.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        chosen = {name.replace("_", "-"): value for name, value in options.items() if value not in (None, False, "")}
        self.of_all = {
            "model": model[:_DIGITS],
            "options": ", ".join(name if value is True else f"{name}={value}" for name, value in chosen.items()),
        }
        self._hashes: dict[Path, str] = {}

    def columns(self, item: Sample | Case | Dialogue) -> dict[str, str]:
        """Return the model, the options, and a hash of the texts and files of an item."""
        shown = replace(item, mask=None) if isinstance(item, Case) else item  # label maps are not read
        digest = hashlib.sha256(json.dumps(shown.fingerprint_row()).encode())
        for path in input_files(item):
            if path not in self._hashes:
                self._hashes[path] = sha256(path)
            digest.update(self._hashes[path].encode())
        return self.of_all | {"input": digest.hexdigest()[:_DIGITS]}

    def check(self, path: Path, rows: Sequence[Mapping[str, Any]], items: Sequence[Sample | Case | Dialogue]) -> None:
        """Raise UserError if the rows of a file are of another model, of other options, or of items that differ."""
        for row in rows:
            for key, what, note in (
                ("model", "the model", " (a hash of all files that it reads)"),
                ("options", "the options", ""),
            ):
                if (found := row.get(key, "unknown")) != self.of_all[key]:
                    raise UserError(
                        f"{path} has a prediction of {row['id']} by {what} {found!r}, and this call uses "
                        f"{self.of_all[key]!r}{note}; give another --output"
                    )
        inputs = {row["id"]: row.get("input") for row in rows}
        for item in items:
            if item.id in inputs and inputs[item.id] != self.columns(item)["input"]:
                raise UserError(
                    f"{path} has a prediction of {item.id} from other files or another question; give another --output"
                )


def input_files(item: Sample | Case | Dialogue) -> list[Path]:
    """Return the files that a prediction of an item reads. A DICOM series is all files of its folder."""
    if isinstance(item, Case):
        paths = [file.path for file in item.images.values()]
    else:
        paths = list(item.images) if isinstance(item, Dialogue) else [item.image]
    series = ((path, sorted(path.iterdir()) if path.is_dir() else [path]) for path in paths)
    return [file for path, files in series for file in files if file == path or file.is_file()]


def stream_predictions(
    path: Path,
    items: Sequence[Any],
    predict: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 1,
    *,
    origin: Origin,
) -> Iterator[dict[str, Any]]:
    """Yield one row per item and append each to `path` at once, as JSON lines or, for a `.csv`, as CSV.

    Items whose id the file already holds are not predicted again; their rows come first. A line that an interrupted
    call wrote only in part is removed. ``progress(done, total)`` is called before the first item is predicted and after
    each row is written. Rows end with the columns of `origin`.

    `batch_size` is the number of items that `predict` computes together. A batch of which rows are missing is computed
    whole again, because the same items in other batches give numbers that differ by rounding.

    Raises:
        UserError: the file cannot be written, contains something else than predictions, or those of another model, of
            other options, or of other inputs with the same ids.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path.with_name(f".{path.name}.lock")))
        except LockedError as error:
            raise UserError(
                f"{path} is being written by {error.owner}: wait until it has finished, or choose another --output"
            ) from None
        rows, size = read_rows(path) if path.is_file() else ([], 0)
        origin.check(path, rows, items)
        if path.is_file():
            os.truncate(path, size)  # an interrupted call wrote the last line only in part
        done = {row["id"]: row for row in rows}
        yield from (done[item.id] for item in items if item.id in done)
        batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        remaining = [item for batch in batches if any(one.id not in done for one in batch) for item in batch]
        predicted_rows = predict(remaining)  # may refuse the output, before the file exists
        if isinstance(predicted_rows, Generator):  # after the file is closed, it may clean up
            stack.callback(predicted_rows.close)
        count, report = sum(item.id in done for item in items), progress or (lambda done, total: None)
        report(count, len(items))
        stack.enter_context(naming(path))  # around the file, because closing it writes once more what failed
        file = stack.enter_context(path.open("a", encoding="utf-8", errors="backslashreplace", newline=""))
        for item, predicted in zip(remaining, predicted_rows, strict=True):
            if item.id in done:
                continue
            row = predicted | origin.columns(item)
            count += 1
            header = path.suffix == ".csv" and file.tell() == 0
            file.write(_csv_line(row, header) if path.suffix == ".csv" else json_lines([row]))
            file.flush()
            report(count, len(items))
            yield row


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a file of predictions, and the bytes of its complete lines.

    Raises UserError if the file has something else: a line that is not a row, or no complete line and not the beginning
    of one.
    """
    data, table = path.read_bytes(), path.suffix == ".csv"
    end = data.rfind(b"\n") + 1
    while table and data.count(b'"', 0, end) % 2:  # this line break is inside a quoted cell
        end = data.rfind(b"\n", 0, end - 1) + 1
    try:
        if end == 0:
            _require_beginning(data, b'"id",' if table else b'{"id": ')
        text = data[:end].decode("utf-8")
        if not table:
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), quoting=csv.QUOTE_NONNUMERIC))
        for row in rows:
            row["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} contains something else than predictions; give another --output") from error
    return rows, end


def _require_beginning(line: bytes, beginning: bytes) -> None:
    """Raise ValueError unless `line` is the beginning of a first line, as an interrupted call leaves it."""
    if line[: len(beginning)] != beginning[: len(line)]:
        raise ValueError("another beginning")
    try:
        whole = json.loads(line)
    except ValueError:
        return
    if isinstance(whole, dict) and "model" not in whole:
        raise ValueError("a complete object of another kind")


def require_json_lines(output: Path) -> Path:
    """Return the path of predictions that are written as JSON lines. Raises UserError if it names a CSV file."""
    if output.suffix.lower() in (".csv", ".tsv"):
        raise UserError(f"the answers are written as JSON lines, not as {output.suffix}; give --output FILE.jsonl")
    return output


def _csv_line(row: dict[str, Any], header: bool) -> str:
    buffer = io.StringIO(newline="")
    # Text is quoted and numbers are not, so that numbers are read back as numbers.
    writer = csv.DictWriter(buffer, list(row), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    if header:
        writer.writeheader()
    writer.writerow(row)
    return buffer.getvalue()

"""The files that `preceptor predict` writes for each case, and what an interrupted call leaves of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.types import Case
from preceptor.errors import UserError
from preceptor.files import sha256, write_text
from preceptor.pipeline.predictions import read_rows

STARTED = ".predictions.csv.started"
"""File in the output that names the case whose files are being written, and their hashes once they are complete.

Only a killed process leaves it behind."""
ENDINGS = {"mask": "_seg.nii.gz", "probabilities": "_prob.nii.gz", "dicom_seg": "_seg.dcm"}
"""Endings of the files of a case in the output, by the column of its row that names each."""


def files_of(row: Mapping[str, Any]) -> list[Path]:
    """Return the files of a case that its row names."""
    return [Path(row[key]) for key in ENDINGS if row.get(key)]


def require_new_files(items: Sequence[Case], rows: Path) -> None:
    """Raise UserError if a file of a case without a row already exists, or if one that a row names does not.

    An interrupted call may have written files of one case, which `STARTED` names, without its row.
    """
    if rows.is_file():
        for row in read_rows(rows)[0]:
            for file in files_of(row):
                if not (rows.parent / file.name).exists():
                    raise UserError(
                        f"{rows} has a prediction of {row['id']}, but {rows.parent / file.name} does not exist; "
                        "restore the file, delete the row to segment the case again, or give another --output"
                    )
    started = rows.parent / STARTED
    found = json.loads(started.read_text("utf-8")) if rows.is_file() and started.is_file() else {}
    for case in items:
        for ending in ENDINGS.values():
            path = rows.parent / f"{case.id}{ending}"
            if not os.path.lexists(path):
                continue
            interrupted = found.get("case") == case.id
            if not (interrupted and (found["files"] is None or found["files"].get(path.name) == sha256(path))):
                raise UserError(f"{path} exists and is not a prediction of this output; give another --output")


def note_started(output: Path, case: str, files: Sequence[Path] | None) -> None:
    """Write which case is written to the output, and its files once they are complete."""
    hashes = None if files is None else {file.name: sha256(file) for file in files}
    write_text(output / STARTED, json.dumps({"case": case, "files": hashes}))

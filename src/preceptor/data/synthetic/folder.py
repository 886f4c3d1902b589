"""Write the folder of a generated data set atomically, and reuse an intact one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.files import LockedError, lock, new_folder

MANIFEST = "manifest.json"


def write_once(
    folder: Path, arguments: Mapping[str, Any], write: Callable[[Path], None], digest: Callable[[Path], str]
) -> None:
    """Fill `folder` with `write`, unless it already contains the data set of the same arguments.

    The manifest stores the arguments and `digest`, a SHA-256 over the files.

    Raises:
        UserError: the folder contains something else, or its data set was changed.
    """
    lock_file = folder.with_name(f".{folder.name}.lock")
    if _is_complete(folder, arguments, digest):
        if lock_file.exists():  # of a process that was killed after it had written the folder
            with contextlib.suppress(LockedError, OSError), lock(lock_file):
                pass
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(lock_file, wait=True):
        if _is_complete(folder, arguments, digest):  # written by another process meanwhile
            return
        with new_folder(folder, folder.with_name(f".{folder.name}.tmp")) as temporary:
            write(temporary)
            manifest = {**arguments, "sha256": digest(temporary)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def _is_complete(folder: Path, arguments: Mapping[str, Any], digest: Callable[[Path], str]) -> bool:
    """Return whether the folder contains the data set. Raises UserError if it contains something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        expected = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        manifest, expected = None, None
    if manifest != arguments:
        raise UserError(
            f"{folder} does not contain the requested phantom ({dict(arguments)}); give another "
            "data.root, or remove the folder"
        )
    try:
        written = digest(folder)
    except OSError:
        written = None
    if written != expected:
        raise UserError(
            f"the phantom in {folder} was changed after it was written; remove the folder to generate it again"
        )
    return True

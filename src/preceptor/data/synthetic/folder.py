"""A generated data set's folder: written as a whole or not at all, and used again where it is there and intact."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preceptor.errors import UserError

MANIFEST = "manifest.json"


def write_once(
    folder: Path, arguments: Mapping[str, Any], write: Callable[[Path], None], digest: Callable[[Path], str]
) -> None:
    """Have `write` fill `folder`, unless what the same arguments gave is there already.

    The manifest keeps the arguments and `digest`, the SHA-256 of what was written. Raises UserError where the folder
    holds something else or a damaged phantom.
    """
    if _is_there(folder, arguments, digest):
        return
    # A name of its own: several processes of one run may write at once, and the first to finish wins.
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        manifest = {**arguments, "sha256": digest(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_there(folder, arguments, digest):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_there(folder: Path, arguments: Mapping[str, Any], digest: Callable[[Path], str]) -> bool:
    """Return whether the phantom is in the folder, False where the folder is empty or missing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        known = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        manifest, known = None, None
    if manifest != arguments:
        raise UserError(
            f"{folder} holds something other than the phantom that was asked for ({dict(arguments)}); give another "
            "data.root, or remove it"
        )
    try:
        written = digest(folder)
    except OSError:
        written = None
    if written != known:
        raise UserError(f"{folder} holds a phantom that was changed after it was written; remove it to make it anew")
    return True

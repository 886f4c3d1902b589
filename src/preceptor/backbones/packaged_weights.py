"""Weights that lie as a file inside an installed Python package. The package itself is never imported."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from preceptor.errors import UserError


def find(package: str, file: str) -> Path | None:
    """Return the path of a file inside an installed package, or None."""
    spec = importlib.util.find_spec(package)
    places = [Path(root) / file for root in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if place.is_file()), None)


def check(file: Path, package: str, sha256: str) -> None:
    """Raise UserError unless the SHA-256 of the file starts with `sha256`."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(sha256):
        raise UserError(f"{file.name} of the package {package} is damaged; install the package again")

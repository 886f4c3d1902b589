"""Extract the images of parquet tables into files, which are named by the hash of their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from preceptor.data.vqa.parquet_tables import COLUMNS, read_cells
from preceptor.errors import UserError
from preceptor.files import lock, write_text

IMAGES = "extracted-images"
_MARKS = {
    re.compile(rb"\x89PNG"): ".png",
    re.compile(rb"\xff\xd8\xff"): ".jpg",
    re.compile(rb"II[*+]\0|MM\0[*+]"): ".tif",
    re.compile(rb"RIFF....WEBP", re.DOTALL): ".webp",
    re.compile(rb".{128}DICM", re.DOTALL): ".dcm",
    re.compile(rb"BM"): ".bmp",
}
_NAME = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|tif|webp|dcm|bmp|img)")


def extract_images(file: Path, folders: Sequence[Path], max_bytes: int) -> list[Path]:
    """Return the image of every row of a table. Images are extracted unless one of `folders` has all of them."""
    for folder in folders:
        if (known := _indexed(file, folder, max_bytes)) is not None:
            return known
    folder = _writable(folders)
    images: list[tuple[str, int]] = []
    with lock(folder / ".lock", wait=True):
        for row, cells in enumerate(read_cells(file, COLUMNS[:1])):
            content = _content(cells["image"], f"{file}: row {row}", max_bytes)
            images.append((_write(content, folder), len(content)))
    write_text(_index(file, folder), json.dumps({"table": _state(file), "images": images}))
    return [folder / name for name, _ in images]


def _index(file: Path, folder: Path) -> Path:
    return folder / f"{file.name}.json"


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _indexed(file: Path, folder: Path, max_bytes: int) -> list[Path] | None:
    """Return the images listed in an index file, or None if there is no index or the table or an image has changed."""
    try:
        index = json.loads(_index(file, folder).read_text("utf-8"))
        sizes = dict(index["images"])
        valid = index["table"] == _state(file) and all(
            _NAME.fullmatch(name) and size <= max_bytes and (folder / name).stat().st_size == size
            for name, size in sizes.items()
        )
        return [folder / name for name, _ in index["images"]] if valid else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # missing or invalid index
        return None


def _writable(folders: Sequence[Path]) -> Path:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"none of {', '.join(map(str, folders))} is writable; set output=FOLDER to a writable folder")


def _content(cell: Any, place: str, max_bytes: int) -> bytes:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(cell, str) or (not content and isinstance(cell, dict) and cell.get("path")):
        raise UserError(f"{place}: the image is only the name of a file; export the data set with its images embedded")
    if not isinstance(content, bytes) or not content:
        raise UserError(f"{place}: the image column contains no bytes; export the data set with its images embedded")
    if len(content) > max_bytes:
        raise UserError(
            f"{place}: the image has {len(content):,} bytes, more than the limit of {max_bytes:,}; raise "
            "data.max_image_bytes"
        )
    return content


def suffix_of(content: bytes) -> str:
    """Return the suffix of an image file by its content, or "" if it is not a known kind."""
    return next((suffix for mark, suffix in _MARKS.items() if mark.match(content)), "")


def _write(content: bytes, folder: Path) -> str:
    """Write an image file atomically unless it exists, and return its name."""
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{digest}{suffix_of(content) or '.img'}"
    temporary = folder / f".{path.name}.tmp"
    try:
        if not path.exists() or path.stat().st_size != len(content):
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the place
            raise
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free some disk space, or set output=FOLDER"
        ) from error
    return path.name

"""Summarise every image file: hashes, thumbnail, burned-in text and identifying headers, or the reading error."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preceptor.auditing.burned_in import has_text
from preceptor.auditing.headers import identifying_tags
from preceptor.data.images import ImageError, content_hash, load_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.phash import SIDE, thumbnail
from preceptor.errors import printable


@dataclass(frozen=True)
class ImageSummary:
    """The properties of an image file that an audit uses.

    Attributes:
        file: SHA-256 of the file.
        pixels: SHA-256 of the decoded pixels. A grey image that is stored in colour has the hash of its grey values.
        thumbnail: Grey values (64, 64) uint8.
        text: Whether the image may contain burned-in text.
        tags: Names of identifying header tags.
        broken: The reading error without the path, or "". The other attributes of a broken file are empty.
    """

    file: str
    pixels: str
    thumbnail: np.ndarray
    text: bool
    tags: tuple[str, ...]
    broken: str = ""


def summarize(path: Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> ImageSummary:
    """Summarise one image file. A broken file raises no error."""
    try:
        image = load_image(path, max_bytes=max_bytes, max_pixels=max_pixels)
        return ImageSummary(
            content_hash(path), _pixel_hash(image), thumbnail(image), has_text(image), identifying_tags(path)
        )
    except ImageError as error:
        blank = np.zeros((SIDE, SIDE), np.uint8)
        return ImageSummary("", "", blank, False, (), broken=str(error).removeprefix(f"{printable(str(path))}: "))


def summarize_files(
    paths: Sequence[Path], *, workers: int | None = None, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> list[ImageSummary]:
    """Summarise all files in order. Threads help, because decoders release the interpreter lock."""
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: summarize(path, max_bytes=max_bytes, max_pixels=max_pixels), paths))


def _pixel_hash(image: Image.Image) -> str:
    values = np.asarray(image)
    if values.ndim == 3 and (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
        values = values[..., 0]
    digest = hashlib.sha256(str(values.shape).encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()

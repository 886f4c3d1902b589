"""The pictures that an evaluation stores for the report: ``figures/*.png`` and ``figures/figures.json``.

Pictures are numbered. Their names and contents hold no file name of the data set.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preceptor.files import write_text

FOLDER = "figures"
INDEX = "figures.json"


class FigureWriter:
    """Writes the pictures of a stage into ``STAGE/figures``, which is emptied first."""

    def __init__(self, stage: Path) -> None:
        self.folder = stage / FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def add(self, name: str, image: Image.Image, longest_side: int) -> str:
        """Write an image as PNG without metadata, shrunk to `longest_side` pixels, and return its file name."""
        (self.folder / f"{name}.png").write_bytes(encode_png(image, longest_side))
        return f"{name}.png"

    def finish(self, index: dict[str, Any]) -> None:
        """Write the description of the pictures."""
        write_text(self.folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))


def encode_png(image: Image.Image, longest_side: int) -> bytes:
    """Return an image as PNG without metadata, shrunk to `longest_side` pixels; an RGB image without colour is grey."""
    scale = longest_side / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def as_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def read_figures(stage: Path) -> dict[str, Any]:
    """Return the description of a stage's pictures; empty if there is none."""
    path = stage / FOLDER / INDEX
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def data_uri(stage: Path, name: str | None) -> str:
    """Return a stored picture as a data URI, or an empty string if it is missing."""
    # The index is read from the folder and must not lead out of it.
    if not name or Path(name).name != name or not (stage / FOLDER / name).is_file():
        return ""
    content = (stage / FOLDER / name).read_bytes()
    return as_uri(content) if content.startswith(b"\x89PNG") else ""

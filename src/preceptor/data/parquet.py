"""Hugging Face parquet folders of `image, question, answer`: PathVQA and VQA-RAD as they lie on the hub.

The bytes of the images are in the tables; they are written out once, each under the hash of its content, so that the
same image of several rows or parts is one file and one group.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preceptor.data.answers import inferred_type
from preceptor.data.images import MAX_BYTES
from preceptor.data.splits import cut_validation, note_leaks
from preceptor.errors import UserError
from preceptor.types import Part, Sample, VqaData

PARTS: dict[str, Part] = {"train": "train", "validation": "validation", "test": "test"}
COLUMNS = ("image", "question", "answer")
IMAGES = "extracted-images"
_MARKS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif", b"BM": ".bmp"}
BATCH = 64


def read_parquet(
    root: Path,
    *,
    name: str,
    split: str,
    scratch: Path,
    validation_fraction: float = 0.1,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> VqaData:
    """Read ``train-*.parquet``, ``validation-*.parquet`` and ``test-*.parquet`` from a folder or from its `data/`.

    Columns: `image` (a struct whose `bytes` are the file), `question`, `answer`; others are ignored. Images are written
    to `extracted-images/` beside the tables, or where that cannot be written, to `scratch`. An id is
    ``<part>-<row>``, from 0; answers of yes or no are taken as closed. Where no validation part is given it is cut from
    training by image.

    Raises:
        UserError: pyarrow is missing, or names the file, the row and the fix.
    """
    if not root.is_dir():
        raise UserError(f"data.root {root} is no folder; give the folder with the parquet files")
    folder = root / IMAGES if os.access(root, os.W_OK) else scratch / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    for key, part in PARTS.items():
        files = _files(root, key)
        if not files and key != "validation":
            raise UserError(f"{root} has no {key}-*.parquet, nor has its data/; give the folder as it is on the hub")
        number = 0
        for file in files:
            for cells in _rows(file):
                samples.append(_sample(cells, f"{file}: row {number}", f"{key}-{number}", part, folder, max_bytes))
                number += 1
    notes = ["Answer types are inferred: yes and no are closed, all others open."]
    if not any(sample.part == "validation" for sample in samples):
        samples = cut_validation(samples, validation_fraction, seed)
        notes.append("Validation is cut from training by image.")
    data = VqaData(name, split, root, samples, notes)
    note_leaks(data)
    return data


def _files(root: Path, key: str) -> list[Path]:
    return sorted(root.glob(f"{key}-*.parquet")) or sorted((root / "data").glob(f"{key}-*.parquet"))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with pip install 'preceptor[parquet]'") from None
    try:
        table = parquet.ParquetFile(file)
        absent = [name for name in COLUMNS if name not in table.schema_arrow.names]
        if absent:
            raise UserError(f"{file} has no column {absent[0]!r}; needed are {', '.join(COLUMNS)}")
        for batch in table.iter_batches(batch_size=BATCH, columns=list(COLUMNS)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as parquet ({reason}); copy it again from its source") from error


def _sample(cells: dict[str, Any], place: str, name: str, part: Part, folder: Path, max_bytes: int) -> Sample:
    image, question, answer = cells["image"], cells["question"], cells["answer"]
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise UserError(f"{place}: the image column holds no bytes; export the data set with its images embedded")
    if len(content) > max_bytes:
        raise UserError(f"{place}: the image has {len(content):,} bytes, more than the ceiling of {max_bytes:,}; raise "
                        "data.max_image_bytes")  # fmt: skip
    texts = [" ".join(str(text).split()) if text is not None else "" for text in (question, answer)]
    if not all(texts):
        raise UserError(f"{place}: the question or the answer is empty; fill it in or delete the row")
    digest = hashlib.sha256(content).hexdigest()
    return Sample(
        id=name,
        image=_written(content, folder, digest),
        question=texts[0],
        answers=(texts[1],),
        answer_type=inferred_type(texts[1]),
        group=digest[:16],
        part=part,
    )


def _written(content: bytes, folder: Path, digest: str) -> Path:
    """Return the file of an image, written as a whole if it is not there yet."""
    suffix = next((suffix for mark, suffix in _MARKS.items() if content.startswith(mark)), ".img")
    path = folder / f"{digest}{suffix}"
    if not path.exists() or path.stat().st_size != len(content):
        temporary = folder / f".{digest}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return path

"""Read Hugging Face parquet folders with the columns `image, question, answer`: PathVQA and the hub's copy of VQA-RAD.

The tables contain the bytes of the images. Each image is extracted once and named by the hash of its content, so that
an image of several rows or splits is one file and one group. An index file makes later calls fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from preceptor.data.images import MAX_BYTES
from preceptor.data.locations import data_folder
from preceptor.data.splits import cut_validation
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import inferred_type
from preceptor.errors import UserError
from preceptor.files import lock, write_text

SPLITS: dict[str, Split] = {"train": "train", "validation": "validation", "test": "test"}
COLUMNS = ("image", "question", "answer")
IMAGES = "extracted-images"
_MARKS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif", b"BM": ".bmp"}
_NAME = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|tif|bmp|img)")
_BATCH = 64
_COPY_AGAIN = "copy it again from its source"


def holds_parquet(root: Path) -> bool:
    """Return whether a folder contains parquet files that `read_parquet` can read."""
    return bool(_files(root, "train"))


def read_parquet(
    root: Path,
    *,
    name: str,
    variant: str,
    scratch: Path,
    validation_fraction: float = 0.1,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Dataset[Sample]:
    """Read ``train-*.parquet``, ``validation-*.parquet`` and ``test-*.parquet`` from a folder or from its `data/`.

    The columns are `image` (a struct whose `bytes` are the file), `question` and `answer`; others are ignored. Images
    are written to `extracted-images/` next to the tables, or to `scratch` if that folder is not writable. A later call
    reuses them if the size and the modification time of the table are unchanged. An id is ``<split>-<row>``, counted
    from 0. The group is a hash of the image file. Answers of yes or no make a question closed. If there is no
    validation split, it is cut from training by image. The caller decides whether splits may share images.

    Raises:
        UserError: pyarrow is missing, or a file is invalid. The message names the file, the row (from 0) and the fix.
    """
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give the folder with the parquet files")
    folders = (root / IMAGES, scratch / IMAGES)
    samples: list[Sample] = []
    for key, split in SPLITS.items():
        files = _files(root, key)
        if not files and key != "validation":
            raise UserError(
                f"neither {root} nor its data/ contains {key}-*.parquet; give the folder as it is on the hub"
            )
        number = count()
        for file in files:
            images = _images(file, folders, max_bytes)
            for row, (image, cells) in enumerate(zip(images, _cells(file, COLUMNS[1:]), strict=True)):
                samples.append(_sample(cells, f"{file}: row {row}", f"{key}-{next(number)}", split, image))
    notes = ["Answer types are inferred: yes and no are closed, all others open."]
    if not any(sample.split == "validation" for sample in samples):
        samples = cut_validation(samples, validation_fraction, seed)
        notes.append("Validation is cut from training by image.")
    return Dataset(name, variant, root, samples, notes)


def _files(root: Path, key: str) -> list[Path]:
    return sorted(root.glob(f"{key}-*.parquet")) or sorted((root / "data").glob(f"{key}-*.parquet"))


def _cells(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with pip install 'preceptor[parquet]'") from None
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            absent = [name for name in COLUMNS if name not in table.schema_arrow.names]
            if absent:
                raise UserError(f"{file} has no column {absent[0]!r}; the required columns are {', '.join(COLUMNS)}")
            for batch in table.iter_batches(batch_size=_BATCH, columns=list(columns)):
                for index in range(batch.num_rows):
                    yield {name: batch.column(name)[index].as_py() for name in columns}
                    row += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: row {row}: a text is not UTF-8; {_COPY_AGAIN}, or correct the row") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file} cannot be read as parquet ({reason}); {_COPY_AGAIN}") from error


def _sample(cells: dict[str, Any], place: str, name: str, split: Split, image: Path) -> Sample:
    question, answer = (_text(cells[column]) for column in COLUMNS[1:])
    if not (question and answer):
        raise UserError(f"{place}: the question or the answer is empty; fill it in or delete the row")
    return Sample(
        id=name,
        image=image,
        question=question,
        answers=(answer,),
        answer_type=inferred_type(answer),
        group=image.stem[:16],
        split=split,
    )


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


# Images


def _images(file: Path, folders: Sequence[Path], max_bytes: int) -> list[Path]:
    """Return the image of every row of a table. Images are extracted unless one of `folders` has all of them."""
    for folder in folders:
        if (known := _indexed(file, folder, max_bytes)) is not None:
            return known
    folder = _writable(folders)
    images: list[tuple[str, int]] = []
    with lock(folder / ".lock", wait=True):
        for row, cells in enumerate(_cells(file, COLUMNS[:1])):
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
    except (OSError, ValueError, TypeError, KeyError):  # missing or invalid index
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
    if not isinstance(content, bytes) or not content:
        raise UserError(f"{place}: the image column contains no bytes; export the data set with its images embedded")
    if len(content) > max_bytes:
        raise UserError(
            f"{place}: the image has {len(content):,} bytes, more than the limit of {max_bytes:,}; raise "
            "data.max_image_bytes"
        )
    return content


def _write(content: bytes, folder: Path) -> str:
    """Write an image file atomically unless it exists, and return its name."""
    digest = hashlib.sha256(content).hexdigest()
    suffix = next((suffix for mark, suffix in _MARKS.items() if content.startswith(mark)), ".img")
    path = folder / f"{digest}{suffix}"
    temporary = folder / f".{path.name}.tmp"
    try:
        if not path.exists() or path.stat().st_size != len(content):
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free some disk space, or set output=FOLDER"
        ) from error
    return path.name


def read_configured(config: Any, scratch: Path, variant: str) -> Dataset[Sample]:
    """Read the parquet files of a recipe's data settings. Raises UserError as `read_parquet`."""
    return read_parquet(
        data_folder(config.name, config.root),
        name=config.name,
        variant=variant,
        scratch=scratch,
        validation_fraction=config.validation_fraction,
        seed=config.split_seed,
        max_bytes=config.max_image_bytes,
    )

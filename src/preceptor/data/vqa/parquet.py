"""Read Hugging Face parquet folders with the columns `image, question, answer`: PathVQA and the hub's copy of VQA-RAD.

The tables contain the bytes of the images. Each image is extracted once and named by the hash of its content, so that
an image of several rows or splits is one file and one group. An index file makes later calls fast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.groups import (
    column_findings,
    equal_files,
    examination_columns,
    folder_findings,
    group_by_patient,
    patient_columns,
    unread_splits,
    without_group,
)
from preceptor.data.limits import MAX_BYTES
from preceptor.data.locations import data_folder
from preceptor.data.splits import SPLIT_NAMES, cut_validation
from preceptor.data.texts import as_identifier, as_text, check_column_names, is_given
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import ANSWER_TYPES, as_answers, inferred_type, mixed_types
from preceptor.data.vqa.columns import lists_options, unread_columns
from preceptor.errors import UserError
from preceptor.files import lock, write_text

SPLITS: dict[str, Split] = {"train": "train", "validation": "validation", "test": "test"}
COLUMNS = ("image", "question", "answer")
DESCRIBING = ("answer_type", "question_type")
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
# Some releases of the hub append a fingerprint: train-00000-of-00002-0123abcd.parquet.
_SHARD = re.compile(r"[a-z]+-(?P<number>\d{5})-of-(?P<of>\d{5})(?:-[0-9a-z]+)?\.parquet")
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

    The columns are `image` (a struct whose `bytes` are the file), `question`, `answer` (a text, or a list of accepted
    answers) and optionally `group`, `question_type` and `answer_type` (open or closed; a column with other types is not
    used). Without a group, the columns that name a patient decide (see `data.groups`), else the image. Other columns
    are ignored; those that may matter are findings. Classes of the library `datasets` (`ClassLabel`) are read as their
    names.

    Images are written to `extracted-images/` next to the tables, or to `scratch` if that folder is not writable. A
    later call reuses them if the size and the modification time of the table are unchanged. An id is
    ``<split>-<row>``, counted from 0. Without an answer type, answers of yes or no make a question closed. If there is
    no validation split, it is cut from training by image. The caller decides whether splits may share images.

    Raises:
        UserError: pyarrow is missing, or a file is invalid. The message names the file, the row (from 0) and the fix.
    """
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give the folder with the parquet files")
    folders = (root / IMAGES, scratch / IMAGES)
    samples: list[Sample] = []
    shards = {key: _files(root, key) for key in SPLITS}
    require_shards(shards)
    patients: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for key, split in SPLITS.items():
        files = shards[key]
        if not files and key != "validation":
            raise UserError(
                f"neither {root} nor its data/ contains {key}-*.parquet; give the folder as it is on the hub"
            )
        number = count()
        for file in files:
            identifying, described, others = _columns(file)
            images = _images(file, folders, max_bytes)
            all_cells = _cells(file, (*COLUMNS[1:], *identifying, *described), others)
            image_names = _image_names(file)
            for row, (image, cells) in enumerate(zip(images, all_cells, strict=True)):
                sample = _sample(cells, f"{file}: row {row}", f"{key}-{next(number)}", split, image)
                samples.append(sample)
                rows[sample.id] = cells
                names[sample.id] = image_names[row] if image_names else ""
                for column in identifying:
                    value = as_identifier(cells[column], f"{file}: row {row}: {column}")
                    patients.setdefault(column, {})[sample.id] = value
    samples, notes, findings_of_types = _with_answer_types(samples, rows)
    groups = patients.pop("group", {})
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    examinations = {
        column: {id: cells.get(column) for id, cells in rows.items()} for column in examination_columns(columns)
    }
    if not any(groups.values()):
        samples = group_by_patient(samples, patients, notes)
    if not any(sample.split == "validation" for sample in samples):
        samples = cut_validation(samples, validation_fraction, seed)
        notes.append("Validation is cut from training by image.")
    data = Dataset(name, variant, root, samples, notes)
    data.findings += column_findings(groups, patients, examinations, samples)
    ungrouped = without_group(samples, groups, patients)
    data.findings += folder_findings((Path(names[s.id]), s.split) for s in ungrouped if names[s.id])
    data.findings += findings_of_types + _unread(rows, columns)
    data.findings += mixed_types([cells["answer"] for cells in rows.values()], "column answer")
    data.findings += _unread_files(root, shards)
    return data


def _files(root: Path, key: str) -> list[Path]:
    """Return the tables of a split. Raises UserError if both folders contain some."""
    found = [sorted(folder.glob(f"{key}-*.parquet")) for folder in (root, root / "data")]
    if all(found):
        raise UserError(f"{root} and its data/ both contain {key}-*.parquet; keep one of them")
    return found[0] or found[1]


def require_shards(shards: Mapping[str, Sequence[Path]]) -> None:
    """Check that the tables of every split are complete by their own numbering, ``train-00000-of-00003.parquet``.

    Raises:
        UserError: a table is missing, has a second copy, or is numbered differently from the others.
    """
    for key, files in shards.items():
        numbers = {file: _SHARD.fullmatch(file.name) for file in files}
        of: dict[int, Path] = {int(match["of"]): file for file, match in numbers.items() if match}
        if len(of) > 1:
            names = " and ".join(sorted(file.name for file in of.values()))
            raise UserError(f"{files[0].parent} mixes {key} tables of several numberings ({names}); keep one set")
        unnumbered = [file for file, match in numbers.items() if not match]
        if of and unnumbered:
            raise UserError(f"{unnumbered[0]} is not numbered like the other {key} tables; remove it, or rename it")
        by_number: dict[int, Path] = {}
        for file, match in numbers.items():
            if match and (first := by_number.setdefault(int(match["number"]), file)) is not file:
                raise UserError(f"{first} and {file.name} are both number {match['number']}; keep one of them")
        total = next(iter(of), 0)
        missing = [number for number in range(total) if number not in by_number]
        if missing:
            name = f"{key}-{missing[0]:05d}-of-{total:05d}.parquet"
            counts = f"{len(missing)} of the {total} {key} tables"
            raise UserError(f"{files[0].parent} lacks {counts}, the first is {name}; copy it there")
        if by_number and max(by_number) >= total:
            raise UserError(f"{by_number[max(by_number)]} is numbered above its own total; {_COPY_AGAIN}")
    first_of: dict[str, Path] = {}
    for file, digest in equal_files(file for files in shards.values() for file in files).items():
        if (other := first_of.setdefault(digest, file)) is not file:
            raise UserError(f"{other} and {file} are the same table; {_COPY_AGAIN}")


def _unread_files(root: Path, shards: Mapping[str, Sequence[Path]]) -> list[Finding]:
    read = {file for files in shards.values() for file in files}
    unread = sorted({*root.glob("*.parquet"), *(root / "data").glob("*.parquet")} - read)
    if not unread:
        return []
    names = ", ".join(file.name for file in unread[:5]) + (", ..." if len(unread) > 5 else "")
    starts = ", ".join(f"{key}-" for key in SPLITS)
    reason = f"{len(unread)} parquet files are not read, because their names start with none of {starts}: {names}"
    return [Finding((), unread[0], reason)]


def _with_answer_types(
    samples: Sequence[Sample], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Sample], list[str], list[Finding]]:
    """Return the samples with the answer types of their rows, notes and findings."""
    given = {
        id: str(cells["answer_type"]).strip().lower()
        for id, cells in rows.items()
        if is_given(cells.get("answer_type"))
    }
    findings = []
    if unknown := sorted(set(given.values()) - ANSWER_TYPES.keys()):
        reason = (
            f"column 'answer_type' contains {unknown[0]!r:.40}, which is not open or closed, and is not used: yes and "
            "no are closed, all others open"
        )
        findings.append(Finding((), None, reason, "warning"))
        given = {}
    inferred = "Answer types are inferred: yes and no are closed, all others open."
    notes = [inferred] if len(given) < len(samples) else []
    typed = [replace(s, answer_type=ANSWER_TYPES[given[s.id]]) if s.id in given else s for s in samples]
    return typed, notes, findings


def _unread(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[Finding]:
    """Return findings on columns that are not read. The files decide the splits, and number the rows."""
    findings = []
    splits = [c for c in columns if c == "split" or unread_splits(c, (cells.get(c) for cells in rows.values()))]
    for column in splits:
        given = {id: SPLIT_NAMES.get(str(cells.get(column)).strip().lower()) for id, cells in rows.items()}
        others = tuple(id for id, split in given.items() if split and split != SPLITS[id.partition("-")[0]])
        if others:
            reason = (
                f"column {column!r} of {len(others)} rows names another split than their file, which decides; move "
                "the rows to the file of their split, or delete the column"
            )
            findings.append(Finding(others, None, reason))
    if "id" in columns:
        reason = "column 'id' is not read: rows are named by their split and number, such as test-0"
        findings.append(Finding((), None, reason, "warning"))
    return findings + unread_columns(rows, [column for column in columns if column not in splits])


def _image_names(file: Path) -> list[str]:
    """Return the name that a table stores with each image, or an empty list if it stores none."""
    from pyarrow import types

    with _open(file) as table:
        kind = table.schema_arrow.field("image").type
        if not types.is_struct(kind) or kind.get_field_index("path") < 0:
            return []
        cells = [cell for batch in table.iter_batches(columns=["image.path"]) for cell in batch.column(0).to_pylist()]
    return [str(cell["path"]).replace("\\", "/") if cell and cell["path"] else "" for cell in cells]


def _columns(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the columns besides `COLUMNS`: those that name a group or a patient, those that describe, all others.

    Nested and binary columns, such as an embedding or an image, are not among the others, unless they list options.

    Raises:
        UserError: a column has nearly the name of one that is read, such as `Group`.
    """
    with _open(file) as table:
        from pyarrow import types

        names = list(table.schema_arrow.names)
        kinds = list(table.schema_arrow.types)
    check_column_names(names, (*COLUMNS, "group", *DESCRIBING), str(file))
    identifying = [*(["group"] if "group" in names else []), *patient_columns(names)]
    simple = [
        name
        for name, kind in zip(names, kinds, strict=True)
        if "binary" not in str(kind) and (lists_options(name) or not types.is_nested(kind)) and names.count(name) == 1
    ]
    described = [name for name in DESCRIBING if name in simple]
    return identifying, described, [n for n in simple if n not in (*COLUMNS, *identifying, *described)]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a parquet file. Raises UserError if it, or what is read from it, is broken."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with pip install 'preceptor[parquet]'") from None
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            yield table
    except (UserError, MemoryError):  # pyarrow's own error for a lack of memory is both kinds
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names or statistics that are no text
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file} cannot be read as parquet ({reason}); {_COPY_AGAIN}") from error


def _cells(file: Path, columns: Sequence[str], others: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the cells of each row. Cells of `others` that have no value in Python are None."""
    row = 0
    with _open(file) as table:
        schema = table.schema_arrow
        absent = [name for name in COLUMNS if name not in schema.names]
        if absent:
            raise UserError(f"{file} has no column {absent[0]!r}; the required columns are {', '.join(COLUMNS)}")
        repeated = [name for name in columns if schema.names.count(name) > 1]
        if repeated:
            raise UserError(f"{file}: column {repeated[0]!r} occurs twice; keep one")
        for name in columns:
            _check_type(schema.field(name).type, f"{file}: column {name}")
        classes = _classes(schema.metadata or {})
        try:
            for batch in table.iter_batches(batch_size=_BATCH, columns=[*columns, *others]):
                for index in range(batch.num_rows):
                    cells = {name: batch.column(name)[index].as_py() for name in columns}
                    for name in classes.keys() & cells.keys():
                        cells[name] = _class_name(cells[name], classes[name], f"{file}: row {row}: {name}")
                    for name in others:
                        with suppress(ValueError):  # a text that is not UTF-8, or a time in nanoseconds
                            cells[name] = batch.column(name)[index].as_py()
                    yield cells
                    row += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: row {row}: a text is not UTF-8; {_COPY_AGAIN}, or correct the row") from error


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes of every column of the type ClassLabel, or of lists of them.

    The library `datasets` stores the numbers of classes in the column, and their names in the metadata of the table.
    """
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {column: _class_names(feature) for column, feature in features.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # not written by `datasets`
        return {}
    return {column: names for column, names in named.items() if names}


def _class_names(feature: Any) -> list[str]:
    if isinstance(feature, list):  # how `datasets` writes some lists
        return _class_names(feature[0]) if feature else []
    if not isinstance(feature, dict):
        return []
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else _class_names(feature.get("feature"))
    return names if isinstance(names, list) else []


def _class_name(value: Any, names: Sequence[str], place: str) -> Any:
    """Return the name of a class by its number, for each number of a list. -1 means that there is none."""
    if isinstance(value, list):
        return [_class_name(one, names, place) for one in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if not -1 <= value < len(names):
        raise UserError(
            f"{place} is class {value}, but the table has names for {len(names)} classes; store the names as texts"
        )
    return names[value] if value >= 0 else None


def _check_type(kind: Any, place: str) -> None:
    """Raise UserError for types whose text is not defined. `data.texts` checks the other ones cell by cell."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_temporal(kind) or types.is_float32(kind) or types.is_float16(kind):
        raise UserError(f"{place} has the type {kind}, which has no exact text; store it as texts")


def _sample(cells: dict[str, Any], place: str, name: str, split: Split, image: Path) -> Sample:
    question = " ".join(as_text(cells["question"], f"{place}: question").split())
    answers = tuple(" ".join(answer.split()) for answer in as_answers(cells["answer"], f"{place}: answer"))
    if not (question and answers and all(answers)):
        raise UserError(f"{place}: the question or the answer is empty; fill it in or delete the row")
    return Sample(
        id=name,
        image=image,
        question=question,
        answers=answers,
        answer_type=inferred_type(answers[0]),
        group=as_identifier(cells.get("group"), f"{place}: group") or image.stem[:16],
        split=split,
        question_type=as_text(cells.get("question_type"), f"{place}: question_type"),
    )


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


def _write(content: bytes, folder: Path) -> str:
    """Write an image file atomically unless it exists, and return its name."""
    digest = hashlib.sha256(content).hexdigest()
    suffix = next((suffix for mark, suffix in _MARKS.items() if mark.match(content)), ".img")
    path = folder / f"{digest}{suffix}"
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

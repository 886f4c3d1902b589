"""Read Hugging Face parquet folders with the columns `image, question, answer`: PathVQA and the hub's copy of VQA-RAD.

The tables contain the bytes of the images. Each image is extracted once and named by the hash of its content, so that
an image of several rows or splits is one file and one group. An index file makes later calls fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.groups import (
    column_findings,
    equal_files,
    folder_findings,
    group_by_patient,
    unread_splits,
    without_group,
)
from preceptor.data.identifying_columns import examination_columns, patient_columns
from preceptor.data.image_folder import IMAGE_SUFFIXES
from preceptor.data.limits import MAX_BYTES
from preceptor.data.locations import data_folder
from preceptor.data.options import lists_options
from preceptor.data.splits import SPLIT_NAMES, cut_validation
from preceptor.data.texts import as_identifier, as_text, check_column_names, is_given
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import ANSWER_TYPES, as_answers, inferred_type, mixed_types
from preceptor.data.vqa.columns import unread_columns
from preceptor.data.vqa.parquet_images import IMAGES, extract_images, suffix_of
from preceptor.data.vqa.parquet_tables import COLUMNS, COPY_AGAIN, open_table, read_cells
from preceptor.errors import UserError

SPLITS: dict[str, Split] = {"train": "train", "validation": "validation", "test": "test"}
DESCRIBING = ("answer_type", "question_type")
# Some releases of the hub append a fingerprint: train-00000-of-00002-0123abcd.parquet.
_SHARD = re.compile(r"[a-z]+-(?P<number>\d{5})-of-(?P<of>\d{5})(?:-[0-9a-z]+)?\.parquet")


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
            images = extract_images(file, folders, max_bytes)
            all_cells = read_cells(file, (*COLUMNS[1:], *identifying, *described), others)
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
    images_elsewhere = _image_columns([file for files in shards.values() for file in files])
    for column, file in images_elsewhere.items():
        reason = f"column {column!r} contains images and is not read: a question has one image, that of 'image'"
        data.findings.append(Finding((), file, reason, "warning"))
    data.findings += findings_of_types + _unread(rows, [name for name in columns if name not in images_elsewhere])
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
            raise UserError(f"{by_number[max(by_number)]} is numbered above its own total; {COPY_AGAIN}")
    first_of: dict[str, Path] = {}
    for file, digest in equal_files(file for files in shards.values() for file in files).items():
        if (other := first_of.setdefault(digest, file)) is not file:
            raise UserError(f"{other} and {file} are the same table; {COPY_AGAIN}")


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


def _image_columns(files: Sequence[Path]) -> dict[str, Path]:
    """Return the columns with images besides `image`, and a file of each. The first cell with a value decides."""
    from pyarrow import types

    found: dict[str, Path] = {}
    for file in files:
        with open_table(file) as table:
            kinds = {field.name: field.type for field in table.schema_arrow if field.name not in (*COLUMNS, *found)}
            for name, kind in kinds.items():
                if types.is_nested(kind) or "binary" in str(kind):
                    cells = (
                        cell.as_py() for batch in table.iter_batches(1, columns=[name]) for cell in batch.column(0)
                    )
                    if _holds_image(next((cell for cell in cells if cell is not None), None)):
                        found[name] = file
    return found


def _holds_image(cell: Any) -> bool:
    if isinstance(cell, dict | list):
        return any(map(_holds_image, cell.values() if isinstance(cell, dict) else cell))
    if isinstance(cell, str):
        return cell.lower().endswith(IMAGE_SUFFIXES)
    return isinstance(cell, bytes) and suffix_of(cell) != ""


def _image_names(file: Path) -> list[str]:
    """Return the name that a table stores with each image, or an empty list if it stores none."""
    from pyarrow import types

    with open_table(file) as table:
        kind = table.schema_arrow.field("image").type
        if not types.is_struct(kind) or kind.get_field_index("path") < 0:
            return []
        cells = [cell for batch in table.iter_batches(columns=["image.path"]) for cell in batch.column(0).to_pylist()]
    return [str(cell["path"]).replace("\\", "/") if cell and cell["path"] else "" for cell in cells]


def _columns(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the columns besides `COLUMNS`: those that name a group or a patient, those that describe, all others.

    Binary columns, and nested ones without texts such as an embedding, are not among the others (see `_image_columns`).

    Raises:
        UserError: a column has nearly the name of one that is read, such as `Group`.
    """
    with open_table(file) as table:
        from pyarrow import types

        names = list(table.schema_arrow.names)
        kinds = list(table.schema_arrow.types)
    check_column_names(names, (*COLUMNS, "group", *DESCRIBING), str(file))
    identifying = [*(["group"] if "group" in names else []), *patient_columns(names)]
    simple = [
        name
        for name, kind in zip(names, kinds, strict=True)
        if "binary" not in str(kind)
        and (not types.is_nested(kind) or "string" in str(kind) or lists_options(name))
        and names.count(name) == 1
    ]
    described = [name for name in DESCRIBING if name in simple]
    return identifying, described, [n for n in simple if n not in (*COLUMNS, *identifying, *described)]


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

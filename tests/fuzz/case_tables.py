"""Tables of volumes and files of splits, against the cases that were written."""

from __future__ import annotations

import csv
import io
import json
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.split_files import read_split
from preceptor.data.types import SegmentationDataset
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely, texts
from tests.fuzz.outcome import attempt, command, require
from tests.fuzz.target import Target

IMAGES = tuple(f"{case}_{kind}.nii" for case in ("p0", "p1", "p2") for kind in ("flair", "t1"))
MASKS = tuple(f"{case}_seg.nii" for case in ("p0", "p1", "p2"))
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation"}
SPLITS["test"] = "test"


def nifti(voxels: np.ndarray) -> bytes:
    """Return the bytes of a NIfTI file with voxels of 1 mm, written by hand."""
    header = bytearray(352)
    codes = {"uint8": 2, "int16": 4, "float32": 16}
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, voxels.ndim, *voxels.shape, *[1] * (7 - voxels.ndim))
    struct.pack_into("<2h", header, 70, codes[voxels.dtype.name], 8 * voxels.dtype.itemsize)
    struct.pack_into("<9f", header, 76, *[1.0] * 8, 352.0)
    header[123] = 2
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *np.eye(4)[:3].reshape(-1))
    header[344:348] = b"n+1\0"
    return bytes(header) + voxels.tobytes(order="F")


def write_volumes(folder: Path) -> None:
    """Write the images and label maps of all tables."""
    rng = np.random.default_rng(0)
    for name in IMAGES:
        (folder / name).write_bytes(nifti(rng.integers(0, 100, (4, 4, 4)).astype(np.int16)))
    for name in MASKS:
        (folder / name).write_bytes(nifti(rng.integers(0, 3, (4, 4, 4)).astype(np.uint8)))


PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "case": mostly(st.uuids().map(lambda name: str(name)[:8]), st.sampled_from(["p0", "p1", 0, 1, "p0_1"])),
    "flair": mostly(st.sampled_from(IMAGES), st.sampled_from(["", None, "NA"]), 30),
    "t1": mostly(st.sampled_from(IMAGES), st.sampled_from(["", None]), 30),
    "mask": st.sampled_from(MASKS),
    "group": st.sampled_from(["a", "b", 0, "0", 1.0, "", None]),
    "patient_id": st.sampled_from(["a", "b", 0]),
    "split": st.sampled_from([*SPLITS, "Train"]),
    "age": st.integers(20, 90),
    "seg": st.sampled_from(MASKS),
}
ODD = st.one_of(texts(), json_values(2), st.sampled_from(["x.nii.gz", "notes.txt", "NA", "../p0_t1.nii"]))


@dataclass(frozen=True)
class CasesInput:
    """The rows of a table of cases, how they are written, and damage to the bytes."""

    kind: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    given: bool
    bom: bool
    mutations: tuple[Mutation, ...]
    by_command: bool


@st.composite
def tables(draw: st.DrawFn) -> CasesInput:
    extra = draw(st.lists(st.sampled_from(["t1", "group", "patient_id", "split", "age", "seg"]), max_size=3))
    columns = list(dict.fromkeys(["case", "flair", "mask", *extra]))
    odd = draw(st.lists(st.sampled_from(columns), max_size=1))
    cells = [mostly(PLAIN[name], ODD, 3) if name in odd else PLAIN[name] for name in columns]
    rows = tuple(tuple(draw(cell) for cell in cells) for _ in range(draw(st.integers(2, 6))))
    if draw(rarely(16)):
        columns[draw(st.integers(0, len(columns) - 1))] = draw(texts())
    return CasesInput(
        draw(st.sampled_from(["csv", "jsonl"])),
        tuple(columns),
        rows,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(DAMAGE),
        draw(rarely(30)),
    )


def encode(case: CasesInput) -> bytes:
    """Return the bytes of the undamaged table."""
    if case.kind == "csv":
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer)
        writer.writerow(case.columns)
        writer.writerows([["" if cell is None else cell for cell in row] for row in case.rows])
        text = buffer.getvalue()
    else:
        rows = [dict(zip(case.columns, row, strict=True)) for row in case.rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return (b"\xef\xbb\xbf" if case.bom else b"") + text.encode(errors="surrogatepass")


def check_table(case: CasesInput, folder: Path) -> bool:
    """Read a table of cases and compare files, groups and splits with those that an independent reader finds."""
    write_volumes(folder)
    data = mutate(encode(case), case.mutations)
    path = folder / f"cases.{case.kind}"
    path.write_bytes(data)
    if case.by_command:
        data = (f"data.root={path}", "data.modalities=[flair]", "data.regions={one: [1], two: [2]}")
        return command("doctor", "lckd-brats", *data).accepted
    modalities = ["flair"] if case.given else None
    outcome = attempt(
        lambda: read_volumes(path, modalities=modalities, regions={"one": [1], "two": [2]}), place=path.name
    )
    if not outcome.accepted:
        return False
    text = data.decode("utf-8-sig")
    if case.kind == "csv":
        lines = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        rows: list[dict[str, Any]] = [
            dict(zip([n.strip() for n in lines[0]], line, strict=False)) for line in lines[1:]
        ]
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    compare(outcome.value, rows, folder)
    return True


def compare(data: SegmentationDataset, rows: list[dict[str, Any]], folder: Path) -> None:
    """Raise Wrong unless the cases are those of the rows that have a label map, each with its files."""
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        require(isinstance(row.get("case"), str | int | float), "a case that is no text was read", row.get("case"))
        require(not isinstance(row["case"], bool), "a case that is no text was read", row["case"])
        whole = isinstance(row["case"], float) and row["case"].is_integer()  # 1.0 is the number 1
        name = str(int(row["case"]) if whole else row["case"]).strip()
        by_name[unicodedata.normalize("NFC", name)] = row
    labelled = {name for name, row in by_name.items() if not empty(row.get("mask"))}
    require({case.id for case in data.samples} == labelled, "other cases", sorted(labelled))
    parts: dict[str, set[str]] = {}
    for case in data.samples:
        row = by_name[case.id]
        for modality, file in case.images.items():
            require(modality.strip(), "a modality without a name")
            if modality not in row:  # found under another spelling
                continue
            require(not empty(row.get(modality)), "an image of an empty cell", modality)
            require(file.path == folder / row[modality].strip(), "another image", file.path)
        for modality in data.modalities:
            given = not empty(row.get(modality)) and str(row[modality]).strip() not in ("NA", "nan")
            require(modality in case.images or not given, "an image is missing", modality)
        require(
            case.mask is not None and case.mask.path == folder / row["mask"].strip(), "another label map", case.mask
        )
        if not empty(row.get("split")):
            require(case.split in (SPLITS[row["split"].strip().lower()], "validation"), "another split", case.split)
        if not empty(row.get("group")):
            parts.setdefault(str(row["group"]).strip(), set()).add(case.split)
    require(all(len(splits) == 1 for splits in parts.values()), "a group is in several splits", parts)
    require("seg" not in data.modalities and "age" not in data.modalities, "a column is no modality", data.modalities)
    lacking = [
        m for m in ("flair",) if m not in data.modalities and any(str(r.get(m) or "").endswith(".nii") for r in rows)
    ]
    told = data.findings or any(name in note for note in data.notes for name in lacking)
    require(not lacking or told, "a column of images was left out", data.modalities)
    patients: dict[str, set[str]] = {}
    for case in data.samples:
        if not empty(by_name[case.id].get("patient_id")) and empty(by_name[case.id].get("group")):
            patients.setdefault(str(by_name[case.id]["patient_id"]), set()).add(case.split)
    told = bool(data.findings) or any("patient_id" in note for note in data.notes)
    require(told or all(len(splits) == 1 for splits in patients.values()), "a patient is in several splits", patients)


def empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


TABLE = Target(tables(), check_table, 200)

NAMES = mostly(st.sampled_from(["p0", "p1", "p2", "p3", " p0", "a b", "0"]), texts(), 4)


@dataclass(frozen=True)
class SplitInput:
    """The cases of each split in a file of one of three forms, and damage to its bytes."""

    kind: str
    splits: tuple[tuple[str, tuple[Any, ...]], ...]
    mutations: tuple[Mutation, ...]


SPLIT_INPUTS = st.builds(
    SplitInput,
    kind=st.sampled_from(["json", "csv", "folder"]),
    splits=st.lists(
        st.tuples(
            mostly(st.sampled_from([*SPLITS, "Test"]), texts(), 12),
            st.lists(mostly(NAMES, json_values(2), 12), max_size=4).map(tuple),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    mutations=DAMAGE,
)


def check_split(case: SplitInput, folder: Path) -> bool:
    """Read a file of splits and compare the split of every case."""
    names = [(split, name) for split, listed in case.splits for name in listed]
    if case.kind == "folder":
        path = folder / "splits"
        path.mkdir()
        for split, listed in case.splits:
            if split in SPLITS:
                text = "".join(f"{name}\n" for name in listed)
                (path / f"{split}.txt").write_bytes(mutate(text.encode(errors="surrogatepass"), case.mutations))
    else:
        path = folder / f"splits.{case.kind}"
        if case.kind == "json":
            text = json.dumps(dict(case.splits))
        else:
            buffer = io.StringIO(newline="")
            csv.writer(buffer).writerows([("case", "split"), *((name, split) for split, name in names)])
            text = buffer.getvalue()
        path.write_bytes(mutate(text.encode(errors="surrogatepass"), case.mutations))
    outcome = attempt(lambda: read_split(path), place=path.name)
    if not outcome.accepted:
        return False
    if case.kind == "folder":
        expected = {}
        for file in path.iterdir():
            for line in file.read_bytes().decode("utf-8-sig").split("\n"):
                if line.strip():
                    expected[line.split()[0]] = SPLITS[file.stem]
    elif case.kind == "json":
        content = json.loads(path.read_text("utf-8-sig"))
        expected = {name: SPLITS[split.lower()] for split, listed in content.items() for name in listed}
    else:
        rows = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
        expected = {row["case"].strip(): SPLITS[row["split"].strip().lower()] for row in rows}
    found = {name: split for name, (split, *_) in outcome.value.items()}
    expected = {unicodedata.normalize("NFC", name): split for name, split in expected.items()}
    require(found == expected, "other splits", (found, expected))
    return True


SPLIT = Target(SPLIT_INPUTS, check_split, 250)

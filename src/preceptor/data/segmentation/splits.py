"""Parts of cases: cut by patient, k-fold, or as a split file says. A patient is never in two splits."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from preceptor.data.segmentation.modalities import Endings, stem
from preceptor.data.splits import cut, ordered
from preceptor.data.texts import read_text
from preceptor.data.types import Case, Split
from preceptor.data.vqa.table import SPLITS
from preceptor.errors import UserError, nearest


def cut_parts(cases: Sequence[Case], validation: float, test: float, seed: int) -> list[Case]:
    """Return the cases with about the shares `validation` and `test` of them in these splits, by patient.

    Raises UserError where the shares are below 0 or leave nothing to train on.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise UserError(
            f"validation_fraction {validation} and test_fraction {test} must not be negative and leave something to "
            "train on; 0.1 and 0.2 are usual"
        )
    found = list(cases)
    if test:
        found = cut(found, "test", test, seed, leave=2 if validation else 1)
    return cut(found, "validation", validation / (1 - test), seed) if validation else found


def cut_fold(cases: Sequence[Case], fold: int, folds: int, validation: float, seed: int) -> list[Case]:
    """Return the cases with fold `fold` of `folds` in the test split, and validation cut from the rest.

    Patients are dealt out in the order of a hash, each to the smallest fold so far: every case is tested in just one
    fold, and folds differ by no more cases than the largest patient has.
    """
    sizes = Counter(case.group for case in cases)
    if not 2 <= folds <= len(sizes):
        raise UserError(f"folds is {folds}; it must be at least 2 and at most the number of patients, {len(sizes)}")
    if not 0 <= fold < folds:
        raise UserError(f"fold {fold} of {folds} does not exist; folds count from 0 to {folds - 1}")
    if not 0 <= validation < 1 - 1 / folds:
        raise UserError(
            f"validation_fraction {validation} leaves nothing to train on beside a test fold of 1/{folds}; 0.1 is usual"
        )
    held: list[int] = [0] * folds
    where: dict[str, int] = {}
    for group in ordered(sizes, f"folds:{seed}"):
        where[group] = min(range(folds), key=lambda number: (held[number], number))
        held[where[group]] += sizes[group]
    found = [replace(case, split="test") if where[case.group] == fold else case for case in cases]
    return cut(found, "validation", validation / (1 - 1 / folds), seed) if validation else found


def apply_split(cases: Sequence[Case], file: Path, notes: list[str]) -> list[Case]:
    """Return the cases that a split file names, each in its split; what it does not name is left out, with a note.

    Raises UserError for a file of another form, an unknown case, and a case or patient in two splits.
    """
    given = read_split(file)
    by_name = {case.id: case for case in cases}
    found: dict[str, Case] = {}
    for name, (split, place) in given.items():
        case = _meant(name, by_name, place)
        if case.id in found and found[case.id].split != split:
            raise UserError(f"{place}: case {case.id!r} is in {found[case.id].split} too; a case has one split")
        found[case.id] = replace(case, split=split)
    left = len(by_name) - len(found)
    if left:
        notes.append(f"{left} of {len(by_name)} cases are not named in {file.name} and are left out.")
    return [found[name] for name in by_name if name in found]


def require_whole_patients(cases: Sequence[Case], place: str) -> None:
    """Raise UserError where a patient has cases in two splits."""
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.group, case)
        if other.split != case.split:
            raise UserError(
                f"{place}: patient {case.group!r} is in {other.split} (case {other.id!r}) and in {case.split} (case "
                f"{case.id!r}); put all cases of a patient in one split"
            )


def read_split(path: Path) -> dict[str, tuple[Split, str]]:
    """Return the split of every name, and the place that says so.

    Forms: JSON ``{"train": [...], "validation": [...], "test": [...]}``; CSV with the columns case and split; a folder
    with train.txt, val.txt, test.txt, one case a line (as the published BraTS protocols come).
    """
    lists = _folder(path) if path.is_dir() else _json(path) if path.suffix == ".json" else _csv(path)
    splits: dict[str, tuple[Split, str]] = {}
    for name, split, place in lists:
        if name in splits and splits[name][0] != split:
            raise UserError(
                f"{place}: case {name!r} is in {splits[name][0]} too ({splits[name][1]}); a case has one split"
            )
        splits[name] = (split, place)
    if not splits:
        raise UserError(f"{path} names no case; it must name those of train, validation and test")
    return splits


def _folder(folder: Path) -> list[tuple[str, Split, str]]:
    found: list[tuple[str, Split, str]] = []
    for word, split in SPLITS.items():
        file = folder / f"{word}.txt"
        if file.is_file():
            for line, text in enumerate(read_text(file).splitlines(), start=1):
                if text.strip():
                    found.append((text.split()[0], split, f"{file}:{line}"))
    if not found:
        raise UserError(f"{folder} holds no train.txt, val.txt or test.txt with names of cases")
    return found


def _json(file: Path) -> list[tuple[str, Split, str]]:
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f'{file} is no object such as {{"train": [...], "validation": [...], "test": [...]}}')
    found: list[tuple[str, Split, str]] = []
    for key, names in content.items():
        if key.lower() not in SPLITS:
            raise UserError(f"{file}: split {key!r} is not known{nearest(key.lower(), SPLITS)}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: {key} is no list of case names; write them as texts in brackets")
        found += [(name, SPLITS[key.lower()], f"{file}: {key}") for name in names]
    return found


def _csv(file: Path) -> list[tuple[str, Split, str]]:
    if file.suffix.lower() != ".csv" or not file.is_file():
        raise UserError(f"{file} is no split file; give a .json, a .csv, or a folder with train.txt, val.txt, test.txt")
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), skipinitialspace=True)
    found: list[tuple[str, Split, str]] = []
    for row in rows:
        if not row.get("case") or not row.get("split"):
            raise UserError(f"{file}:{rows.line_num}: needed are the columns case and split, both filled in")
        value = row["split"].strip().lower()
        if value not in SPLITS:
            raise UserError(f"{file}:{rows.line_num}: split {row['split']!r} is not known{nearest(value, SPLITS)}")
        found.append((row["case"].strip(), SPLITS[value], f"{file}:{rows.line_num}"))
    return found


def _meant(name: str, cases: Mapping[str, Case], place: str) -> Case:
    """Return the case that a list means: its id, or a path to it, or with HGG_ in front or _vol behind."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    bare = stem(last) or last.removesuffix(".npy")
    splits = Endings(None).split(bare)
    for guess in (name, last, bare, splits[0] if splits else bare):
        for shorter in (guess, re.sub(r"^(HGG|LGG)_", "", guess)):
            for candidate in (shorter, shorter.removesuffix("_vol")):
                if candidate in cases:
                    return cases[candidate]
    raise UserError(f"{place}: case {name!r} is not in the data{_few(bare, list(cases))}")


def _few(name: str, known: Sequence[str]) -> str:
    """As `nearest`, but a data set has too many cases to list."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; its cases are named as {min(known)!r}"

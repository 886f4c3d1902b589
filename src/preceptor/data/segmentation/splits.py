"""Assign cases to splits: by patient, by fold, or from a split file. A patient is never in two splits."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from preceptor.data.segmentation.modalities import FileNames, stem
from preceptor.data.splits import SPLIT_NAMES, cut, ordered
from preceptor.data.texts import as_choice, as_identifier, read_json, read_rows, read_text
from preceptor.data.types import Case, Split
from preceptor.errors import UserError, nearest


def cut_splits(cases: Sequence[Case], validation: float, test: float, seed: int) -> list[Case]:
    """Move about the fractions `validation` and `test` of the cases to these splits, by patient.

    Raises:
        UserError: a fraction is negative, or nothing is left for training.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise UserError(
            f"validation_fraction {validation} and test_fraction {test} must not be negative and must leave "
            "training cases; 0.1 and 0.2 are usual"
        )
    cases = list(cases)
    if test:
        cases = cut(cases, "test", test, seed, leave=2 if validation else 1)
    return cut(cases, "validation", validation / (1 - test), seed) if validation else cases


def cut_fold(cases: Sequence[Case], fold: int, folds: int, validation: float, seed: int) -> list[Case]:
    """Move fold `fold` of `folds` to the test split, and cut validation from the remaining cases.

    Patients are assigned in the order of a hash, each to the smallest fold so far. Every case is tested in exactly one
    fold, and the sizes of folds differ by at most the number of cases of one patient.
    """
    sizes = Counter(case.group for case in cases)
    if not 2 <= folds <= len(sizes):
        raise UserError(f"folds={folds} must be at least 2 and at most the number of patients, {len(sizes)}")
    if not 0 <= fold < folds:
        raise UserError(f"fold={fold} must be from 0 to {folds - 1}, because folds={folds}")
    if not 0 <= validation < 1 - 1 / folds:
        raise UserError(
            f"validation_fraction {validation} leaves no training cases next to a test fold of 1/{folds}; 0.1 is usual"
        )
    fold_sizes: list[int] = [0] * folds
    fold_of: dict[str, int] = {}
    for group in ordered(sizes, f"folds:{seed}"):
        fold_of[group] = min(range(folds), key=lambda number: (fold_sizes[number], number))
        fold_sizes[fold_of[group]] += sizes[group]
    assigned = [replace(case, split="test") if fold_of[case.group] == fold else case for case in cases]
    return cut(assigned, "validation", validation / (1 - 1 / folds), seed) if validation else assigned


def apply_split(cases: Sequence[Case], file: Path, notes: list[str]) -> list[Case]:
    """Return the cases that a split file names, each in its split. Other cases are dropped, with a note.

    Raises:
        UserError: the file is invalid, names an unknown case, or puts a case in two splits.
    """
    split_of = read_split(file)
    by_name = {case.id: case for case in cases}
    assigned: dict[str, Case] = {}
    for name, (split, place) in split_of.items():
        case = _match_case(name, by_name, place)
        if case.id in assigned and assigned[case.id].split != split:
            raise UserError(f"{place}: case {case.id!r} is also in {assigned[case.id].split}; a case has one split")
        assigned[case.id] = replace(case, split=split)
    dropped = len(by_name) - len(assigned)
    if dropped:
        notes.append(f"{dropped} of {len(by_name)} cases are not named in {file.name} and were left out.")
    return [assigned[name] for name in by_name if name in assigned]


def require_whole_patients(cases: Sequence[Case], place: str) -> None:
    """Raise UserError if a patient has cases in two splits."""
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.group, case)
        if other.split != case.split:
            raise UserError(
                f"{place}: patient {case.group!r} is in {other.split} (case {other.id!r}) and in {case.split} (case "
                f"{case.id!r}); put all cases of a patient in one split"
            )


def read_split(path: Path) -> dict[str, tuple[Split, str]]:
    """Return the split of every name in a split file, and the place that assigns it.

    Accepted are JSON ``{"train": [...], "validation": [...], "test": [...]}``, CSV with the columns case and split, and
    a folder with train.txt, val.txt, test.txt and one case per line (the format of the published BraTS protocols).

    Raises:
        UserError: the file is invalid or puts a case in two splits.
    """
    lists = _folder(path) if path.is_dir() else _json(path) if path.suffix == ".json" else _csv(path)
    splits: dict[str, tuple[Split, str]] = {}
    for written, split, place in lists:
        name = unicodedata.normalize("NFC", written)  # as the ids of cases
        if name in splits and splits[name][0] != split:
            raise UserError(
                f"{place}: case {name!r} is also in {splits[name][0]} ({splits[name][1]}); a case has one split"
            )
        splits[name] = (split, place)
    if not splits:
        raise UserError(f"{path} names no case; list the cases of train, validation and test")
    return splits


def _folder(folder: Path) -> list[tuple[str, Split, str]]:
    entries: list[tuple[str, Split, str]] = []
    for word, split in SPLIT_NAMES.items():
        file = folder / f"{word}.txt"
        if file.is_file():
            for line, text in enumerate(read_text(file).split("\n"), start=1):
                if text.strip():
                    entries.append((text.split()[0], split, f"{file}:{line}"))
    if not entries:
        raise UserError(f"{folder} contains no train.txt, val.txt or test.txt with names of cases")
    return entries


def _json(file: Path) -> list[tuple[str, Split, str]]:
    content = read_json(file, "correct the file")
    if not isinstance(content, dict):
        raise UserError(f'{file} must be an object such as {{"train": [...], "validation": [...], "test": [...]}}')
    entries: list[tuple[str, Split, str]] = []
    for key, names in content.items():
        if key.lower() not in SPLIT_NAMES:
            raise UserError(f"{file}: split {key!r} is not known{nearest(key.lower(), SPLIT_NAMES)}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: {key} must be a list of case names (strings)")
        entries += [(name, SPLIT_NAMES[key.lower()], f"{file}: {key}") for name in names]
    return entries


def _csv(file: Path) -> list[tuple[str, Split, str]]:
    if file.suffix.lower() != ".csv" or not file.is_file():
        raise UserError(
            f"{file} is not a split file; give a .json, a .csv, or a folder with train.txt, val.txt, test.txt"
        )
    entries: list[tuple[str, Split, str]] = []
    for line, row in read_rows(file):
        place = f"{file}:{line}"
        name = as_identifier(row.get("case"), f"{place}: case")
        split = as_choice(row.get("split"), SPLIT_NAMES, f"{place}: split")
        if not name or split is None:
            raise UserError(f"{place}: the columns case and split must both be filled in")
        entries.append((name, split, place))
    return entries


def _match_case(name: str, cases: Mapping[str, Case], place: str) -> Case:
    """Return the case that an entry names: an id or a path, possibly with the prefix HGG_ or the suffix _vol."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    bare = stem(last) or last.removesuffix(".npy")
    parsed = FileNames().parse(bare)
    for candidate_name in (name, last, bare, parsed.case if parsed else bare):
        for shorter in (candidate_name, re.sub(r"^(HGG|LGG)_", "", candidate_name)):
            for candidate in (shorter, shorter.removesuffix("_vol")):
                if candidate in cases:
                    return cases[candidate]
    raise UserError(f"{place}: case {name!r} is not in the data{_suggest(bare, list(cases))}")


def _suggest(name: str, known: Sequence[str]) -> str:
    """Return a hint with close matches. A data set has too many cases to list all of them."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"; its cases have names such as {min(known)!r}"
    )

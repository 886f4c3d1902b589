"""Read the splits that a file or the name of a shipped split defines, and apply them to cases."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from preceptor.data.findings import Finding
from preceptor.data.segmentation.folders import listed
from preceptor.data.segmentation.modalities import KNOWN, FileNames, canonical_name, stem
from preceptor.data.splits import SPLIT_NAMES
from preceptor.data.texts import (
    Row,
    as_choice,
    as_identifier,
    as_text,
    check_column_names,
    read_json,
    read_rows,
    read_text,
)
from preceptor.data.types import Case, Split
from preceptor.errors import UserError, nearest

COLUMNS = ("case", "split", "modalities")
PUBLISHED_MASK = ("flair", "t1ce", "t1", "t2")
"""Order of the contrasts in the column mask of the lists of IM-Fuse."""


class Entry(NamedTuple):
    """What a split file says of a case: its split, the place, and the contrasts that it has (None: all of its own)."""

    split: Split
    place: str
    modalities: frozenset[str] | None = None


def apply_split(
    cases: Sequence[Case],
    file: Path,
    findings: list[Finding],
    *,
    key: str = "data.split_file",
    fold: int | None = None,
) -> list[Case]:
    """Return the cases that a split file names, each in its split. Other cases are left out, which is a finding.

    With the name of a shipped split (`key` is then `data.split`), a folder may lack all cases of one split, such as
    training. If it has none of the listed cases at all, all of its cases are test cases, which is a finding. `fold` is
    the one to read of a list of folds (see `read_split`).

    Raises:
        UserError: the file is invalid, names an unknown case, or puts a case in two splits; or one split of a
            shipped file is incomplete.
    """
    entries = read_split(file, fold)
    by_name = {case.id: case for case in cases}
    matches = {name: _match(name, by_name) for name in entries}
    missing = [name for name, case in matches.items() if case is None]
    source = f"{key}={file.stem}" if key == "data.split" else file.name
    if missing and key == "data.split":
        if len(missing) == len(entries):
            findings.append(_none_listed(source, missing[0], cases))
            return [replace(case, split="test") for case in cases]
        _require_whole_parts(entries, missing, source)
    elif missing:
        name = missing[0]
        more = f" ({len(missing)} of its {len(entries)} cases are not)" if len(missing) > 1 else ""
        raise UserError(f"{entries[name].place}: case {name!r} is not in the data{more}{_suggest(name, list(by_name))}")
    known = {*KNOWN, *(canonical_name(name) for case in cases for name in case.images)}
    assigned: dict[str, Case] = {}
    for name, (split, place, modalities) in entries.items():
        if unknown := sorted((modalities or frozenset()) - known):
            raise UserError(f"{place}: contrast {unknown[0]!r} is not in the data{nearest(unknown[0], known)}")
        case = matches[name]
        if case is None:
            continue
        if case.id in assigned and assigned[case.id].split != split:
            raise UserError(f"{place}: case {case.id!r} is also in {assigned[case.id].split}; a case has one split")
        assigned[case.id] = _restricted(replace(case, split=split), modalities)
    findings += _left_out(source, by_name, assigned)
    return [assigned[name] for name in by_name if name in assigned and assigned[name].images]


def _none_listed(source: str, name: str, cases: Sequence[Case]) -> Finding:
    reason = (
        f"none of the {len(cases)} cases is listed in {source}, so all of them are test cases; to train on them, set "
        f"data.split=null; if they are the cases of the split, rename them ({name}, for example)"
    )
    return Finding((), None, reason, "warning")


def _require_whole_parts(entries: Mapping[str, Entry], missing: Sequence[str], source: str) -> None:
    sizes = Counter(entry.split for entry in entries.values())
    lost = Counter(entries[name].split for name in missing)
    for split, count in lost.items():
        if count < sizes[split]:
            names = listed([name for name in missing if entries[name].split == split])
            raise UserError(
                f"{count} of the {sizes[split]} {split} cases of {source} are not in the data: {names}; complete the "
                "folder, or set data.split=null, which cuts splits by patient"
            )


def _restricted(case: Case, modalities: frozenset[str] | None) -> Case:
    """Return the case with those of its images whose contrast is listed."""
    if modalities is None:
        return case
    return replace(
        case, images={name: file for name, file in case.images.items() if canonical_name(name) in modalities}
    )


def _left_out(source: str, cases: Mapping[str, Case], assigned: Mapping[str, Case]) -> list[Finding]:
    findings = []
    unlisted = [name for name in cases if name not in assigned]
    if unlisted:
        reason = f"{len(unlisted)} of {len(cases)} cases are not in {source} and were left out: {listed(unlisted)}"
        findings.append(Finding(tuple(unlisted), None, reason, "warning"))
    empty = [name for name, case in assigned.items() if not case.images]
    if empty:
        reason = (
            f"{len(empty)} cases have in {source} none of the contrasts in data.modalities and were left out: "
            f"{listed(empty)}"
        )
        findings.append(Finding(tuple(empty), None, reason, "warning"))
    return findings


def read_split(path: Path, fold: int | None = None) -> dict[str, Entry]:
    """Return what a split file says of each case.

    Accepted are JSON ``{"train": [...], "validation": [...], "test": [...]}``, CSV with the columns case, split and
    perhaps modalities (the contrasts that a case has, such as ``flair+t1``; empty: all), and a folder with train.txt,
    val.txt, test.txt and one case per line (the format of the published BraTS protocols). Instead of a text file, a
    folder may have val15splits.csv and test15splits.csv of IM-Fuse. The mask there is the contrasts of a validation
    case; test cases are scored in all combinations there as here.

    JSON may also be a list of folds (splits_final.json of nnU-Net), of which number `fold` is read: its cases `val` are
    the test cases, as those of a fold always are.

    Raises:
        UserError: the file is invalid or puts a case in two splits, or `fold` is not one of its folds.
    """
    if path.suffix == ".json" and not path.is_dir():
        content = read_json(path, "correct the file")
        lists, has_folds = _json(content, path, fold), isinstance(content, list)
    else:
        lists, has_folds = (_folder(path) if path.is_dir() else _csv(path)), False
    if fold is not None and not has_folds:
        raise UserError(f"data.fold={fold} cannot be combined with the split of {path}; remove one of them")
    splits: dict[str, Entry] = {}
    for written, entry in lists:
        name = unicodedata.normalize("NFC", written)  # as the ids of cases
        if name in splits and splits[name].split != entry.split:
            raise UserError(
                f"{entry.place}: case {name!r} is also in {splits[name].split} ({splits[name].place}); a case has one "
                "split"
            )
        if name in splits and splits[name].modalities != entry.modalities:
            raise UserError(f"{entry.place}: case {name!r} has other contrasts in {splits[name].place}; remove one row")
        splits[name] = entry
    if not splits:
        raise UserError(f"{path} names no case; list the cases of train, validation and test")
    return splits


def _folder(folder: Path) -> list[tuple[str, Entry]]:
    entries: list[tuple[str, Entry]] = []
    for word, split in SPLIT_NAMES.items():
        file = folder / f"{word}.txt"
        if file.is_file():
            for line, text in enumerate(read_text(file).split("\n"), start=1):
                if text.strip():
                    entries.append((text.split()[0], Entry(split, f"{file}:{line}")))
        file = folder / f"{word}15splits.csv"
        if file.is_file():
            for line, row in read_rows(file):
                place = f"{file}:{line}"
                name = as_identifier(row.get("case"), f"{place}: case")
                if not name:
                    raise UserError(f"{place}: the column case must be filled in")
                shown = _published_mask(row.get("mask"), f"{place}: mask")
                entries.append((name, Entry(split, place, shown if split == "validation" else None)))
    if not entries:
        raise UserError(f"{folder} contains no train.txt, val.txt or test.txt with names of cases")
    return entries


def _published_mask(value: object, place: str) -> frozenset[str]:
    """Return the contrasts of a mask such as ``[True, False, False, True]``."""
    words = re.findall(r"\w+", as_text(value, place))
    if len(words) != len(PUBLISHED_MASK) or not {"True"} <= set(words) <= {"True", "False"}:
        raise UserError(f"{place} must be a list of four booleans ({', '.join(PUBLISHED_MASK)}) with at least one True")
    return frozenset(name for name, word in zip(PUBLISHED_MASK, words, strict=True) if word == "True")


def _json(content: Any, file: Path, fold: int | None) -> list[tuple[str, Entry]]:
    place, splits = str(file), SPLIT_NAMES
    if isinstance(content, list) and content:
        if fold is None or fold >= len(content):
            unset = "set data.fold to" if fold is None else f"data.fold={fold} must be"
            raise UserError(f"{file} has {len(content)} folds, and {unset} one of 0 to {len(content) - 1}")
        content, place, splits = content[fold], f"{file}: fold {fold}", {"train": "train", "val": "test"}
    if not isinstance(content, dict):
        raise UserError(f'{place} must be an object such as {{"train": [...], "validation": [...], "test": [...]}}')
    entries: list[tuple[str, Entry]] = []
    for key, names in content.items():
        if key.lower() not in splits:
            raise UserError(f"{place}: split {key!r} is not known{nearest(key.lower(), splits)}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{place}: {key} must be a list of case names (strings)")
        entries += [(name, Entry(splits[key.lower()], f"{place}: {key}")) for name in names]
    return entries


def _csv(file: Path) -> list[tuple[str, Entry]]:
    if file.suffix.lower() != ".csv" or not file.is_file():
        raise UserError(
            f"{file} is not a split file; give a .json, a .csv, or a folder with train.txt, val.txt, test.txt"
        )
    rows = read_rows(file, lambda names, place: check_column_names(names, COLUMNS, place))
    _require_read(rows, file)
    entries: list[tuple[str, Entry]] = []
    for line, row in rows:
        place = f"{file}:{line}"
        name = as_identifier(row.get("case"), f"{place}: case")
        split = as_choice(row.get("split"), SPLIT_NAMES, f"{place}: split")
        if not name or split is None:
            raise UserError(f"{place}: the columns case and split must both be filled in")
        entries.append((name, Entry(split, place, _modalities(row.get("modalities"), f"{place}: modalities"))))
    return entries


def _require_read(rows: Sequence[Row], file: Path) -> None:
    """Raise UserError if the contrasts of the cases seem to be in a column that is not read."""
    columns = list(rows[0][1]) if rows else []
    for column in columns if "modalities" not in columns else []:
        words = {canonical_name(word) for _, row in rows for word in re.findall(r"[\w-]+", row[column])}
        if column not in COLUMNS and (column.lower() == "modality" or (words and words <= set(KNOWN))):
            raise UserError(
                f"{file}: column {column!r} is not read; rename it to modalities if it lists the contrasts of each "
                "case, or delete it"
            )


def _modalities(value: object, place: str) -> frozenset[str] | None:
    """Return the contrasts that a cell such as ``flair+t1`` names, or None if it is empty."""
    text = as_text(value, place)
    if not text:
        return None
    names = [canonical_name(word) for word in text.split("+")]
    if "" in names:
        raise UserError(f"{place} {text!r} must be names joined by +, such as flair+t1")
    return frozenset(names)


def _match(name: str, cases: Mapping[str, Case]) -> Case | None:
    """Return the case that an entry names: an id or a path, possibly with the prefix HGG_ or the suffix _vol."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    bare = stem(last) or last.removesuffix(".npy")
    parsed = FileNames().parse(bare)
    for candidate_name in (name, last, bare, parsed.case if parsed else bare):
        for shorter in (candidate_name, re.sub(r"^(HGG?|LGG?)_", "", candidate_name)):
            for candidate in (shorter, shorter.removesuffix("_vol")):
                if candidate in cases:
                    return cases[candidate]
    return None


def _suggest(name: str, known: Sequence[str]) -> str:
    """Return a hint with close matches. A data set has too many cases to list all of them."""
    close = difflib.get_close_matches(re.split(r"[/\\]", name)[-1], known, n=3, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"; its cases have names such as {min(known)!r}"
    )

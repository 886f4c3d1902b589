"""Assign cases to splits by patient or by fold. A patient is never in two splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from preceptor.data.splits import cut, ordered
from preceptor.data.types import Case
from preceptor.errors import UserError


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


def cut_labelled(cases: Sequence[Case], cut_these: Callable[[Sequence[Case]], list[Case]]) -> list[Case]:
    """Cut the cases with a label map as if there were no others. Those join the split of their patient, if it has one.

    Cases without a label map can only train. They must neither take the places of cases that are scored, nor change
    which ones these are.
    """
    done = {case.id: case for case in cut_these([case for case in cases if case.mask is not None])}
    split_of = {case.group: case.split for case in done.values()}
    return [done.get(case.id) or replace(case, split=split_of.get(case.group, case.split)) for case in cases]


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

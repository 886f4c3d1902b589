"""Checks of the arguments of the Python API. Each raises a UserError that names the argument and what it must be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from preceptor.errors import UserError


def as_path(value: Any, name: str) -> Path:
    """Return a path, in which ``~`` is the home folder.

    Raises UserError for anything but a text or a path, for an empty text and for a NUL character.
    """
    if not isinstance(value, str | os.PathLike) or value == "":
        raise UserError(f"{name} must be the path of a file or folder, not {_shown(value)}")
    path = Path(value)
    if "\0" in str(path):
        raise UserError(f"{name} {str(path)!r} contains a NUL character, which no file system allows; correct it")
    return expand_home(path)


def expand_home(path: Path) -> Path:
    """Return a path with the home folder for ``~`` or ``~user``, or the path itself if there is no such user."""
    return Path(os.path.expanduser(path))


def as_output_folder(value: Any, name: str) -> Path:
    """Return the path of a folder that may not exist yet. Raises UserError if it is a file."""
    path = as_path(value, name)
    if path.exists() and not path.is_dir():
        raise UserError(f"{name} {path} is a file; choose another folder")
    return path


def as_text(value: Any, name: str) -> str:
    """Return a text. Raises UserError for anything else, and for what cannot be written in UTF-8.

    A command line stands for a byte that is not UTF-8 by half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} contains {value[error.start]!r}, which is not a character but a byte that is not UTF-8, or half "
            "of a surrogate pair; write it in UTF-8"
        ) from None
    return value


def as_optional_text(value: Any, name: str) -> str | None:
    """Return a text or None. Raises UserError as `as_text`."""
    return None if value is None else as_text(value, name)


def as_question(value: Any) -> str:
    """Return a question. Raises UserError as `as_text`, and if it is empty."""
    question = as_text(value, "the question")
    if not question.strip():
        raise UserError("the question is empty")
    return question


def as_positive(value: Any, name: str) -> int:
    """Return a whole number. Raises UserError if it is below 1 or of another type."""
    if not is_integer(value) or value < 1:
        raise UserError(f"{name} must be a whole number of 1 or more, not {_shown(value)}")
    return int(value)


def as_integer(value: Any, name: str) -> int:
    """Return a whole number. Raises UserError for another type."""
    if not is_integer(value):
        raise UserError(f"{name} must be a whole number, not {_shown(value)}")
    return int(value)


def as_share(value: Any, name: str, *, positive: bool = False) -> float:
    """Return a number from 0 to 1, with `positive` above 0. Raises UserError for others and for another type."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else -1.0
    if not 0 <= number <= 1 or (positive and not number):
        raise UserError(f"{name} must be {'above 0 and at most 1' if positive else 'from 0 to 1'}, not {_shown(value)}")
    return number


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, of Python or of NumPy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_list(values: Any, name: str) -> list[Any]:
    """Return the elements of an iterable. A text or a path is one element. Raises UserError for anything else."""
    if isinstance(values, str | os.PathLike):
        return [values]
    if not isinstance(values, Iterable):
        raise UserError(f"{name} must be a list, not {_shown(values)}")
    return list(values)


def as_pairs(values: Any, name: str, of: str) -> Iterator[tuple[Any, Any]]:
    """Return an iterator that takes one pair after the other from an iterable.

    Args:
        values: The iterable.
        name: Name of the argument.
        of: Names of both elements of a pair, such as "image, question".

    Raises:
        UserError: at once, if `values` is no iterable; in the iteration, if an element is not a pair in an order.
    """
    wanted = f"{name} must be a list of pairs ({of})"
    if isinstance(values, str | os.PathLike | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{wanted}, not {_shown(values)}")

    def pairs() -> Iterator[tuple[Any, Any]]:
        for value in values:
            unordered = isinstance(value, str | bytes | os.PathLike | Mapping | Set)
            pair = () if unordered or not isinstance(value, Iterable) else tuple(value)
            if len(pair) != 2:
                raise UserError(f"{wanted}, but one of its elements is {_shown(value)}")
            yield pair[0], pair[1]

    return pairs()


def _shown(value: Any) -> str:
    """Return a text or a number as it is written, and the type of anything else, which may be large."""
    return repr(value) if value is None or isinstance(value, str | int | float) else type(value).__name__

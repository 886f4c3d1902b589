"""Damage to bytes, as strategies of hypothesis. A position is a number from 0 to 65535, scaled to the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Mutation = tuple[Any, ...]
SCALE = 2**16

POSITIONS = st.integers(0, SCALE - 1)
FLIP = st.tuples(st.just("flip"), POSITIONS, st.integers(0, 7))
SET = st.tuples(st.just("set"), POSITIONS, st.sampled_from([0, 0xFF, 0x7F, 0x80, 0x0A, 0x20, 0x22]))
CUT = st.tuples(st.just("cut"), POSITIONS, st.integers(1, 64))
INSERT = st.tuples(st.just("insert"), POSITIONS, st.binary(min_size=1, max_size=16))
COPY = st.tuples(st.just("copy"), POSITIONS, POSITIONS, st.integers(1, 64))
TRUNCATE = st.tuples(st.just("truncate"), POSITIONS)
ZERO_TAIL = st.tuples(st.just("zero tail"), POSITIONS)


def mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any], one_in: int = 8) -> st.SearchStrategy[Any]:
    """Return a strategy that draws from `usual`, and once in `one_in` times from `odd`."""
    return st.integers(1, one_in).flatmap(lambda number: odd if number == one_in else usual)


def rarely(one_in: int) -> st.SearchStrategy[bool]:
    """Return a strategy that is true once in `one_in` times."""
    return st.integers(1, one_in).map(lambda number: number == one_in)


MUTATIONS = st.lists(st.one_of(FLIP, SET, CUT, INSERT, COPY, TRUNCATE, ZERO_TAIL), min_size=1, max_size=3)
DAMAGE = mostly(st.just(()), MUTATIONS.map(tuple), 4)
"""Damage to the bytes of a quarter of the files."""


def place(position: int, size: int) -> int:
    """Return a position as an index below `size`."""
    return position * size // SCALE


def mutate(data: bytes, mutations: Sequence[Mutation]) -> bytes:
    """Return the damaged bytes."""
    found = bytearray(data)
    for kind, position, *rest in mutations:
        at = place(position, len(found))
        if not found:
            break
        if kind == "flip":
            found[at] ^= 1 << rest[0]
        elif kind == "set":
            found[at] = rest[0]
        elif kind == "cut":
            del found[at : at + rest[0]]
        elif kind == "insert":
            found[at:at] = rest[0]
        elif kind == "copy":
            begin = place(rest[0], len(found))
            piece = found[begin : begin + rest[1]]
            found[at : at + len(piece)] = piece
        elif kind == "truncate":
            del found[at:]
        elif kind == "zero tail":
            found[at:] = bytes(len(found) - at)
    return bytes(found)


def json_values(leaves: int = 6) -> st.SearchStrategy[Any]:
    """Return JSON values of any type, with the texts and numbers that break readers."""
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, -1, 1.0, 0.5, 1e308, float("nan"), float("inf"), -0.0, 2**53 + 1]),
        st.floats(),
        texts(),
    )
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts(), inner, max_size=3)),
        max_leaves=leaves,
    )


ODD_TEXTS = (
    "",
    " ",
    "0",
    "null",
    "NaN",
    "yes",
    "No.",
    "\u2212 5",
    "e\u0301",
    "\u00e9",
    "\u2028",
    "\x85",
    "a\x1eb",
    "a\x0cb",
    "\x00",
    "\ud800",
    "\ufeff",
    "\u202e",
    "..",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "a" * 300,
    "\u5de6\u80ba",
    '"',
    "a,b",
    "a;b",
    "a\tb",
    "a\nb",
    "a\r\nb",
    "=1+1",
    "{}",
    "[]",
    "<image>",
    "%s",
    "{name}",
)


def texts() -> st.SearchStrategy[str]:
    """Return texts of any Unicode characters, and those that break readers."""
    return st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))

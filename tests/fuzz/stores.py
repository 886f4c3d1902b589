"""Damaged teacher caches and pseudo-label stores: refused, or read as they were written."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from preceptor.teachers.array_store import ArrayStore, ArrayStoreWriter
from preceptor.teachers.label_store import Label, LabelStore, LabelStoreKey, damaged_rows, read_labels, read_store
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, MUTATIONS, Mutation, json_values, mostly, mutate, rarely
from tests.fuzz.outcome import attempt, require
from tests.fuzz.target import Target

KEYS = tuple(hashlib.sha256(str(number).encode()).hexdigest() for number in range(5))
ARRAYS = {"logits": np.arange(10, dtype=np.float32).reshape(5, 2), "ids": np.arange(5, dtype=np.int32)}
CACHE_KEY = {"teacher": "t", "sizes": {"width": 8}}
LABELS = tuple(
    Label(
        key,
        1 + number % 2,
        f"answer {number} é",
        bool(number % 2),
        number,
        0.5,
        0.1,
        "logprobs",
        (-0.5, -0.1),
        ("a", "b"),
    )
    for number, key in enumerate(KEYS)
)
LABEL_KEY = LabelStoreKey("teacher", {"temperature": 0.0})


@functools.cache
def templates() -> Path:
    """Return a folder with a sound cache and a sound store of pseudo-labels."""
    folder = Path(tempfile.mkdtemp(prefix="preceptor-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ArrayStoreWriter(folder / "cache", "topk", CACHE_KEY) as writer:
        for rows in (slice(0, 3), slice(3, 5)):
            writer.append(KEYS[rows], [1] * len(KEYS[rows]), {name: array[rows] for name, array in ARRAYS.items()})
        writer.finish()
    with LabelStore.open(folder / "labels", LABEL_KEY, {"f": "data"}) as store:
        store.append(LABELS)
    return folder


@dataclass(frozen=True)
class CacheInput:
    """The file of a cache to damage (a number), an odd value in its manifest, and damage to bytes."""

    file: int
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    deleted: bool


CACHES = st.builds(
    CacheInput,
    st.integers(0, 7),
    mostly(st.none(), st.tuples(st.integers(0, 60), json_values()), 3),
    DAMAGE,
    rarely(12),
)


def check_cache(case: CacheInput, folder: Path) -> bool:
    """Open a damaged cache, verify its files and read all arrays; what is accepted is what was written."""
    place = folder / "cache"
    shutil.copytree(templates() / "cache", place)
    manifest = place / "manifest.json"
    if case.replaced is not None:
        content = replace_nested(json.loads(manifest.read_text()), *case.replaced)
        manifest.write_text(json.dumps(content), errors="surrogatepass")
    files = sorted(place.iterdir())
    path = files[case.file % len(files)]
    path.write_bytes(mutate(path.read_bytes(), case.mutations))
    if case.deleted:
        path.unlink()

    def read() -> tuple[dict[str, np.ndarray], np.ndarray, int]:
        store = ArrayStore.open(place, "topk", CACHE_KEY)
        store.verify_files()
        arrays = {name: np.array(store.load(name)) for name in store.arrays}
        return arrays, store.find(KEYS), len(store)

    outcome = attempt(read, place=folder.name)
    if not outcome.accepted:
        return False
    arrays, rows, count = outcome.value
    require(count == len(KEYS), "another number of rows", count)
    for name, array in ARRAYS.items():
        require(name in arrays and np.array_equal(arrays[name][rows], array), "other values", name)
    return True


CACHE = Target(CACHES, check_cache, 100)


@dataclass(frozen=True)
class StoreInput:
    """Damage to the bytes of a store of pseudo-labels."""

    mutations: tuple[Mutation, ...]


def check_store(case: StoreInput, folder: Path) -> bool:
    """Read a damaged store; what is accepted is what was written. Reading and checking agree."""
    place = folder / "labels"
    shutil.copytree(templates() / "labels", place)
    path = place / "labels.sqlite"
    path.write_bytes(mutate(path.read_bytes(), case.mutations))
    header = attempt(lambda: read_store(place), place=place)
    found = attempt(lambda: read_labels(place), place=place)
    damage = attempt(lambda: damaged_rows(place), place=place)
    if found.accepted:
        require(set(found.value) <= set(LABELS), "other labels", found.value)
        require(
            len(found.value) == len(LABELS) or not damage.accepted or damage.value, "labels are lost without a word"
        )
    if header.accepted:
        require(header.value[0] == LABEL_KEY, "another cache key", header.value)
    return found.accepted


STORE = Target(st.builds(StoreInput, MUTATIONS.map(tuple)), check_store, 150)

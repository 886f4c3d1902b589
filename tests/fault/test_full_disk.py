"""Stores on a file system that is really full: an error that Python can report, no signal, and a rerun that works."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from preceptor.errors import UserError
from preceptor.teachers.array_store import ArrayStore, ArrayStoreWriter
from preceptor.teachers.label_store import Label, LabelStore, LabelStoreKey, read_labels
from tests.fault.tiny import mounted


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def write(folder: Path) -> None:
    with ArrayStoreWriter(folder, "test", {}) as writer:
        for block in range(3):
            keys = [hashlib.sha256(f"{block}-{row}".encode()).hexdigest() for row in range(64)]
            if not writer.resume(keys):
                writer.append(keys, [1] * 64, {"x": np.full((64, 700), block, np.float32)})
        writer.finish()


def test_joining_an_array_on_a_full_disk_raises_and_can_be_resumed(small_disk):
    """The three blocks fit, the joined array does not. Written as a memory map, it would end the process by SIGBUS."""
    with pytest.raises(OSError, match="No space left"):
        write(small_disk / "cache")
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    write(small_disk / "cache")
    assert ArrayStore.open(small_disk / "cache", "test", {}).load("x")[:, 0].tolist() == [0] * 64 + [1] * 64 + [2] * 64
    assert [path.name for path in small_disk.iterdir()] == ["cache"]


def test_a_full_disk_is_no_damage_of_pseudo_labels(small_disk):
    key, labels = LabelStoreKey("teacher", {}), [Label(f"key {i}", 0, "yes " * 500, True) for i in range(1000)]
    with LabelStore.open(small_disk / "labels", key, {}) as store:
        store.append(labels[:2])
        with pytest.raises(UserError, match="the disk is full"):
            store.append(labels[2:])
    assert read_labels(small_disk / "labels") == labels[:2]
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    with LabelStore.open(small_disk / "labels", key, {}) as store:
        store.append(labels[2:])
    assert read_labels(small_disk / "labels") == labels


def test_a_new_store_of_labels_on_a_full_disk_leaves_no_temporary_file(small_disk):
    (small_disk / "fill").write_bytes(bytes(1020 * 1024))
    with pytest.raises(UserError, match="the disk is full"):
        LabelStore.open(small_disk / "labels", LabelStoreKey("teacher", {}), {})
    assert list((small_disk / "labels").iterdir()) == []

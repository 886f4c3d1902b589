"""The store of a teacher's answers: what comes back, what is refused, and what survives a kill."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import UserError
from preceptor.teachers.label_store import FILE, Label, LabelStore, LabelStoreKey, damaged_rows, read_labels, read_store

KEY = LabelStoreKey("a-model", {"kind": "endpoint", "temperature": 0.0})


def label(number: int) -> Label:
    return Label(f"{number:064x}", 0, f"Antwort ü 肝 {number}", True, 2, 0.5, 0.25, "top_logprobs")


def write(folder: Path, labels: list[Label]) -> Path:
    with LabelStore.open(folder, KEY, {}) as store:
        store.append(labels)
    return folder / FILE


@given(
    st.lists(
        st.tuples(
            st.text(), st.text(), st.floats(0, 1) | st.none(), st.lists(st.floats(-100, 0), max_size=4), st.booleans()
        ),
        max_size=4,
    )
)
def test_any_label_comes_back_equal(tmp_path_factory, rows):
    labels = [
        Label(f"{i:064x}", i, answer, ended, len(logprobs) or None, p, p, "agreement", tuple(logprobs), (answer, other))
        for i, (answer, other, p, logprobs, ended) in enumerate(rows)
    ]
    folder = tmp_path_factory.mktemp("store")
    write(folder, labels)
    assert read_labels(folder) == labels
    assert damaged_rows(folder) == []


def test_a_store_is_extended_and_a_stored_key_is_skipped(tmp_path):
    with LabelStore.open(tmp_path / "store", KEY, {"f" * 64: "slake"}) as store:
        store.append([label(2), label(0)])
    with LabelStore.open(tmp_path / "store", KEY, {"e" * 64: "own data"}) as store:
        assert store.keys == {label(0).key, label(2).key}
        store.append([label(0), label(1), label(1)])
    assert read_labels(tmp_path / "store") == [label(2), label(0), label(1)]
    assert read_store(tmp_path / "store") == (KEY, {"f" * 64: "slake", "e" * 64: "own data"})


def test_labels_are_read_while_they_are_written(tmp_path):
    with LabelStore.open(tmp_path / "store", KEY, {}) as store:
        for number in range(3):
            store.append([label(number)])
            assert len(read_labels(tmp_path / "store")) == number + 1


def test_a_store_has_one_writer(tmp_path):
    with (
        LabelStore.open(tmp_path / "store", KEY, {}),
        pytest.raises(UserError, match="another process writes pseudo-labels"),
    ):
        LabelStore.open(tmp_path / "store", KEY, {})
    with LabelStore.open(tmp_path / "store", KEY, {}):
        pass


def test_other_folders_and_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no pseudo-labels in .*: write them first with `preceptor teach`"):
        read_labels(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.docx").touch()
    with pytest.raises(UserError, match="does not hold pseudo-labels; name another folder"):
        LabelStore.open(tmp_path / "notes", KEY, {})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text("{}")
    (tmp_path / "old" / "labels-00000.jsonl").touch()
    for refused in (read_labels, lambda folder: LabelStore.open(folder, KEY, {})):
        with pytest.raises(UserError, match=r"older format \(JSON lines\).*another --output folder"):
            refused(tmp_path / "old")
    with closing(sqlite3.connect(write(tmp_path / "store", []))) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="has format 99"):
        LabelStore.open(tmp_path / "store", KEY, {})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_changed_byte_of_an_answer_is_found(tmp_path, number):
    file = write(tmp_path / "store", [label(i) for i in range(3)])
    data = bytearray(file.read_bytes())
    data[data.index(label(number).answer.encode()) + 4] ^= 1
    file.write_bytes(bytes(data))
    for refused in (read_labels, lambda folder: LabelStore.open(folder, KEY, {})):
        with pytest.raises(
            UserError, match=rf"row {number + 1} is damaged: .*DELETE FROM labels WHERE id = {number + 1}"
        ):
            refused(tmp_path / "store")
    assert damaged_rows(tmp_path / "store") == [f"row {number + 1}"]
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM labels WHERE id = ?", (number + 1,))  # as the message says
    write(tmp_path / "store", [label(number)])
    assert sorted(read_labels(tmp_path / "store"), key=lambda one: one.key) == [label(i) for i in range(3)]


def test_several_problems_of_the_file_are_one_sentence(tmp_path):
    file = write(tmp_path / "store", [label(i) for i in range(400)])
    data = bytearray(file.read_bytes())
    data[4096 * 2 : 4096 * 3] = bytes(4096)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"labels\.sqlite is damaged \(") as error:
        read_labels(tmp_path / "store")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_file_that_is_cut_off_is_refused(tmp_path, share):
    file = write(tmp_path / "store", [label(i) for i in range(400)])
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    for refused in (read_labels, damaged_rows, lambda folder: LabelStore.open(folder, KEY, {})):
        with pytest.raises(UserError, match=r"labels\.sqlite is damaged \(.*run `preceptor teach` again"):
            refused(tmp_path / "store")


def test_a_file_that_is_not_a_database_is_refused(tmp_path):
    file = write(tmp_path / "store", [])
    file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(UserError, match=r"labels\.sqlite is damaged \(file is not a database\)"):
        read_labels(tmp_path / "store")


WRITER = """
import sys
from pathlib import Path
from tests.teachers.test_label_store import KEY, label
from preceptor.teachers.label_store import LabelStore

with LabelStore.open(Path(sys.argv[1]), KEY, {}) as store:
    for number in range(10**6):
        store.append([label(number)])
        print(number, flush=True)
"""


def test_sigkill_loses_no_answer_that_was_reported(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store")]
    for seed in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(10):
            process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.02))
        process.kill()
        reported = 9 + len(process.stdout.read().splitlines())
        assert process.wait() == -signal.SIGKILL
        labels = read_labels(tmp_path / "store")
        assert labels == [label(number) for number in range(len(labels))]
        assert len(labels) >= reported
    # SQLite removes the journal of an interrupted transaction with the next one.
    assert {path.name for path in (tmp_path / "store").iterdir()} <= {FILE, f"{FILE}-journal"}

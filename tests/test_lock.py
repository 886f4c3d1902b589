"""One process at a time writes to a place; a killed one blocks nobody, even if its workers live on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.errors import UserError
from preceptor.files import LockedError, json_lines, lock, scratch_folder, write_text
from tests.command_line import call
from tests.fault.tiny import write_recipe

HOLDER = """
import os, sys, time
from pathlib import Path
from preceptor.files import lock
with lock(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives its parent
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process with a worker, which holds the lock of ``tmp_path / 'run'``."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_training_is_refused_and_named_and_a_killed_one_blocks_nobody(tmp_path, holder):
    command = ["train", write_recipe(tmp_path), f"output={tmp_path / 'run'}", f"data.root={tmp_path / 'data'}"]
    code, _, err = call(*command, "teacher.train.epochs=1")
    assert code == 2
    assert f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}" in err
    holder.kill()  # its worker lives on
    holder.wait()
    with lock(tmp_path / "run" / ".lock"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_of_this_process_is_refused_too_and_its_file_is_removed(tmp_path):
    with lock(tmp_path / "a"), pytest.raises(LockedError, match=f"process {os.getpid()} on "), lock(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_can_be_locked_itself(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="another process"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_the_scratch_folder_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stale = tmp_path / f"preceptor-{os.getuid()}-stale"
    stale.mkdir()
    with scratch_folder() as first, scratch_folder() as second:
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_not_utf8_are_written_as_escapes(tmp_path: Path):
    name = os.fsdecode(b"\xff.png")
    write_text(tmp_path / "a", json_lines([{"image": name}]))
    assert (tmp_path / "a").read_bytes() == b'{"image": "\\udcff.png"}\n'

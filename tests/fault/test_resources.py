"""Limits of the machine and of paths, really injected in a forked process: one sentence, exit code 2, nothing left."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.tiny import CLINKD, LCKD, mounted, write_recipe
from tests.fault.verbs import VERBS, contents, forked_call, hidden, limit, limit_of_memory, limit_of_open_files


def sentence_of(err: str) -> str:
    assert "Traceback" not in err, err
    return " ".join(err[err.rindex("error: ") :].split())


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "out"


def in_a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "out"


PLACES: dict[str, Callable[[Path], Path]] = {
    "under a file": under_a_file,
    "in a loop of links": in_a_loop,
    "too long": lambda folder: folder / ("x" * 300),
    "not writable even for root": lambda folder: Path("/proc/out"),
}


# `doctor on parquet` writes next to the tables if it cannot write into its output.
WITHOUT_OUTPUT = ("report", "report of segmentation", "cache of grounding", "doctor on parquet")
WITH_OUTPUT = [verb for verb in VERBS if verb not in WITHOUT_OUTPUT]


@pytest.mark.slow
@pytest.mark.parametrize("verb", WITH_OUTPUT)
def test_a_place_that_cannot_be_written_is_one_sentence(inputs, tmp_path, verb):
    shutil.copytree(inputs.folder / "parquet", tmp_path / "parquet")
    for name, place in PLACES.items():
        command = [
            text.replace("/proc/parquet", f"{tmp_path}/parquet").replace("/file/parquet", "/parquet")
            if isinstance(text, str)
            else text
            for text in inputs.arguments(verb, place(tmp_path))
        ]
        code, err = forked_call(command)
        assert code == 2, (name, err)
        assert sentence_of(err), name
        assert not hidden(tmp_path), name


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_limit_of_file_sizes_is_one_sentence_and_leaves_no_temporary_file(inputs, output, verb):
    for size in (0, 300, 20_000):
        code, err = forked_call(inputs.arguments(verb, output), limit(resource.RLIMIT_FSIZE, size))
        assert (code == 2) or size, err
        if code:
            assert re.search("larger than|File too large|ulimit -f", sentence_of(err))
            if verb in ("score", "predict", "audit", "compare", "doctor"):
                assert str(output.parent) in sentence_of(err)
        assert not hidden(output.parent)
    code, err = forked_call(inputs.arguments(verb, output))
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_sentence_and_a_rerun_ends_as_without_it(inputs, small_disk, verb):
    output, whole = small_disk / "place" / "out", small_disk / "whole" / "out"
    inputs.place(whole)
    inputs.place(output)
    assert forked_call(inputs.arguments(verb, whole))[0] == 0
    status = os.statvfs(small_disk)
    (small_disk / "fill").write_bytes(bytes(status.f_bavail * status.f_frsize))
    code, err = forked_call(inputs.arguments(verb, output))
    assert (code, bool(re.search("disk is full|No space left", sentence_of(err)))) == (2, True), err
    assert not hidden(output.parent)
    (small_disk / "fill").unlink()
    code, err = forked_call(inputs.arguments(verb, output))
    assert code == 0, err
    assert set(contents(output.parent)) == set(contents(whole.parent))
    assert not hidden(output.parent)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    with mounted(tmp_path / "disk", "32m") as folder:
        yield folder


def test_a_checkpoint_that_does_not_fit_keeps_the_former_one(inputs, output):
    """The limit is above the size of the first checkpoint's files, so a grown log or table cannot hit it first."""
    command = inputs.arguments("train", output)
    code, err = forked_call(command, limit(resource.RLIMIT_FSIZE, 50_000))
    assert (code, "larger than" in err) == (2, True), err
    assert not hidden(output)
    code, err = forked_call(command)
    assert code == 0, err
    weights = [folder / "model" / "model.safetensors" for folder in (inputs.folder / "run", output)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_too_many_open_files_is_one_sentence(inputs, output, verb):
    code, err = forked_call(inputs.arguments(verb, output), limit_of_open_files(0))
    assert (code, "too many files are open" in sentence_of(err)) == (2, True), err
    assert not hidden(output.parent)


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("train on parquet", ["data.image_size=1024"]),
        ("new-vlm", []),
    ],
)
def test_a_limit_of_memory_is_one_sentence(inputs, output, verb, settings):
    code, err = forked_call([*inputs.arguments(verb, output), *settings], limit_of_memory(1_000_000))
    assert (code, "not enough memory" in sentence_of(err)) == (2, True), err
    assert not hidden(output.parent)


def no_further_process() -> None:
    """Become a user who may start no process, but still owns the files: root and its capabilities have no limit."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setresuid(65534, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(header, none) == 0
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


@pytest.mark.parametrize(("verb", "settings"), [("train", ["data.workers=1"]), ("audit", [])])
def test_no_further_process_or_thread_is_one_sentence(inputs, output, verb, settings):
    if os.getuid():
        pytest.skip("NOT TESTED: a limit of processes. Changing the user needs the rights of root")
    code, err = forked_call([*inputs.arguments(verb, output), *settings], no_further_process)
    assert (code, "no further process or thread can be started" in sentence_of(err)) == (2, True), err
    assert not hidden(output.parent)


def full_shared_memory() -> None:
    """Mount a file system of one page at /dev/shm, which this process alone sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/dev/shm"], check=True)


def test_a_full_shared_memory_is_one_sentence(inputs, output):
    if os.getuid():
        pytest.skip("NOT TESTED: a full /dev/shm. Mounting a file system needs the rights of root")
    code, err = forked_call([*inputs.arguments("train", output), "data.workers=1"], full_shared_memory)
    assert (code, "(/dev/shm) is full" in sentence_of(err)) == (2, True), err
    assert not hidden(output.parent)


def kill_the_worker() -> None:
    """Let the first process that this one starts kill itself when it opens an image."""
    pid = os.getpid()

    def hook(event: str, values: tuple) -> None:
        if event == "open" and str(values[0]).endswith(".png") and os.getpid() != pid:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_killed_worker_is_one_sentence_and_the_run_can_be_resumed(inputs, output):
    command = [*inputs.arguments("train", output), "data.workers=1"]
    code, err = forked_call(command, kill_the_worker)
    assert (code, "a data.workers process was killed" in sentence_of(err)) == (2, True), err
    assert not hidden(output.parent)
    code, err = forked_call(command)
    assert code == 0, err


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(inputs, output, mask):
    code, err = forked_call(inputs.arguments("train", output), lambda: os.umask(mask) and None)
    assert code == 0, err
    modes = {path: path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in modes)
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~mask} == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LCKD, CLINKD], ids=["lckd", "clinkd"])
def test_files_of_every_task_have_the_permissions_of_the_umask(tmp_path, recipe):
    path = write_recipe(tmp_path, recipe)
    out = tmp_path / "out"
    code, err = forked_call(["train", str(path), f"output={out}"], lambda: os.umask(0o002) and None)
    assert code == 0, err
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in modes)
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o664} == {}

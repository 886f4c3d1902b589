"""Sentences for errors of the operating system and for exhausted resources."""

from __future__ import annotations

import errno
import os
import re
import sysconfig
import traceback
from pathlib import Path

from preceptor.errors import printable

_SENTENCES = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "cannot be read or written: permission denied. Change its permissions or choose another path",
    errno.EPERM: "cannot be changed: operation not permitted. Change its permissions or choose another path",
    errno.EROFS: "is on a read-only file system. Choose another path",
    errno.EISDIR: "is a folder, but a file is needed. Give the path of a file",
    errno.ENOTDIR: "cannot be used: a file is in the place of one of its folders. Choose another path",
    errno.EEXIST: "is a file, but a folder is needed. Remove the file or choose another path",
    errno.ENAMETOOLONG: "is too long for a path. Choose a shorter one",
    errno.ELOOP: "is a symbolic link to itself. Choose another path",
    errno.EIO: "cannot be read or written: the disk reports an error",
    errno.ESTALE: "was lost by its network drive (stale file handle). Run the same command again",
}

_FULL = "the disk is full{where}. Free some space and run the same command again, or choose another output folder"
_NOT_WHOLE = (
    "a file cannot be written to its end: the disk is full, or `ulimit -f` is lower than the size of the file. Free "
    "some space and run the same command again, or choose another output folder"
)
_MEMORY = (
    "there is not enough memory. Lower batch_size (and raise gradient_accumulation_steps), the size of images or "
    "patches, or data.workers, or use a machine with more memory"
)
_FILES = "too many files are open. Raise the limit with `ulimit -n`, or lower data.workers"
_SHARED = "the shared memory (/dev/shm) is full. Set data.workers=0, or give the container more of it"
_PROCESSES = (
    "no further process or thread can be started. Raise the limit with `ulimit -u`, lower data.workers, or use a "
    "machine with more memory"
)
_RESOURCES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "a file is larger than its file system or `ulimit -f` allows{where}. Choose another output folder",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _PROCESSES,
}
"""Sentences that need no path: each is about a resource of the machine, whatever file was touched last."""

_MESSAGES = [
    (r"shared memory.*No space left|insufficient shared memory|killed by signal: Bus error", _SHARED),
    (r"Too many open files|received 0 items of ancdata", _FILES),
    (r"No space left on device|database or disk is full", _FULL),
    (r"\d+ requested and \d+ written|PytorchStreamWriter failed writing|inline_container.*unexpected pos", _NOT_WHOLE),
    (r"File too large|disk I/O error", _RESOURCES[errno.EFBIG]),
    (r"can't allocate memory|[Oo]ut of memory|Cannot allocate memory|bad_alloc|Unable to allocate", _MEMORY),
    (r"could not create a (primitive|memory object)|failed to map segment", _MEMORY),  # oneDNN; the loader of libraries
    (r"DataLoader worker .*(exited unexpectedly|killed by signal)", f"a data.workers process was killed: {_MEMORY}"),
    (r"can't start new thread|Resource temporarily unavailable", _PROCESSES),
    (r"unable to open database file", "a database cannot be opened. Check that its folder exists and is writable"),
    (r"attempt to write a readonly database", "a database is read-only. Change its permissions or use another folder"),
    (r"database is locked", "a database is in use by another process. Wait for it, or stop it"),
    (
        r"gloo/transport/.*(Connection (closed|reset) by peer|Broken pipe)",
        "another process of this run has stopped; its own message says why",
    ),
    (r"embedded null (byte|character)", "a path contains a NUL character, which no file system allows. Correct it"),
]
"""Messages of libraries that report errors of the operating system in exceptions of their own."""


def describe_os_error(error: BaseException) -> str | None:
    """Return a sentence for an exhausted resource, or for an error of the operating system on a path of the user.

    None for any other error. Errors on files of this installation are defects, so they return None too.
    """
    number, path = _number_and_path(error)
    if number == errno.ENOSPC and _is_raised_in(error, "multiprocessing"):  # by a semaphore, which is no file
        return _SHARED
    if number in _RESOURCES:
        return _RESOURCES[number].format(where=f" for {path}" if path else "")
    if isinstance(error, MemoryError):
        return _MEMORY
    if isinstance(error, OSError | RuntimeError | ValueError | ImportError) or _is_of_library(error):
        for pattern, sentence in _MESSAGES:
            if re.search(pattern, str(error)):
                return sentence.format(where="")
    if number is None or not path or _is_installed(Path(path)):
        return None
    return f"{printable(path)} {_SENTENCES.get(number) or f'cannot be used: {os.strerror(number)}'}"


def _number_and_path(error: BaseException) -> tuple[int | None, str | None]:
    """Return the error number and the path of an error, as far as they are known.

    A worker of a data loader and libraries in Rust give both in the text of the message only.
    """
    if isinstance(error, OSError) and error.errno is not None:
        # Of a renaming, the second path is the one that the user chose.
        path = error.filename2 or error.filename
        return error.errno, os.fsdecode(path) if isinstance(path, str | bytes | Path) else None
    if not (isinstance(error, OSError) or _is_of_library(error)):
        return None, None
    text = str(error)
    found = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", text)
    path = re.search(r"\[Errno \d+\] [^:\n]*: '(.*)'|at path \"(.*)\"|No such file or directory: (\S+)$", text)
    missing = errno.ENOENT if isinstance(error, FileNotFoundError) else None
    return int(next(filter(None, found.groups()))) if found else missing, path and next(filter(None, path.groups()))


def _is_raised_in(error: BaseException, package: str) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name == package


def _is_of_library(error: BaseException) -> bool:
    """Return whether an exception is one that safetensors, tokenizers or sqlite3 raise for errors of the system."""
    return type(error) is Exception or type(error).__module__.partition(".")[0] in ("safetensors", "sqlite3")


def _is_installed(path: Path) -> bool:
    folders = (Path(__file__).parent, Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"]))
    return any(path.is_relative_to(folder) for folder in folders)

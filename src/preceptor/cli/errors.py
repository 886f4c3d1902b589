"""Exit codes, and the sentences for errors of the operating system on a path of the user."""

from __future__ import annotations

import errno
import os
import sys
import sysconfig
from pathlib import Path

from preceptor.cli.terminal import wrap
from preceptor.errors import UserError

DONE, CHECK_FAILED, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
"""The exit codes of the command line."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
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
    errno.EMFILE: "cannot be opened: too many open files. Raise the limit with `ulimit -n`",
    errno.EIO: "cannot be read or written: the disk reports an error",
}


def exit_with(error: BaseException) -> int:
    """Print one sentence for a mistake or an interruption and return the exit code; re-raise everything else."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    loop = sys.modules.get("preceptor.training.loop")  # Only a training raises Interrupted, and importing it is slow.
    if loop is not None and isinstance(error, loop.Interrupted):
        print(error, file=sys.stderr)
        return INTERRUPTED
    sentence = str(error) if isinstance(error, UserError) else describe_os_error(error)
    if sentence is None:
        raise error
    print(wrap(f"error: {sentence}", sys.stderr), file=sys.stderr)
    return USER_ERROR


def flush_stdout() -> None:
    """Write what is left of the output. If that fails, discard the rest, so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def describe_os_error(error: BaseException) -> str | None:
    """Return a sentence for an error of the operating system on a path of the user; None for any other error.

    A full disk often names no path. Errors on files of this installation are defects, so they return None too.
    """
    if not isinstance(error, OSError):
        # safetensors reports errors of the operating system in exceptions of its own.
        full = type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error)
        return _full_disk(None) if full else None
    if error.errno in _FULL:
        return _full_disk(error.filename)
    if not isinstance(error.filename, str | Path) or error.errno is None or _is_installed(Path(error.filename)):
        return None
    return f"{error.filename} {_SENTENCES.get(error.errno) or f'cannot be used: {error.strerror}'}"


def _full_disk(path: object) -> str:
    where = f" for {path}" if path else ""
    return f"the disk is full{where}. Free some space and run the same command again, or choose another output folder"


def _is_installed(path: Path) -> bool:
    folders = (Path(__file__).parents[1], Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"]))
    return any(path.is_relative_to(folder) for folder in folders)

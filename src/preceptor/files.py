"""Write files and folders atomically, and by one process at a time.

Temporary names are derived from the final ones, so that a command that runs again after a kill overwrites what the
killed one left behind. A lock ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preceptor.errors import UserError

# Legal in JSON, but str.splitlines and many other readers treat the first three as the end of a line. Surrogates, which
# stand for bytes of a file name that are not UTF-8, cannot be written in UTF-8.
_ESCAPES = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029, *range(0xD800, 0xE000))}

_locks: set[int] = set()
"""Open descriptors of the locks of this process."""


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


# A worker must not inherit a lock: it may outlive a killed process by seconds, and would keep the lock as long.
os.register_at_fork(after_in_child=_close_locks)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path, named: Path | None = None) -> None:
    """Create a folder and those above it.

    Raises UserError if the system refuses that. It names `named`, by default the folder: the path that the user gave.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise UserError(
            f"the folder {named or folder} cannot be created ({os.strerror(error.errno or 0)}); choose another path"
        ) from error


def flush(path: Path) -> None:
    """Write a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON Lines. Characters that some readers treat as line ends are escaped."""
    return "".join(to_json(row) + "\n" for row in rows)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON that can be written in UTF-8 and read line by line."""
    return json.dumps(value, ensure_ascii=False, indent=indent).translate(_ESCAPES)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically. Surrogates (file names that are not UTF-8) are written as escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. If that fails, an earlier file remains and no temporary file is left behind."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file. It replaces `path` at the end, or is deleted if an exception is raised."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let an error of the operating system name `path` if it names no file (writing does not), or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename2 is None:
            named = error.filename
            if named is None or (temporary and isinstance(named, str | Path) and Path(named).is_relative_to(temporary)):
                error.filename = str(path)
        raise


@contextlib.contextmanager
def new_folder(folder: Path, temporary: Path) -> Iterator[Path]:
    """Yield the empty folder `temporary`. It replaces `folder` at the end, or is deleted if an exception is raised."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming(folder, temporary):
            yield temporary
            replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover(folder: Path) -> None:
    """Complete or undo an interrupted replacement of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, folder)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Atomically replace `folder` with `temporary`. `recover` completes an interrupted replacement."""
    apply_umask(temporary)
    for path in sorted(temporary.rglob("*")):
        flush(path)
    flush(temporary)
    recover(folder)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        recover(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def apply_umask(folder: Path) -> None:
    """Give the files in a folder the permissions of newly created ones: safetensors lets only their owner read them."""
    mask = os.umask(0o077)  # there is no other way to read it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


class LockedError(UserError):
    """Another process holds the lock. `owner` describes it, as ``process 12 on HOST`` if that is known."""

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(f"{path} is locked by {owner}: wait for it, or stop it")
        self.owner = owner


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created and removed again, or on a folder that exists.

    The kernel frees the lock when the process ends, so a killed process blocks nobody. A file that it left behind is
    taken over. On a file system without locks (some network drives), nothing is locked.

    Args:
        path: the file or folder.
        wait: wait for another process instead of raising `LockedError`.

    Raises:
        LockedError: another process, or another call in this one, holds the lock.
    """
    is_folder = path.is_dir()
    while True:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = "" if is_folder else os.pread(descriptor, 300, 0).decode(errors="replace")
            _release(descriptor)
            raise LockedError(path, owner or "another process") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                break
            _release(descriptor)
            raise
        # Between opening and locking, the earlier holder may have removed the file or renamed the folder.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        _release(descriptor)
        if is_folder:
            raise LockedError(path, "another process")
    try:
        if not is_folder:
            with naming(path.parent):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if not is_folder and descriptor in _locks:
            path.unlink(missing_ok=True)
        _release(descriptor)


def _release(descriptor: int) -> None:
    if descriptor in _locks:  # not in a process that was forked meanwhile
        _locks.remove(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder for temporary files, which is deleted at the end, and delete those of killed processes."""
    prefix = f"preceptor-{os.getuid()}"
    root = Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        with lock(root / f".{prefix}.lock", wait=True):
            for old in root.glob(f"{prefix}-*"):
                with contextlib.suppress(LockedError, OSError), lock(old):
                    shutil.rmtree(old, ignore_errors=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{prefix}-")))
            stack.enter_context(lock(folder))
        yield folder

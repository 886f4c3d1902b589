"""Uploaded files: in a folder in memory that only this user can read, under names that say nothing about a patient."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import UploadFile

from preceptor.data.dicom_series import OTHER_ENDINGS
from preceptor.errors import UserError
from preceptor.files import LockedError, lock

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "preceptor-serve-"
_CHUNK = 2**20
_HEAD = 352
"""Number of bytes that tell the format of a file."""

# First bytes of a file, where they are, and the ending that our readers expect. DICOM may lack its mark.
_KINDS = ((0, b"\x1f\x8b", ".nii.gz"), (344, b"n+1\0", ".nii"), (344, b"ni1\0", ".nii"), (4, b"n+2\0", ".nii"))


def _remove(folder: Path, held: ExitStack) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    held.close()


class Scratch:
    """The folder of all uploads. It lies in shared memory where the system has any.

    `close`, or the end of the process, removes it. What a killed server left behind is removed by the next one.
    """

    def __init__(self) -> None:
        place = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        for folder in place.glob(f"{_PREFIX}*"):
            # Of a server that runs, or of another user.
            with suppress(OSError, LockedError), lock(folder):
                shutil.rmtree(folder, ignore_errors=True)
        held = ExitStack()
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            with suppress(FileNotFoundError, LockedError):  # another server has just taken it for abandoned
                held.enter_context(lock(self.folder))
                break
        self.close = weakref.finalize(self, _remove, self.folder, held)

    @contextmanager
    def request(self) -> Iterator[Path]:
        """Yield an empty folder that is removed at the end."""
        folder = self.new()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def as_temporary_folder(self) -> Iterator[None]:
        """Let all temporary files of this process lie in the folder.

        Among them are the uploads above 1 MiB that Starlette receives: it writes them to the default temporary folder.
        """
        before, tempfile.tempdir = tempfile.tempdir, str(self.folder)
        try:
            yield
        finally:
            tempfile.tempdir = before

    def new(self) -> Path:
        """Return an empty folder; the caller removes it."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        return folder


async def save_image(upload: UploadFile, folder: Path, number: int = 1) -> Path:
    """Write an uploaded image; our reader finds out its format from the content."""
    path = folder / f"image-{number}"
    await _write(upload, path)
    return path


async def save_volume(uploads: Sequence[UploadFile], folder: Path, modality: str) -> Path:
    """Write the NIfTI file of a modality, or the files of a DICOM series into a folder; return its path.

    Of the names that the client gives, nothing is kept but an ending by which the reader ignores a file of a series.

    Raises:
        UserError: there are several files and one of them is NIfTI, or a single one is neither NIfTI nor DICOM.
    """
    several, series = len(uploads) > 1, folder / modality
    for number, upload in enumerate(uploads):
        head = await upload.read(_HEAD)
        await upload.seek(0)
        ending = _nifti_ending(head)
        if ending and several:
            raise UserError(
                f"{modality} has {len(uploads)} files, and one of them is NIfTI; give one NIfTI file, or the files of "
                "one DICOM series"
            )
        if ending:
            await _write(upload, volume := folder / f"{modality}{ending}")
            return volume
        if not several and head[128:132] != b"DICM":
            raise UserError(f"the file of {modality} is neither NIfTI nor DICOM")
        series.mkdir(exist_ok=True)
        name = (upload.filename or "").lower()
        if several and (other := next((ending for ending in OTHER_ENDINGS if name.endswith(ending)), None)):
            (series / f"{number:05}{other}").touch()  # the reader ignores it, and reports that
            await upload.close()
        else:
            await _write(upload, series / f"{number:05}.dcm")
    return series


def _nifti_ending(head: bytes) -> str | None:
    return next((ending for at, mark, ending in _KINDS if head[at : at + len(mark)] == mark), None)


async def _write(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as opened:
        while chunk := await upload.read(_CHUNK):
            opened.write(chunk)
    await upload.close()  # frees the received copy before the answer is computed


class TooManyCases(Exception):
    """All places for cases are in use."""


@dataclass
class _Case:
    files: dict[str, Path]
    used: float
    users: int = 0
    removed: bool = False


class Cases:
    """Uploaded cases that are kept for further questions about them.

    A case in use is never removed: its files are read. What removes it meanwhile takes effect when it is free.

    Args:
        scratch: Where their files are.
        most: Number of cases; the one that was unused for the longest time makes room for another.
        seconds: Time without use after which a case is removed.
    """

    def __init__(self, scratch: Scratch, most: int, seconds: float) -> None:
        self.scratch, self.most, self.seconds = scratch, most, seconds
        self._cases: dict[str, _Case] = {}
        self._lock = threading.RLock()  # the thread of the models uses cases, too
        self._closed = False

    @contextmanager
    def new(self) -> Iterator[str]:
        """Yield the id of a new case in use, whose folder is empty; `add` gives it files. An error in it removes it.

        Raises TooManyCases if `most` cases are in use.
        """
        with self._lock:
            self.expire()
            if sum(case.users > 0 for case in self._cases.values()) >= self.most:
                raise TooManyCases
            id = self.scratch.new().name
            self._cases[id] = _Case({}, time.monotonic(), users=1)
        try:
            yield id
        except BaseException:
            self.remove(id)
            raise
        finally:
            self._release(id)

    def add(self, id: str, files: Mapping[str, Path]) -> None:
        """Give a new case its files by modality. Cases that are not in use make room for it."""
        with self._lock:
            self._cases[id].files = dict(files)
            self._make_room()

    @contextmanager
    def use(self, id: str) -> Iterator[dict[str, Path]]:
        """Yield the files of a case by modality, and keep it meanwhile.

        Raises UserError if the case does not exist or was removed.
        """
        with self._lock:
            self.expire()
            case = self._cases.get(id)
            if case is None or case.removed:
                raise UserError("the case is not known any more; upload it again")
            case.users += 1
        try:
            yield case.files
        finally:
            self._release(id)

    def expire(self) -> None:
        """Remove the cases that were not used for `seconds`."""
        with self._lock:
            for id, case in list(self._cases.items()):
                if not case.users and time.monotonic() - case.used > self.seconds:
                    self.remove(id)

    def remove(self, id: str) -> None:
        """Remove a case and its files, if it is still there; its files when it is not in use any more."""
        with self._lock:
            case = self._cases.get(id)
            if case is None:
                return
            case.removed = True
            if not case.users:
                del self._cases[id]
                # A function that was computing when the server stopped may have written its folder again.
                folder = self.scratch.folder
                shutil.rmtree(folder if self._closed else folder / id, ignore_errors=True)

    def close(self) -> None:
        """Remove all cases; those in use when they are free."""
        with self._lock:
            self._closed = True
            for id in list(self._cases):
                self.remove(id)

    def _release(self, id: str) -> None:
        with self._lock:
            case = self._cases[id]
            case.users, case.used = case.users - 1, time.monotonic()
            if case.removed:
                self.remove(id)
            self._make_room()

    def _make_room(self) -> None:
        free = sorted((case.used, id) for id, case in self._cases.items() if not case.users)
        for _, id in free[: max(0, sum(bool(case.files) for case in self._cases.values()) - self.most)]:
            self.remove(id)

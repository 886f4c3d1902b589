"""Uploaded files: in a folder in memory that only this user can read, under names that say nothing about a patient."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from starlette.datastructures import UploadFile

from preceptor.errors import UserError
from preceptor.files import LockedError, lock

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "preceptor-serve-"
_CHUNK = 2**20

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
    """Write the NIfTI file of a modality, or the files of a DICOM series into a folder; return its path."""
    first = folder / modality
    if len(uploads) > 1:
        first.mkdir()
        for number, upload in enumerate(uploads):
            await _write(upload, first / f"{number:05}.dcm")
        return first
    await _write(uploads[0], first)
    with first.open("rb") as opened:
        head = opened.read(352)
    ending = next((ending for at, mark, ending in _KINDS if head[at : at + len(mark)] == mark), None)
    if ending is None and head[128:132] != b"DICM":
        first.unlink()
        raise UserError(f"the file of {modality} is neither NIfTI nor DICOM")
    if ending is None:
        single = first.rename(folder / "one.dcm")
        first.mkdir()
        single.rename(first / "00000.dcm")
        return first
    return first.rename(folder / f"{modality}{ending}")


async def _write(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as opened:
        while chunk := await upload.read(_CHUNK):
            opened.write(chunk)


class Cases:
    """Uploaded cases that are kept for further questions about them.

    Args:
        scratch: Where their files are.
        most: Number of cases; the one that was unused for the longest time makes room for another.
        seconds: Time without use after which a case is removed.
    """

    def __init__(self, scratch: Scratch, most: int, seconds: float) -> None:
        self.scratch, self.most, self.seconds = scratch, most, seconds
        self._used: dict[str, float] = {}
        self._files: dict[str, dict[str, Path]] = {}

    def add(self, folder: Path, files: Mapping[str, Path]) -> str:
        """Keep the files by modality of a folder; return the id of the case."""
        self.expire()
        while len(self._used) >= self.most:
            self.remove(min(self._used, key=lambda id: self._used[id]))
        id = folder.name
        self._files[id], self._used[id] = dict(files), time.monotonic()
        return id

    def files(self, id: str) -> dict[str, Path]:
        """Return the files by modality. Raises UserError if the case does not exist or was removed."""
        self.expire()
        if id not in self._files:
            raise UserError("the case is not known any more; upload it again")
        self._used[id] = time.monotonic()
        return self._files[id]

    def expire(self) -> None:
        """Remove the cases that were not used for `seconds`."""
        for id in [id for id, used in self._used.items() if time.monotonic() - used > self.seconds]:
            self.remove(id)

    def remove(self, id: str) -> None:
        """Remove a case and its files, if it is still there."""
        self._used.pop(id, None)
        self._files.pop(id, None)
        shutil.rmtree(self.scratch.folder / id, ignore_errors=True)

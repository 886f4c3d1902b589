"""A trained model as one file: the files of its model folder in a zip that is not compressed, with their checksums."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from preceptor.errors import UserError
from preceptor.files import new_file, sha256

CHECKSUMS = "SHA256SUMS"
"""Checksums of all other files, in the format of `sha256sum`."""

_CHUNK = 2**20
_MOST_FILES = 1000
_MOST_CHECKSUM_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_TIME = (1980, 1, 1, 0, 0, 0)


def pack(model: Path, file: Path, further: Mapping[str, bytes] | None = None) -> int:
    """Write the files of a model folder, and further files by their names, into a zip; return the number of files.

    Equal files give equal bytes.

    Raises:
        UserError: the name of a file is not plain (letters, digits, ``.``, ``_``, ``-``), or occurs twice.
    """
    paths = {path.name: path for path in sorted(model.iterdir()) if path.is_file() and not path.name.startswith(".")}
    texts = dict(further or {})
    for name in [*paths, *texts]:
        if not _NAME.fullmatch(name) or name == CHECKSUMS or (name in paths and name in texts):
            raise UserError(f"{model}: a file with the name {name!r} cannot be packed; rename or remove it")
    sums = {name: sha256(path) for name, path in paths.items()}
    sums |= {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    texts[CHECKSUMS] = checksum_lines(sums).encode()
    with new_file(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as packed:
        for name in sorted([*paths, *texts]):
            # The system and the time of the machine are left out.
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            if name in paths:
                entry.file_size = paths[name].stat().st_size
                with packed.open(entry, "w") as target, paths[name].open("rb") as source:
                    shutil.copyfileobj(source, target, _CHUNK)
            else:
                packed.writestr(entry, texts[name])
    return len(paths) + len(texts)


def checksum_lines(sums: Mapping[str, str]) -> str:
    """Return SHA-256 sums by file name in the format of `sha256sum`, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def unpack(file: Path) -> Path:
    """Return a folder with the files of a packed model, which is removed at the end of the process.

    Nothing is decompressed, and no file is written outside of that folder.

    Raises:
        UserError: the file is no packed model, or a file in it is damaged.
    """
    status = file.stat()
    return _unpack(file.absolute(), status.st_mtime_ns, status.st_size)


@lru_cache
def _unpack(file: Path, modified: int, size: int) -> Path:
    """Return the folder of a file, which is unpacked once as long as it does not change."""
    try:
        with zipfile.ZipFile(file) as packed:
            return _extract(packed, file)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, UnicodeDecodeError):
        # RuntimeError: encrypted. NotImplementedError: a feature of zip that we never write.
        raise UserError(f"{file} is not a packed model, or is damaged; copy it again, or give a model folder") from None


def _extract(packed: zipfile.ZipFile, file: Path) -> Path:
    entries = packed.infolist()
    names = [entry.filename for entry in entries]
    if len(entries) > _MOST_FILES or len(set(names)) < len(names) or CHECKSUMS not in names:
        raise UserError(f"{file} is not a packed model: it must have up to {_MOST_FILES} files, {CHECKSUMS} among them")
    for entry in entries:
        if not _NAME.fullmatch(entry.filename) or entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{file} is not a packed model: {entry.filename!r} is compressed or in a folder; unzip the file and "
                "give the folder"
            )
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise UserError(f"{file} is damaged: its files are larger than itself; copy it again")
    if packed.getinfo(CHECKSUMS).file_size > _MOST_CHECKSUM_BYTES:
        raise UserError(f"{file} is not a packed model: {CHECKSUMS} is larger than {_MOST_CHECKSUM_BYTES} bytes")
    lines = packed.read(CHECKSUMS).decode().splitlines()
    sums = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
    if unknown := next((name for name in names if name != CHECKSUMS and name not in sums), None):
        raise UserError(f"{file} is damaged: {CHECKSUMS} has no line for {unknown}; copy the file again")
    if missing := next((name for name in sums if name not in names), None):
        raise UserError(f"{file} is damaged: {missing} is missing; copy the file again")
    scratch = tempfile.mkdtemp(prefix="preceptor-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folder = Path(scratch, "model")  # what is beside a model folder, such as a recipe, must not be that of others
    folder.mkdir()
    for name, expected in sums.items():
        digest = hashlib.sha256()
        with packed.open(name) as source, (folder / name).open("wb") as target:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != expected:
            raise UserError(f"{file} is damaged: {name} has another checksum than in {CHECKSUMS}; copy the file again")
    return folder

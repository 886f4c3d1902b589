"""A folder of memory-mapped arrays whose rows are found by content key: the file format of every teacher cache.

Layout of the folder::

    manifest.json   format, kind, cache key, settings, number of rows, types and shapes, size and SHA-256 of every file
    keys.npy        (N, 32) uint8: content keys (SHA-256), sorted
    rows.npy        (N,) int64: row of each key
    lengths.npy     (N,) int64: number of tokens of each row
    NAME.npy        the cache's own arrays, memory-mapped when they are read

`ArrayStoreWriter` writes blocks to a hidden folder next to the final one, joins them and renames the folder, so that
readers see the old store or the new one and never a mixture. A writer that was killed resumes after its last complete
block if it is started again with the same cache key and rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from preceptor.errors import UserError
from preceptor.files import LockedError, flush, lock, make_folder, recover, replace_folder, sha256, write_text

FORMAT = 3
MANIFEST = "manifest.json"
PARTIAL = "partial.json"
INDEX = ("keys.npy", "rows.npy", "lengths.npy")
REWRITE = "write the cache again with `preceptor cache`"


@dataclass(frozen=True)
class VerifyReport:
    """Result of recomputing part of a cache.

    `checked` rows were recomputed, `worst` is the largest difference, `mismatched` are the ids above the tolerance.
    `absent` rows were drawn, too, but do not occur in the data, so they could not be recomputed.
    """

    checked: int
    worst: float
    mismatched: list[str]
    absent: int = 0


class ArrayStore:
    """Read-only arrays addressed by content key; `open` one."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.rows: int = manifest["rows"]
        self.cache_key: dict[str, Any] = dict(manifest["cache_key"])
        self.settings: dict[str, Any] = dict(manifest["settings"])
        self.arrays: dict[str, dict[str, Any]] = {
            name: {"dtype": array["dtype"], "shape": list(array["shape"])} for name, array in manifest["arrays"].items()
        }
        self._files: dict[str, dict[str, Any]] = {name: dict(file) for name, file in manifest["files"].items()}
        if not {name.removesuffix(".npy") for name in {*self._files} - {*INDEX}} <= {*self.arrays}:
            raise ValueError("a file has no entry in arrays")
        # The index is hashed at every start: it is small, and a wrong row would silently give a wrong signal.
        self._check_files(INDEX)
        self._keys = np.load(folder / "keys.npy").reshape(-1).view("S32")
        self._rows = np.load(folder / "rows.npy")
        self.lengths = np.load(folder / "lengths.npy")
        if isinstance(self.rows, bool) or self.rows != len(self._keys):
            raise ValueError(f"rows is {self.rows!r}, but there are {len(self._keys)} keys")

    @classmethod
    def open(cls, folder: Path, kind: str, cache_key: Mapping[str, Any]) -> Self:
        """Open the store in `folder`, which must hold a `kind` of cache that was written for `cache_key`.

        Raises UserError if there is no store, a file is missing or damaged, or the cache key differs; the message
        lists every difference.
        """
        folder = Path(folder)
        _recover(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            version = manifest["format"]
            if version != FORMAT:
                raise UserError(f"{folder} has format {version!r}, this version reads format {FORMAT}: {REWRITE}.")
            if manifest["kind"] != kind:
                raise UserError(f"{folder} is a cache of kind {manifest['kind']!r}, not {kind!r}: name another folder.")
            changes = differences(manifest["cache_key"], cache_key)
            if changes:
                lines = "\n".join(f"  {line}" for line in changes)
                raise UserError(f"The teacher cache {folder} was written for other settings:\n{lines}\nFix: {REWRITE}.")
            return cls(folder, manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"There is no teacher cache in {folder}: write it first with `preceptor cache`.") from None
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"{folder / MANIFEST} is damaged ({reason}): {REWRITE}.") from None

    def __len__(self) -> int:
        return self.rows

    def load(self, name: str) -> np.ndarray:
        """Return the memory-mapped array `name`. Raises UserError if the file does not match the manifest."""
        file, expected = f"{name}.npy", f"{self.arrays[name]['dtype']} {tuple(self.arrays[name]['shape'])}"
        try:
            if file not in self._files:
                raise ValueError("it is not among the files of the manifest")
            # A plain array, because slicing the memmap class is slow.
            values = np.asarray(np.load(self.folder / file, mmap_mode="r", allow_pickle=False))
            if f"{values.dtype} {values.shape}" != expected:
                raise ValueError(f"{values.dtype} {values.shape} instead of {_short(expected)}")
        except ValueError as error:
            raise UserError(f"The teacher cache {self.folder} is damaged: {file}: {error}; {REWRITE}.") from None
        return values

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each content key, -1 if it is not stored."""
        wanted = key_bytes(keys)
        places = np.minimum(np.searchsorted(self._keys, wanted), self.rows - 1)
        return np.where(self._keys[places] == wanted, self._rows[places], -1)

    def sample(self, fraction: float, seed: int) -> set[str]:
        """Draw the keys of a random fraction of the rows, at least one.

        Raises UserError if `fraction` is not in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise UserError(f"The fraction of the cache to verify must be in (0, 1], not {fraction}.")
        count = int(np.ceil(fraction * self.rows))
        chosen = np.random.default_rng(seed).choice(self.rows, count, replace=False)
        # The view drops zero bytes at the end of a key.
        return {self._keys[i].ljust(32, b"\0").hex() for i in chosen}

    def verify_files(self) -> None:
        """Compare the SHA-256 of every file with the manifest. Raises UserError that names the damaged files."""
        self._check_files(self._files)

    def _check_files(self, hashed: Collection[str]) -> None:
        """Compare the size of every file, and the SHA-256 of those in `hashed`, with the manifest."""
        damaged = []
        for name in {*INDEX, *self._files}:
            file, path = self._files.get(name), self.folder / name
            if file is None or Path(name).name != name or not path.is_file():
                damaged.append(f"{name} is missing")
            elif path.stat().st_size != file["bytes"]:
                damaged.append(f"{name} has {path.stat().st_size} bytes instead of {file['bytes']}")
            elif name in hashed and sha256(path) != file["sha256"]:
                damaged.append(f"{name} has another SHA-256 than when it was written")
        if damaged:
            raise UserError(
                f"The teacher cache {self.folder} is damaged: {'; '.join(sorted(damaged))}. Fix: {REWRITE}."
            )


def require_place(folder: Path) -> None:
    """Raise UserError if a store cannot be written to `folder`: it holds anything else, or cannot be created."""
    if (folder / MANIFEST).is_file():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a teacher cache: name another folder, or remove it yourself.")
    make_folder(folder.parent, folder)
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise UserError(f"the folder {folder} cannot be created (Permission denied); choose another path")


class ArrayStoreWriter:
    """Writes a store block by block; use it in a `with` block, and call `finish` at the end.

    An array has the same type and number of axes in every block. Blocks are concatenated along the first axis; along
    the others, shorter blocks are padded with zeros at the end.
    """

    def __init__(self, folder: Path, kind: str, cache_key: Mapping[str, Any], settings: Mapping[str, Any] = {}) -> None:
        """`settings` are JSON values that the cache needs to read its arrays.

        Raises UserError if `folder` holds anything but a cache.
        """
        self.folder = folder = Path(folder)
        header = {"format": FORMAT, "kind": kind, "cache_key": cache_key, "settings": settings}
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        require_place(folder)
        self._partial = _partial(folder)
        self._blocks: list[Path] = []

    def __enter__(self) -> Self:
        """Lock the hidden folder. Raises UserError if another process is writing to it."""
        make_folder(self._partial, self.folder)
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(lock(self._partial))
        except LockedError:
            raise UserError(
                f"Another process is writing the teacher cache {self.folder}: wait for it, or stop it."
            ) from None
        text = json.dumps(self._header, sort_keys=True)
        file = self._partial / PARTIAL
        resumed = file.is_file() and file.read_text("utf-8") == text
        for path in list(self._partial.iterdir()):
            if not resumed or not path.name.startswith("block-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            write_text(file, text)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the hidden folder. The blocks of an unfinished store remain, so that it can be resumed."""
        if self._partial.is_dir() and not any(self._partial.glob("block-*")):
            shutil.rmtree(self._partial)
        self._lock.close()

    def resume(self, keys: Sequence[str]) -> bool:
        """Return whether an interrupted writer has written the next block for `keys`; if so, it is taken over."""
        block = self._next_block()
        if not block.is_dir() or not np.array_equal(np.load(block / "keys.npy"), _key_array(keys)):
            return False
        self._blocks.append(block)
        return True

    def append(self, keys: Sequence[str], lengths: Iterable[int], arrays: Mapping[str, np.ndarray]) -> None:
        """Write the next block: content keys that no other block has, the rows' numbers of tokens, and arrays."""
        block = self._next_block()
        temporary = block.with_name(f".{block.name}")
        shutil.rmtree(block, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        np.save(temporary / "keys.npy", _key_array(keys))
        np.save(temporary / "lengths.npy", np.fromiter(lengths, np.int64, len(keys)))
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", np.ascontiguousarray(array))
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        os.rename(temporary, block)
        flush(block.parent)
        self._blocks.append(block)

    def finish(self) -> int:
        """Join the blocks and put the store in place of an older one; return the number of rows.

        Raises UserError if there are no rows.
        """
        if not self._blocks:
            raise UserError(f"There are no samples to write to the teacher cache {self.folder}.")
        names = sorted({path.stem for path in self._blocks[0].glob("*.npy")} - {"keys"})
        arrays = {name: self._join(f"{name}.npy") for name in names}
        keys = np.concatenate([np.load(block / "keys.npy") for block in self._blocks])
        order = np.argsort(keys.reshape(-1).view("S32"), kind="stable")
        np.save(self._partial / "keys.npy", keys[order])
        np.save(self._partial / "rows.npy", order.astype(np.int64))
        (self._partial / PARTIAL).unlink()
        for block in self._partial.glob("*block-*"):
            shutil.rmtree(block)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in self._partial.iterdir()}
        manifest = {**self._header, "rows": len(keys), "arrays": arrays, "files": dict(sorted(files.items()))}
        (self._partial / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        replace_folder(self._partial, self.folder)
        return len(keys)

    def _next_block(self) -> Path:
        return self._partial / f"block-{len(self._blocks):06d}"

    def _join(self, file: str) -> dict[str, Any]:
        """Write one array from its blocks, one block in memory at a time; return its entry of the manifest."""
        parts = [np.load(block / file, mmap_mode="r") for block in self._blocks]
        others = zip(*(part.shape[1:] for part in parts), strict=True)
        shape = (sum(len(part) for part in parts), *(max(lengths) for lengths in others))
        dtype = parts[0].dtype
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        # Not a memory map: on a full disk, writing to one kills the process with SIGBUS.
        with (self._partial / file).open("wb") as output:
            np.lib.format.write_array_header_1_0(output, header)
            for part in parts:
                padding = [(0, full - length) for full, length in zip(shape[1:], part.shape[1:], strict=True)]
                output.write(np.pad(part, [(0, 0), *padding]).tobytes())
        return {"dtype": dtype.name, "shape": shape}


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _recover(folder: Path) -> None:
    """Complete or undo a replacement that was killed, unless a writer is just about it or the place is read-only."""
    partial = _partial(folder)
    with contextlib.suppress(LockedError, OSError), lock(partial) if partial.is_dir() else contextlib.nullcontext():
        recover(folder)


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return a line for every value that differs between two settings; names of nested values are joined by dots."""
    cached, wanted = (_flatten(json.loads(json.dumps(values))) for values in (cached, wanted))
    return [
        f"{_short(name)}: cached {_short(cached.get(name, 'nothing'))}, wanted {_short(wanted.get(name, 'nothing'))}"
        for name in cached | wanted
        if name not in cached or name not in wanted or cached[name] != wanted[name]
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    """Return a value for a message, in one line; only the beginning of a hash."""
    text = str(value).replace("\n", "\\n")
    return text[:12] + "..." if len(text) == 64 and " " not in text else text


def key_bytes(keys: Sequence[str]) -> np.ndarray:
    """Return hexadecimal SHA-256 keys as an (n,) array of 32-byte strings, which compare as the bytes do."""
    assert all(len(key) == 64 for key in keys), "content keys are SHA-256 in hexadecimal"
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype="S32")


def _key_array(keys: Sequence[str]) -> np.ndarray:
    return key_bytes(keys).view(np.uint8).reshape(-1, 32)

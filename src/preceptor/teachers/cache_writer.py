"""Writing a teacher's signal to a cache folder, as `cache_layout` describes it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from preceptor.errors import UserError, nearest
from preceptor.files import replace_folder, sha256
from preceptor.task import Batch, Teacher, TeacherSignal
from preceptor.teachers.cache_layout import (
    FORMAT,
    MANIFEST,
    CacheIdentity,
    Field,
    key_bytes,
    question_mask,
    signal_arrays,
    without_padding,
)


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write to, held against other writers until the block ends.

    What a killed writer left there is removed: its lock died with it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, a writer that has just finished may have renamed the folder.
            held = os.path.samestat(os.fstat(descriptor), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UserError(f"Another process is writing the teacher cache {folder}: wait for it, or end it.")
        for left in partial.iterdir():
            left.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


class _FieldWriter:
    """Collects one field's rows in a raw file, then writes the array: neither the number of rows nor the longest
    question is known before the end, and the rows need not fit into memory."""

    def __init__(self, name: str, file: str, folder: Path, dtype: np.dtype, token_axes: tuple[int, ...]) -> None:
        self.name, self.file, self.folder, self.dtype, self.token_axes = name, file, folder, dtype, token_axes
        self.fixed: tuple[int, ...] | None = None
        self.blocks: list[tuple[int, ...]] = []
        self.raw = (folder / f"{file}.raw").open("wb")

    def append(self, array: np.ndarray, question_BQ: np.ndarray, ids: Sequence[str]) -> None:
        if not all(0 < axis < array.ndim for axis in self.token_axes):
            raise UserError(f"Token axes {self.token_axes} do not fit {self.name} of shape {array.shape}.")
        fixed = tuple(array.shape[axis] - question_BQ.shape[1] for axis in self.token_axes)
        if self.fixed is None:
            self.fixed = fixed
        first = self.blocks[0] if self.blocks else array.shape
        if fixed != self.fixed or min(fixed, default=0) < 0 or self._frame(array.shape) != self._frame(first):
            raise UserError(
                f"The teacher's {self.name} has shape {array.shape} for questions of {question_BQ.shape[1]} tokens, "
                f"after {first} in the first batch; only its token axes, given as {self.token_axes}, may vary, and "
                "only with the length of the questions."
            )
        with np.errstate(over="ignore"):
            array = without_padding(array, self.token_axes, question_BQ).astype(self.dtype)
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            fix = "write the cache as float32" if self.dtype == np.float16 else "train the teacher anew"
            raise UserError(
                f"The teacher's {self.name} for sample {ids[int(finite.argmin())]!r} holds values that are not finite "
                f"as {self.dtype}: {fix}."
            )
        self.raw.write(np.ascontiguousarray(array).data)
        self.blocks.append(array.shape)

    def _frame(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the lengths of the axes that must not change."""
        return tuple(length for axis, length in enumerate(shape) if axis and axis not in self.token_axes)

    def finish(self) -> Field:
        assert self.fixed is not None
        self.raw.close()
        shape = (sum(block[0] for block in self.blocks), *np.max(self.blocks, axis=0).tolist()[1:])
        array = np.lib.format.open_memmap(self.folder / self.file, mode="w+", dtype=self.dtype, shape=shape)
        raw, row = Path(self.raw.name), 0
        with raw.open("rb") as file:
            for block in self.blocks:
                window = (slice(row, row + block[0]), *(slice(0, length) for length in block[1:]))
                array[window] = np.fromfile(file, self.dtype, math.prod(block)).reshape(block)
                row += block[0]
        array.flush()
        raw.unlink()
        return Field(self.file, self.dtype.name, shape, self.token_axes, self.fixed)


def write_cache(
    folder: Path,
    source: Teacher,
    batches: Iterable[Batch],
    identity: CacheIdentity,
    *,
    fields: Sequence[str] | None = None,
    token_axes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write what `source` says about all samples of `batches` to `folder`; return the number of rows.

    `fields` are the tapped features to keep, all by default; logits and mask are always kept. `token_axes` gives, for
    every feature with one row per token, its token axes, the batch being axis 0: (1,) for (B, L, D), (2, 3) for
    attention maps (B, H, L, L). A key that comes again is written once. `progress` is called with the number of rows
    after every batch that adds some.

    The folder appears whole or not at all: it is written beside its place, flushed and renamed, and an older cache
    there is replaced at the end. Raises `UserError` where `folder` holds anything but a cache, another process is
    writing it, a field is unknown, changes its shape or is not finite, or there are no samples.
    """
    folder = Path(folder)
    assert identity.teacher == source.fingerprint, "the cache's identity names another teacher"
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no teacher cache: name another folder, or remove it yourself.")
    with _partial_folder(folder) as partial:
        writers: dict[str, _FieldWriter] = {}
        keys: dict[bytes, int] = {}
        lengths: list[int] = []
        for batch in batches:
            new = []
            for i, key in enumerate(key_bytes(batch.keys).tolist()):
                if key not in keys:
                    keys[key] = len(keys)
                    new.append(i)
            if not new:
                continue
            signal, question_BQ = source.signal(batch), question_mask(batch)
            if not writers:
                writers = _field_writers(partial, signal, fields, token_axes or {}, np.dtype(dtype))
            features = [name.removeprefix("features/") for name in writers if name.startswith("features/")]
            arrays = signal_arrays(signal, features)
            assert arrays.keys() == writers.keys(), "the teacher's signal has other fields than in the first batch"
            lengths += question_BQ[new].sum(axis=1).tolist()
            for name, writer in writers.items():
                writer.append(arrays[name][new], question_BQ[new], [batch.ids[i] for i in new])
            if progress is not None:
                progress(len(keys))
        if not keys:
            raise UserError(f"There are no samples to write to the teacher cache {folder}.")
        entries = {name: asdict(writer.finish()) for name, writer in writers.items()}
        sorted_keys = np.sort(np.array(list(keys), "S32"))
        np.save(partial / "keys.npy", sorted_keys.view(np.uint8).reshape(-1, 32))
        np.save(partial / "rows.npy", np.array([keys[key] for key in sorted_keys.tolist()], np.int64))
        np.save(partial / "lengths.npy", np.array(lengths, np.int64))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(partial.iterdir())}
        manifest = {
            "format": FORMAT,
            "identity": asdict(identity),
            "rows": len(keys),
            "fields": entries,
            "files": files,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        replace_folder(partial, folder)
    return len(keys)


def _field_writers(
    folder: Path,
    signal: TeacherSignal,
    fields: Sequence[str] | None,
    token_axes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
) -> dict[str, _FieldWriter]:
    names = list(signal.features) if fields is None else list(fields)
    for name in [*names, *token_axes]:
        if name not in signal.features:
            raise UserError(f"The teacher gives no feature {name!r} to cache{nearest(name, signal.features)}")
    writers = {"logits": _FieldWriter("logits", "logits.npy", folder, dtype, ())}
    if signal.mask is not None:
        writers["mask"] = _FieldWriter("mask", "mask.npy", folder, np.dtype(bool), (1,))
    for number, name in enumerate(names):
        axes = tuple(token_axes.get(name, ()))
        writers[f"features/{name}"] = _FieldWriter(f"feature {name!r}", f"feature-{number}.npy", folder, dtype, axes)
    return writers

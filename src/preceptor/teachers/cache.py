"""A teacher's signal written once and read from memory-mapped files; `cache_layout` describes the folder.

`write_cache` writes, `CachedTeacher.open` reads and refuses what was written for something else, `verify` recomputes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from preceptor.errors import UserError, nearest
from preceptor.task import Batch, Teacher, TeacherSignal
from preceptor.teachers.cache_layout import (
    AGAIN,
    FORMAT,
    INDEX,
    MANIFEST,
    CacheIdentity,
    Field,
    damaged_files,
    key_bytes,
    question_mask,
    signal_arrays,
    without_padding,
)
from preceptor.teachers.cache_writer import write_cache

__all__ = ["CacheIdentity", "CachedTeacher", "VerifyReport", "verify", "write_cache"]


class CachedTeacher:
    """A teacher whose signal is read from a cache; `open` it.

    `fingerprint` is that of the teacher that was cached, `features` the names of the taps that are read.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], features: Sequence[str] | None) -> None:
        self.folder = folder
        self.identity = CacheIdentity(**manifest["identity"])
        self.fingerprint = self.identity.teacher
        self.rows = int(manifest["rows"])
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self.fields = {
            name: Field(f["file"], f["dtype"], tuple(f["shape"]), tuple(f["token_axes"]), tuple(f["fixed"]))
            for name, f in manifest["fields"].items()
        }
        cached = [name.removeprefix("features/") for name in self.fields if name.startswith("features/")]
        self.features = cached if features is None else list(features)
        for name in self.features:
            if name not in cached:
                known = nearest(name, cached)
                raise UserError(f"The teacher cache {folder} lacks the feature {name!r}: {AGAIN}{known}")
        # Only the index is hashed here: it is small, and a wrong row would be a wrong answer without a sign of it.
        self._check_files(INDEX)
        self._keys = np.load(folder / "keys.npy").reshape(-1).view("S32")
        self._rows = np.load(folder / "rows.npy")
        self._lengths = np.load(folder / "lengths.npy")
        wanted = {"logits", "mask", *(f"features/{name}" for name in self.features)}
        self._arrays = {name: self._map(field) for name, field in self.fields.items() if name in wanted}

    @classmethod
    def open(cls, folder: Path, identity: CacheIdentity, features: Sequence[str] | None = None) -> Self:
        """Open the cache in `folder`, which must have been written for `identity`.

        `features` are the taps to read, all by default. Raises `UserError` where there is no cache, a file is damaged,
        a feature was not cached, or the identity differs; the message lists every difference.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            version = manifest["format"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"There is no teacher cache in {folder}: write it first with `preceptor cache`.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}): {AGAIN}.") from None
        if version != FORMAT:
            raise UserError(f"The teacher cache {folder} has format {version!r}, this version reads {FORMAT}: {AGAIN}.")
        try:
            cached = CacheIdentity(**manifest["identity"])
            different = cached.differences(identity)
            if different:
                lines = "\n".join(f"  {line}" for line in different)
                raise UserError(f"The teacher cache {folder} is of something else:\n{lines}\nTo mend: {AGAIN}.")
            return cls(folder, manifest, features)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}): {AGAIN}.") from None

    def __len__(self) -> int:
        return self.rows

    def _check_files(self, hashed: Iterable[str]) -> None:
        """Compare the files' sizes, and the SHA-256 of those in `hashed`, with the manifest."""
        damaged = damaged_files(self.folder, self.files, hashed)
        if damaged:
            raise UserError(f"The teacher cache {self.folder} is damaged: {'; '.join(damaged)}. To mend: {AGAIN}.")

    def _map(self, field: Field) -> np.ndarray:
        try:
            if field.file not in self.files:
                raise ValueError("not among the files of the manifest")
            # A plain array: the memmap class costs time with every slice.
            array = np.asarray(np.load(self.folder / field.file, mmap_mode="r", allow_pickle=False))
            if array.shape != field.shape or array.dtype != np.dtype(field.dtype):
                raise ValueError(f"{array.dtype} {array.shape} instead of {field.dtype} {field.shape}")
        except ValueError as error:
            raise UserError(f"The teacher cache {self.folder} is damaged: {field.file}: {error}; {AGAIN}.") from None
        return array

    def verify_files(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; raise `UserError` that names the damaged ones."""
        self._check_files(self.files)

    def find(self, batch: Batch) -> np.ndarray:
        """Return the rows (B,) of a batch's samples, found by key; raise `UserError` that names one not cached."""
        keys = key_bytes(batch.keys)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        missing = np.flatnonzero(self._keys[places] != keys)
        if len(missing):
            raise UserError(
                f"Sample {batch.ids[missing[0]]!r} is not in the teacher cache {self.folder} ({len(missing)} of "
                f"{len(batch)} samples of this batch are not). Either its augmentation view is beyond those cached "
                f"(augmentation {dict(self.identity.augmentation)}), or its image file or question has changed since. "
                f"To mend: {AGAIN}."
            )
        return self._rows[places]

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the cached signal on the batch's device, in float32; token axes have the batch's own length."""
        rows = self.find(batch)
        tokens = batch["attention_mask"].shape[1] if "attention_mask" in batch.tensors else 0
        lengths = self._lengths[rows]
        if lengths.max() > tokens:
            sample = batch.ids[int(lengths.argmax())]
            raise UserError(
                f"The question of sample {sample!r} was cached with {lengths.max()} tokens and comes with at most "
                f"{tokens} now: the tokenizer or the longest question allowed has changed; {AGAIN}."
            )
        device = next(iter(batch.tensors.values())).device
        tensors = {name: self._gather(name, rows, tokens, device) for name in self._arrays}
        features = {name: tensors[f"features/{name}"] for name in self.features}
        return TeacherSignal(tensors["logits"], features, tensors.get("mask"))

    def _gather(self, name: str, rows: np.ndarray, tokens: int, device: torch.device) -> Tensor:
        array, field = self._arrays[name], self.fields[name]
        window, padding = [slice(None)] * array.ndim, [(0, 0)] * array.ndim
        for axis, fixed in zip(field.token_axes, field.fixed, strict=True):
            window[axis] = slice(0, fixed + tokens)
            padding[axis] = (0, max(0, fixed + tokens - array.shape[axis]))
        # Indexed by rows after slicing: np.take would first copy the whole sliced array.
        part = array[tuple(window)][rows]
        if any(after for _, after in padding):
            part = np.pad(part, padding)
        tensor = torch.from_numpy(part).to(device)
        return tensor if tensor.dtype == torch.bool else tensor.float()

    def to(self, device: torch.device | str) -> Self:
        """Return the teacher itself: signals follow the batch's device."""
        return self


@dataclass(frozen=True)
class VerifyReport:
    """`checked` samples were recomputed; `worst` is the largest ``|cached - recomputed| / max(1, |recomputed|)``;
    `mismatched` are the ids beyond the tolerance."""

    checked: int
    worst: float
    mismatched: list[str]


def verify(
    cached: CachedTeacher,
    source: Teacher,
    batches: Iterable[Batch],
    fraction: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> VerifyReport:
    """Recompute a random fraction of a cache, at least one row, and compare all fields.

    The rows are drawn from the cache's keys; `batches` must run over the samples that it was written from, and is left
    as soon as all drawn rows have been met. The default tolerance holds for float32 and float16 caches of a float32
    teacher; one computed in bfloat16 depends on its batch and needs about 0.05. Raises `UserError` where no batch holds
    a drawn row.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction of the cache to verify must be in (0, 1], not {fraction}.")
    count = math.ceil(fraction * len(cached))
    drawn = set(np.random.default_rng(seed).choice(cached._keys, count, replace=False).tolist())
    worst, checked, mismatched = 0.0, 0, []
    for batch in batches:
        keys = key_bytes(batch.keys).tolist()
        picked = [i for i, key in enumerate(keys) if key in drawn and keys.index(key) == i]
        if not picked:
            continue
        drawn -= {keys[i] for i in picked}
        part = Batch(
            {name: tensor[picked] for name, tensor in batch.tensors.items()},
            [batch.ids[i] for i in picked],
            [batch.keys[i] for i in picked],
        )
        distances = _distances(cached, source, part)
        checked += len(picked)
        worst = max(worst, float(distances.max()))
        mismatched += [part.ids[i] for i in np.flatnonzero(distances > tolerance)]
        if not drawn:
            break
    if not checked:
        raise UserError(
            f"None of the {count} rows drawn from the teacher cache {cached.folder} occurs in the data given: verify "
            "it on the samples and augmentation views that it was written from."
        )
    return VerifyReport(checked, worst, mismatched)


def _distances(cached: CachedTeacher, source: Teacher, batch: Batch) -> np.ndarray:
    """Return (B,): the largest relative distance of cached and recomputed signal over all fields off padding."""
    question_BQ = question_mask(batch)
    old = signal_arrays(cached.signal(batch), cached.features)
    new = signal_arrays(source.signal(batch), cached.features)
    distances = np.zeros(len(batch))
    for name in old:
        right = without_padding(new[name], cached.fields[name].token_axes, question_BQ).astype(np.float64)
        left = without_padding(old[name], cached.fields[name].token_axes, question_BQ).astype(np.float64)
        distance = np.abs(left - right) / np.maximum(1, np.abs(right))
        # A value that is not a number is as far off as can be; max(0, nan) would hide it.
        distances = np.maximum(distances, np.nan_to_num(distance, nan=np.inf).reshape(len(batch), -1).max(axis=1))
    return distances

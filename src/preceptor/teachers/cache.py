"""A classifier's signals, written once and read from memory-mapped files (`array_store`).

Arrays of the store: `logits` (N, C), `mask` (N, L) bool if the teacher gives one, and `feature.NAME` (N, ...) for every
feature. Rows are found by content key (`Batch.keys`), never by position.

A token axis has a fixed part (class token, image tokens) and then the question's tokens, so that its length in any
batch is ``fixed + batch["attention_mask"].shape[1]``. It is stored up to the longest question of the data set, with
zeros for padding. A cached signal therefore has the shapes that the online teacher gives for the same batch, and its
values at every token that is not padding, whatever batches the cache was written from.

Shapes: B batch, C answer classes, L tokens of the fused sequence, Q tokens of the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from preceptor.errors import UserError, nearest
from preceptor.task import Batch, Teacher, TeacherSignal
from preceptor.teachers.array_store import REWRITE, ArrayStore, ArrayStoreWriter, VerifyReport

KIND = "signals"
FEATURE = "feature."


@dataclass(frozen=True)
class CacheKey:
    """Everything that a cached signal depends on except the content keys.

    `teacher` is `Teacher.fingerprint`, `vocabulary` the fingerprint of the answer classes, `data` the name and
    fingerprint of the rows, `variant` the variant of the data set. `preprocessing` (image size, tokenizer hash, ...)
    and `augmentation` (number of views, strengths) are JSON values.
    """

    teacher: str
    vocabulary: str
    data: str
    variant: str
    preprocessing: Mapping[str, Any]
    augmentation: Mapping[str, Any]


class CachedTeacher:
    """A teacher whose signals are read from a cache; `open` one.

    `fingerprint` is that of the cached teacher, `features` are the names of the features that a signal holds.
    """

    def __init__(self, store: ArrayStore, features: Sequence[str] | None) -> None:
        self.store, self.folder = store, store.folder
        self.fingerprint = str(store.cache_key["teacher"])
        self.token_axes: dict[str, tuple[int, ...]] = {
            name: tuple(axes) for name, axes in store.settings["token_axes"].items()
        }
        cached = [name.removeprefix(FEATURE) for name in store.arrays if name.startswith(FEATURE)]
        self.features = cached if features is None else list(features)
        for name in self.features:
            if name not in cached:
                similar = nearest(name, cached)
                raise UserError(f"The teacher cache {self.folder} lacks the feature {name!r}: {REWRITE}{similar}")
        names = ["logits", *(["mask"] if "mask" in store.arrays else []), *(FEATURE + name for name in self.features)]
        self._arrays = {name: store.load(name) for name in names}
        self._longest = int(store.lengths.max())

    @classmethod
    def open(cls, folder: Path, cache_key: CacheKey, features: Sequence[str] | None = None) -> Self:
        """Open the cache in `folder`, which must have been written for `cache_key`.

        `features` are the features to read, all by default. Raises UserError as `ArrayStore.open`, and if a feature is
        not in the cache.
        """
        return cls(ArrayStore.open(folder, KIND, asdict(cache_key)), features)

    def __len__(self) -> int:
        return self.store.rows

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the cached signal on the batch's device, in float32; token axes have the batch's own length.

        Raises UserError that names a sample which is not cached, or whose question has become shorter.
        """
        rows = self.store.find(batch.keys)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise UserError(
                f"Sample {batch.ids[missing[0]]!r} is not in the teacher cache {self.folder} ({len(missing)} of "
                f"{len(batch)} samples of this batch are not). Either its augmentation view was not cached "
                f"(augmentation {self.store.cache_key['augmentation']}), or its image file or question has changed. "
                f"Fix: {REWRITE}."
            )
        tokens = batch["attention_mask"].shape[1] if "attention_mask" in batch.tensors else 0
        lengths = self.store.lengths[rows]
        if lengths.max() > tokens:
            sample = batch.ids[int(lengths.argmax())]
            raise UserError(
                f"The question of sample {sample!r} was cached with {lengths.max()} tokens and now has at most "
                f"{tokens}: the tokenizer or the maximum question length has changed; {REWRITE}."
            )
        device = next(iter(batch.tensors.values())).device
        tensors = {name: self._gather(name, rows, tokens, device) for name in self._arrays}
        features = {name: tensors[FEATURE + name] for name in self.features}
        return TeacherSignal(tensors["logits"], features, tensors.get("mask"))

    def _gather(self, name: str, rows: np.ndarray, tokens: int, device: torch.device) -> Tensor:
        array = self._arrays[name]
        window, padding = [slice(None)] * array.ndim, [(0, 0)] * array.ndim
        for axis in self.token_axes.get(name, ()):
            length = array.shape[axis] - self._longest + tokens
            window[axis] = slice(0, length)
            padding[axis] = (0, max(0, length - array.shape[axis]))
        # Slices first: np.take would copy all rows of the sliced array.
        part = array[tuple(window)][rows]
        if any(after for _, after in padding):
            part = np.pad(part, padding)
        tensor = torch.from_numpy(part).to(device)
        return tensor if tensor.dtype == torch.bool else tensor.float()

    def to(self, device: torch.device | str) -> Self:
        """Return the teacher itself: signals are on the batch's device."""
        return self


def write_cache(
    folder: Path,
    teacher: Teacher,
    batches: Iterable[Batch],
    cache_key: CacheKey,
    *,
    fields: Sequence[str] | None = None,
    token_axes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the teacher's signals for all samples of `batches` to `folder`; return the number of rows.

    Args:
        fields: names of the features to store, all by default; logits and mask are always stored.
        token_axes: the token axes of every feature that has them, where the batch is axis 0: (1,) for (B, L, D),
            (2, 3) for attention maps (B, H, L, L).
        progress: is called with the number of rows after every batch that adds some.

    A key that occurs again is written once. A writer that was interrupted resumes if it is given the same batches.

    Raises:
        UserError: `folder` holds anything but a cache, another process is writing it, there are no samples, or a
            feature is unknown, changes its shape or is not finite.
    """
    assert cache_key.teacher == teacher.fingerprint, "the cache key names another teacher"
    token_axes = token_axes or {}
    axes = {FEATURE + name: list(token_axes[name]) for name in sorted(token_axes)} | {"mask": [1]}
    settings = {"dtype": dtype, "fields": None if fields is None else list(fields), "token_axes": axes}
    frames: dict[str, tuple[int, ...]] = {}
    written: set[str] = set()
    with ArrayStoreWriter(folder, KIND, asdict(cache_key), settings) as writer:
        for batch in batches:
            new = [i for i, key in enumerate(batch.keys) if key not in written and batch.keys.index(key) == i]
            keys = [batch.keys[i] for i in new]
            written.update(keys)
            if not new:
                continue
            if not writer.resume(keys):
                signal, question_BQ = teacher.signal(batch), question_mask(batch)
                names = list(signal.features) if fields is None else list(fields)
                for name in [*names, *token_axes]:
                    if name not in signal.features:
                        raise UserError(
                            f"The teacher gives no feature {name!r} to cache{nearest(name, signal.features)}"
                        )
                ids = [batch.ids[i] for i in new]
                arrays = {}
                for name, array in signal_arrays(signal, names).items():
                    frame = _frame(name, array.shape, axes.get(name, []), question_BQ.shape[1])
                    if frames.setdefault(name, frame) != frame:
                        raise UserError(
                            f"The teacher's {name} has shape {array.shape} for questions of {question_BQ.shape[1]} "
                            f"tokens, unlike the first batch; only its token axes, {axes.get(name, [])}, may vary, and "
                            "only with the length of the questions."
                        )
                    arrays[name] = _stored(name, array[new], axes.get(name, []), question_BQ[new], dtype, ids)
                writer.append(keys, question_BQ[new].sum(axis=1), arrays)
            if progress is not None:
                progress(len(written))
        return writer.finish()


def _frame(name: str, shape: tuple[int, ...], axes: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return the lengths that must be the same in every batch: of a token axis, its fixed part.

    Raises UserError if the token axes do not fit the shape.
    """
    frame = tuple(length - tokens if axis in axes else length for axis, length in enumerate(shape) if axis)
    if not all(0 < axis < len(shape) for axis in axes) or min(frame, default=0) < 0:
        raise UserError(f"Token axes {tuple(axes)} do not fit {name} of shape {shape}.")
    return frame


def _stored(
    name: str, array: np.ndarray, axes: Sequence[int], question_BQ: np.ndarray, dtype: str, ids: Sequence[str]
) -> np.ndarray:
    """Return an array as it is stored: no longer than the longest question, zeros at padding, as `dtype`.

    Raises UserError that names a sample whose values are not finite.
    """
    window, surplus = [slice(None)] * array.ndim, question_BQ.shape[1] - question_BQ.sum(axis=1).max()
    for axis in axes:
        window[axis] = slice(0, array.shape[axis] - surplus)
    array = without_padding(array, axes, question_BQ)[tuple(window)]
    if array.dtype == bool:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        fix = "write the cache as float32" if dtype == "float16" else "train the teacher again"
        raise UserError(
            f"The teacher's {name} for sample {ids[int(finite.argmin())]!r} has values that are not finite as {dtype}: "
            f"{fix}."
        )
    return array


def signal_arrays(signal: TeacherSignal, features: Iterable[str]) -> dict[str, np.ndarray]:
    """Return a signal as arrays: `logits`, `mask` if there is one, and `feature.NAME` for every name in `features`."""
    assert signal.logits is not None
    arrays = {"logits": signal.logits.detach().float().cpu().numpy()}
    if signal.mask is not None:
        arrays["mask"] = signal.mask.detach().bool().cpu().numpy()
    for name in features:
        arrays[FEATURE + name] = signal.features[name].detach().float().cpu().numpy()
    return arrays


def question_mask(batch: Batch) -> np.ndarray:
    """Return (B, Q) bool: True for the tokens of the questions that are not padding; (B, 0) without questions."""
    if "attention_mask" not in batch.tensors:
        return np.zeros((len(batch), 0), bool)
    mask = batch["attention_mask"].cpu().numpy().astype(bool)
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "questions must be padded at the end"
    return mask


def without_padding(array: np.ndarray, token_axes: Sequence[int], question_BQ: np.ndarray) -> np.ndarray:
    """Return the array with zeros at every padding token of its token axes."""
    for axis in token_axes:
        fixed = np.ones((len(array), array.shape[axis] - question_BQ.shape[1]), bool)
        shape = [len(array)] + [1] * (array.ndim - 1)
        shape[axis] = array.shape[axis]
        array = np.where(np.concatenate([fixed, question_BQ], axis=1).reshape(shape), array, array.dtype.type(0))
    return array


def verify(
    cached: CachedTeacher,
    teacher: Teacher,
    batches: Iterable[Batch],
    fraction: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> VerifyReport:
    """Recompute a random fraction of a cache, at least one row, and compare all arrays.

    `batches` must run over the samples and augmentation views that are trained on; reading stops as soon as all drawn
    rows have been seen. Drawn rows that are in no batch are counted as absent: the image file or the question has
    changed since the cache was written. The difference is ``|cached - recomputed| / max(1, |recomputed|)``. The default
    tolerance is for float32 and float16 caches of a float32 teacher; a bfloat16 teacher depends on its batch and needs
    about 0.05.
    """
    drawn = cached.store.sample(fraction, seed)
    worst, checked, mismatched = 0.0, 0, []
    for batch in batches:
        picked = [i for i, key in enumerate(batch.keys) if key in drawn and batch.keys.index(key) == i]
        if not picked:
            continue
        drawn -= {batch.keys[i] for i in picked}
        part = Batch(
            {name: tensor[picked] for name, tensor in batch.tensors.items()},
            [batch.ids[i] for i in picked],
            [batch.keys[i] for i in picked],
        )
        distances = _distances(cached, teacher, part)
        checked += len(picked)
        worst = max(worst, float(distances.max()))
        mismatched += [part.ids[i] for i in np.flatnonzero(distances > tolerance)]
        if not drawn:
            break
    return VerifyReport(checked, worst, mismatched, absent=len(drawn))


def _distances(cached: CachedTeacher, teacher: Teacher, batch: Batch) -> np.ndarray:
    """Return (B,): the largest relative difference over all arrays, without padding."""
    question_BQ = question_mask(batch)
    old = signal_arrays(cached.signal(batch), cached.features)
    new = signal_arrays(teacher.signal(batch), cached.features)
    distances = np.zeros(len(batch))
    for name in old:
        axes = cached.token_axes.get(name, ())
        left, right = (without_padding(one[name], axes, question_BQ).astype(np.float64) for one in (old, new))
        distance = np.abs(left - right) / np.maximum(1, np.abs(right))
        # NaN counts as infinitely far: max(0, nan) would hide it.
        distances = np.maximum(distances, np.nan_to_num(distance, nan=np.inf).reshape(len(batch), -1).max(axis=1))
    return distances

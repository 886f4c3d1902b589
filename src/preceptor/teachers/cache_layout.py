"""A teacher's signal written once and read from memory-mapped files.

Layout of the folder::

    manifest.json   format, identity, number of rows, fields, size and SHA-256 of every file
    keys.npy        (N, 32) uint8: the samples' content keys (`Batch.keys`), sorted
    rows.npy        (N,) int64: row of each key
    lengths.npy     (N,) int64: question tokens of each row, 0 without questions
    logits.npy      (N, C)
    mask.npy        (N, L) bool, where the teacher gives one
    feature-I.npy   (N, ...) per tapped feature

Rows are looked up by key, never by position. Token axes are padded at the end to the longest question: such an axis
has a fixed part (class token, image tokens) and then the question's tokens, so its length in any batch is
``fixed + batch["attention_mask"].shape[1]``. Padding is stored as zeros. A signal read back therefore has the shapes
that the online teacher gives for the same batch, and its values wherever a token is not padding, whatever batches the
cache was written from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.files import sha256
from preceptor.task import Batch, TeacherSignal

FORMAT = 2
MANIFEST = "manifest.json"
INDEX = ("keys.npy", "rows.npy", "lengths.npy")
AGAIN = "write the cache again with `preceptor cache`"


@dataclass(frozen=True)
class CacheIdentity:
    """What a cached signal depends on beside the content keys.

    `teacher`: `Teacher.fingerprint`. `vocabulary`: fingerprint of the answer classes. `data`: name and
    fingerprint of the rows. `variant`: the variant of the data set. `preprocessing` (image size, tokenizer hash,
    ...) and `augmentation` (number of views, strengths) are JSON values.
    """

    teacher: str
    vocabulary: str
    data: str
    variant: str
    preprocessing: Mapping[str, Any]
    augmentation: Mapping[str, Any]

    def __post_init__(self) -> None:
        # As JSON gives them back, so that an identity equals the one that was read from its manifest.
        for name in ("preprocessing", "augmentation"):
            object.__setattr__(self, name, json.loads(json.dumps(dict(getattr(self, name)))))

    def differences(self, other: CacheIdentity) -> list[str]:
        """Return a line per value that differs: this identity's, as the cached one, then the other's, as wanted."""
        return differences(asdict(self), asdict(other))


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return a line per value that differs between two settings, names of nested ones joined by dots."""
    cached, wanted = _flatten(cached), _flatten(wanted)
    return [
        f"{name}: cached {_short(cached.get(name, 'nothing'))}, wanted {_short(wanted.get(name, 'nothing'))}"
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
    """Return the value for a message, a long hash by its beginning."""
    text = str(value)
    return text[:12] + "..." if len(text) == 64 and " " not in text else text


@dataclass(frozen=True)
class Field:
    """One array of the cache. `token_axes` count the batch as axis 0; `fixed[i]` tokens precede the question's on
    axis `token_axes[i]`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    token_axes: tuple[int, ...]
    fixed: tuple[int, ...]


def signal_arrays(signal: TeacherSignal, features: Iterable[str]) -> dict[str, np.ndarray]:
    """Return a signal as arrays: `logits`, `mask` where there is one, and `features/TAP` for every tap asked for."""
    assert signal.logits is not None
    arrays = {"logits": signal.logits.detach().float().cpu().numpy()}
    if signal.mask is not None:
        arrays["mask"] = signal.mask.detach().bool().cpu().numpy()
    for name in features:
        arrays[f"features/{name}"] = signal.features[name].detach().float().cpu().numpy()
    return arrays


def question_mask(batch: Batch) -> np.ndarray:
    """Return (B, Q) bool: the tokens of the questions that are not padding; (B, 0) for a batch without questions."""
    if "attention_mask" not in batch.tensors:
        return np.zeros((len(batch), 0), bool)
    mask = batch["attention_mask"].cpu().numpy().astype(bool)
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "questions must be padded at the end"
    return mask


def without_padding(array: np.ndarray, token_axes: Sequence[int], question_BQ: np.ndarray) -> np.ndarray:
    """Return the array with zeros wherever one of its token axes lies on padding."""
    for axis in token_axes:
        fixed = np.ones((len(array), array.shape[axis] - question_BQ.shape[1]), bool)
        shape = [len(array)] + [1] * (array.ndim - 1)
        shape[axis] = array.shape[axis]
        array = np.where(np.concatenate([fixed, question_BQ], axis=1).reshape(shape), array, array.dtype.type(0))
    return array


def damaged_files(folder: Path, files: Mapping[str, Mapping[str, Any]], hashed: Iterable[str]) -> list[str]:
    """Return a phrase per file that is missing or has another size than `files` (of a manifest) says.

    Those named in `hashed` are read as well, and their SHA-256 compared.
    """
    damaged, hashed = [], set(hashed)
    for name, wanted in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            damaged.append(f"{name} is missing")
        elif path.stat().st_size != wanted["bytes"]:
            damaged.append(f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}")
        elif name in hashed and sha256(path) != wanted["sha256"]:
            damaged.append(f"{name} has another SHA-256 than when it was written")
    return damaged


def key_bytes(keys: Sequence[str]) -> np.ndarray:
    """Return hexadecimal SHA-256 keys as an (n,) array of 32-byte strings, which compare as the bytes do."""
    assert all(len(key) == 64 for key in keys), "content keys are SHA-256 in hexadecimal"
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype="S32")

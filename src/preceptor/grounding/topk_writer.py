"""Writing the likeliest words of a teacher, as `topk_cache` describes the folder; what is cut short is gone on with."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preceptor.errors import UserError
from preceptor.files import flush, replace_folder, sha256, write_text
from preceptor.grounding.topk_cache import ARRAYS, FORMAT, TopKIdentity, TopKRow, answers_key, teacher_rows
from preceptor.teachers.cache_layout import MANIFEST, key_bytes

if TYPE_CHECKING:
    from preceptor.data.types import Dialogue
    from preceptor.grounding.model import GroundedVlm
    from preceptor.grounding.pseudo_labels import ContentHashes

IDENTITY = "identity.json"


def write_topk_cache(
    folder: Path,
    vlm: GroundedVlm,
    dialogues: Sequence[Dialogue],
    identity: TopKIdentity,
    hashes: ContentHashes,
    *,
    batch_size: int = 4,
    block: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write what `vlm` says about the answers of `dialogues` to `folder`; return the number of distinct dialogues.

    Blocks of `block` dialogues are written beside the folder's place as they come. A writer that is started again with
    the same dialogues and identity goes on after the last whole block, and what it writes is byte-equal to what an
    undisturbed one would. The folder appears whole or not at all. `progress` gets the dialogues done and their number.

    Raises:
        UserError: there are no dialogues, `folder` holds something else, another process writes it, a value is not
            finite, or a dialogue cannot be encoded.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no cache; name another folder, or remove it yourself")
    rows = {answers_key(dialogue, hashes): dialogue for dialogue in dialogues}
    if not rows:
        raise UserError(f"there are no dialogues to write to {folder}")
    keys, distinct = list(rows), list(rows.values())
    with _partial(folder, {**identity.as_dict(), "keys": keys, "block": block}) as partial:
        for number, begin in enumerate(range(0, len(distinct), block)):
            place = partial / f"block-{number:06d}"
            if not place.is_dir():
                found = list(teacher_rows(vlm, distinct[begin : begin + block], identity, batch_size=batch_size))
                for dialogue, row in zip(distinct[begin : begin + block], found, strict=True):
                    _check(row, dialogue.id)
                _write_block(place, found)
            if progress is not None:
                progress(min(begin + block, len(distinct)), len(distinct))
        _join(partial, keys, identity)
        replace_folder(partial, folder)
    return len(keys)


@contextmanager
def _partial(folder: Path, wanted: dict) -> Iterator[Path]:
    """Give the folder beside `folder` to write to, held against others, with the blocks of a writer of the same."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(lock), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UserError(f"another process is writing the cache {folder}: wait for it, or end it")
        text = json.dumps(wanted, sort_keys=True)
        same = (partial / IDENTITY).is_file() and (partial / IDENTITY).read_text("utf-8") == text
        for left in list(partial.iterdir()):
            if not same or not left.name.startswith("block-"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_text(partial / IDENTITY, text)
        yield partial
    finally:
        os.close(lock)


def _check(row: TopKRow, id: str) -> None:
    if not np.isfinite(row.logs.astype(np.float32)).all() or np.isnan(row.tails).any() or (row.tails > 1e-3).any():
        raise UserError(
            f"the teacher's words for dialogue {id!r} are not finite as {row.logs.dtype}: write the cache as float32, "
            "at a higher temperature, or look at the teacher's weights"
        )


def _write_block(place: Path, rows: Sequence[TopKRow]) -> None:
    temporary = place.with_name(f".{place.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    for name in ARRAYS:
        np.save(temporary / f"{name}.npy", np.concatenate([getattr(row, name) for row in rows]))
    np.save(temporary / "lengths.npy", np.array([len(row.targets) for row in rows], np.int64))
    for file in temporary.iterdir():
        flush(file)
    flush(temporary)
    os.rename(temporary, place)
    flush(place.parent)


def _join(partial: Path, keys: Sequence[str], identity: TopKIdentity) -> None:
    """Make the whole arrays out of the blocks, a block in memory at a time, and the manifest."""
    blocks = sorted(partial.glob("block-*"))
    lengths = np.concatenate([np.load(block / "lengths.npy") for block in blocks])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for name in ARRAYS:
        first = np.load(blocks[0] / f"{name}.npy", mmap_mode="r")
        shape = (int(offsets[-1]), *first.shape[1:])
        array = np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=first.dtype, shape=shape)
        done = 0
        for block in blocks:
            part = np.load(block / f"{name}.npy")
            array[done : done + len(part)] = part
            done += len(part)
        array.flush()
        del array
    order = np.argsort(key_bytes(keys), kind="stable")
    np.save(partial / "keys.npy", key_bytes(keys)[order].view(np.uint8).reshape(-1, 32))
    np.save(partial / "rows.npy", order.astype(np.int64))
    np.save(partial / "offsets.npy", offsets)
    for block in blocks:
        shutil.rmtree(block)
    (partial / IDENTITY).unlink()
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(partial.iterdir())}
    manifest = {
        "format": FORMAT,
        "kind": "top-k",
        "identity": identity.as_dict(),
        "rows": len(keys),
        "tokens": int(offsets[-1]),
        "files": files,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")

"""A teacher's answers as a folder of JSON lines that only grows, one record per question asked.

::

    manifest.json          format, the teacher and its settings, the data sets that were asked about
    labels-00000.jsonl     at most `SHARD` records, then the next file

A record is found by the content of its question, never by a name or a position. Nothing in the folder names a file, an
image or a patient. A record has its CRC-32; the last line of a killed writer is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from preceptor.errors import UserError
from preceptor.files import flush, json_lines, write_text
from preceptor.teachers.array_store import differences

FORMAT = 1
MANIFEST = "manifest.json"
SHARD = 10_000

Source = Literal["top_logprobs", "logprobs", "agreement"]
"""Where a confidence comes from: from the two most likely tokens at each place, from the token that was said alone
(greedy decoding; the margin is then its lower bound), or from how many sampled answers agree."""


@dataclass(frozen=True)
class Label:
    """One answer of a teacher.

    `key` is that of the question (`pseudo_labels.question_key`), `turn` its place in the dialogue. `confidence` and
    `margin` are the means over the answer's tokens of p1 and p1 - p2 at temperature 1 (or of `source`), None where
    nothing is known. `ended` is false for an answer that was cut off at the most tokens. `logprobs` are the natural
    logarithms of the answer's tokens, empty where not known; `candidates` all answers where there were several.
    """

    key: str
    turn: int
    answer: str
    ended: bool
    tokens: int | None = None
    confidence: float | None = None
    margin: float | None = None
    source: Source | None = None
    logprobs: tuple[float, ...] = ()
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelIdentity:
    """Who answered, and how: `teacher` is a model's name or the fingerprint of its weights; `settings` are a JSON
    object (temperature, candidates, prompt version, ...)."""

    teacher: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        # As JSON gives them back, so that an identity equals the one that was read from its manifest.
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))


class LabelStore:
    """An open store that takes labels; use it in a `with` block. `keys` are those that it holds."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self._lock = folder, lock
        self.keys: set[str] = set()
        self._shard, self._lines = 0, 0

    @classmethod
    def open(cls, folder: Path, identity: LabelIdentity, data: Mapping[str, str]) -> Self:
        """Make a store, or go on with one.

        `data` are fingerprints of data sets with their names; they are added to those in the manifest.

        Raises:
            UserError: the store is of another teacher or other settings (each is named), another process writes it, it
                is damaged, or the folder holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no pseudo-labels; name another folder, or remove it yourself")
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process writes pseudo-labels to {folder}: wait for it, or end it") from None
            known = dict(data)
            if (folder / MANIFEST).is_file():
                manifest = read_manifest(folder)
                check_identity(folder, manifest, identity)
                known = {**manifest["data"], **known}
            document = {"format": FORMAT, **asdict(identity), "data": known}
            write_text(folder / MANIFEST, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
            flush(folder)
            store = cls(folder, lock)
            store._recover()
            return store
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def append(self, labels: Sequence[Label]) -> None:
        """Write labels to the disk; when it returns they are there. A key that the store holds is passed over."""
        new = list({label.key: label for label in labels if label.key not in self.keys}.values())
        while new:
            if self._lines >= SHARD:
                self._shard, self._lines = self._shard + 1, 0
            part, new = new[: SHARD - self._lines], new[SHARD - self._lines :]
            file = self.folder / _name(self._shard)
            created = not file.exists()
            with file.open("a", encoding="utf-8", newline="\n") as shard:
                shard.writelines(_line(label) for label in part)
                shard.flush()
                os.fsync(shard.fileno())
            if created:
                flush(self.folder)
            self.keys |= {label.key for label in part}
            self._lines += len(part)

    def _recover(self) -> None:
        """Read what is there, and cut off what a killed writer left unfinished."""
        shards = _shards(self.folder)
        for number, file in enumerate(shards):
            labels, good = _read(file, last=number == len(shards) - 1)
            if good < file.stat().st_size:
                with file.open("r+b") as shard:
                    shard.truncate(good)
                    os.fsync(shard.fileno())
            self.keys |= {label.key for label in labels}
            self._shard, self._lines = number, len(labels)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a store. Raises UserError where there is none, or one of another format."""
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
        version = manifest["format"]
        LabelIdentity(manifest["teacher"], manifest["settings"])
        dict(manifest["data"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there are no pseudo-labels in {folder}: write them first with `preceptor teach`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error!r}): write the pseudo-labels to a new folder") from None
    if version != FORMAT:
        raise UserError(f"{folder} has format {version!r}, this version reads {FORMAT}: write the pseudo-labels again")
    return manifest


def check_identity(folder: Path, manifest: Mapping[str, Any], wanted: LabelIdentity) -> None:
    """Raise UserError that lists the differences where a store is of another teacher or other settings."""
    there = {"teacher": manifest["teacher"], **manifest["settings"]}
    different = differences(there, {"teacher": wanted.teacher, **wanted.settings})
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        raise UserError(
            f"the pseudo-labels in {folder} are of another teacher or other settings:\n{lines}\n"
            "Give the same settings again, or another folder."
        )


def read_labels(folder: Path) -> Iterator[Label]:
    """Give the labels of a store in the order in which they were written.

    What a writer has not finished is passed over. Raises UserError with the place of a line that is damaged.
    """
    shards = _shards(Path(folder))
    for number, file in enumerate(shards):
        yield from _read(file, last=number == len(shards) - 1)[0]


def broken_lines(folder: Path) -> list[str]:
    """Return the places, ``labels-00000.jsonl:7``, of lines that are damaged or unfinished.

    Raises UserError where a whole file is missing between others.
    """
    return [
        f"{file.name}:{number}"
        for file in _shards(Path(folder))
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1)
        if _label(line) is None
    ]


def _name(shard: int) -> str:
    return f"labels-{shard:05d}.jsonl"


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("labels-*.jsonl"))
    if [file.name for file in found] != [_name(number) for number in range(len(found))]:
        raise UserError(f"a file of pseudo-labels is missing in {folder}: there are {[file.name for file in found]}")
    return found


def _line(label: Label) -> str:
    row = {name: value for name, value in asdict(label).items() if value not in (None, ())}
    text = json_lines([row])
    return f'{text[:-2]}, "crc": {zlib.crc32(text.encode())}}}\n'


def _read(file: Path, *, last: bool) -> tuple[list[Label], int]:
    """Return the labels of a file and the bytes that they take. In the `last` file what is broken at the end is no
    damage but unfinished."""
    labels: list[Label] = []
    good = at = 0
    broken: int | None = None
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        at += len(line)
        label = _label(line)
        if label is None:
            broken = broken or number
        elif broken:
            break
        else:
            labels.append(label)
            good = at
    else:
        if not broken or last:
            return labels, good
    raise UserError(
        f"{file}:{broken} is damaged: restore the file, or remove this line and run `preceptor teach` again, which "
        "asks its question anew"
    )


def _label(line: bytes) -> Label | None:
    """Return a line's label, None where the line is unfinished or damaged."""
    try:
        row = json.loads(line)
        crc = row.pop("crc")
        if not line.endswith(b"\n") or crc != zlib.crc32(json_lines([row]).encode()):
            return None
        lists = {name: tuple(row[name]) for name in ("logprobs", "candidates") if name in row}
        return Label(**{**row, **lists})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None

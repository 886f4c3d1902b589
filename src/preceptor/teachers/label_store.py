"""A teacher's answers in a folder with one SQLite file, one row per answer.

A row is found by the content of its question, never by a name or a position. Nothing in the file names a file, an image
or a patient. Every `append` is one transaction that is on the disk when it returns, so that a killed writer loses
nothing that it has reported. Every row has a CRC-32, because SQLite does not detect a changed byte of a text.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from preceptor.errors import UserError
from preceptor.files import LockedError, flush, lock
from preceptor.teachers.array_store import differences

FORMAT = 3
FILE = "labels.sqlite"
SCHEMA = f"""
BEGIN;
CREATE TABLE store (teacher TEXT, settings TEXT, data TEXT, boxes TEXT);
CREATE TABLE labels (
    id INTEGER PRIMARY KEY, key TEXT UNIQUE, turn INTEGER, answer TEXT, ended INTEGER, tokens INTEGER,
    confidence REAL, margin REAL, source TEXT, logprobs TEXT, candidates TEXT,
    raw TEXT, reasons TEXT, crc INTEGER
);
PRAGMA user_version = {FORMAT};
COMMIT;
"""

Source = Literal["top_logprobs", "logprobs", "agreement"]
"""Origin of a confidence: the two most likely tokens at each position; the probability of the answer's own tokens
(greedy decoding; the margin is then a lower bound); or the share of the sampled answers that agree."""


@dataclass(frozen=True)
class Label:
    """One answer of a teacher.

    `key` is that of the question (`pseudo_labels.question_key`), `turn` its place in the dialogue. `confidence` and
    `margin` are the means over the answer's tokens of p1 and p1 - p2 at temperature 1 (or as `source` defines them),
    None if unknown. `ended` is False for an answer that was cut off at the maximum number of tokens. `logprobs` are the
    natural logarithms of the probabilities of the answer's tokens, empty if unknown; `candidates` are all sampled
    answers if there were several, as the teacher wrote them. `raw` is the answer as the teacher wrote it if that
    differs from `answer`, whose boxes are in the language of the data. `reasons` tell why the answer is not usable as a
    label, the most important one first.
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
    raw: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def written(self) -> str:
        """The answer as the teacher wrote it."""
        return self.raw or self.answer


COLUMNS = [field.name for field in fields(Label)]
LISTS = ("logprobs", "candidates", "reasons")


@dataclass(frozen=True)
class LabelStoreKey:
    """Everything that answers depend on except the questions.

    `teacher` is a model's name or the fingerprint of its weights, `settings` JSON values (temperature, candidates,
    prompt version, ...).
    """

    teacher: str
    settings: Mapping[str, Any]


class LabelStore:
    """A store that is open for writing; use it in a `with` block. `keys` are the keys of the stored labels."""

    def __init__(self, folder: Path, database: sqlite3.Connection, opened: contextlib.ExitStack) -> None:
        """`opened` closes the database and frees the lock; from here on, the store does it at its end."""
        self.folder, self._database = folder, database
        self.keys: set[str] = {key for (key,) in database.execute("SELECT key FROM labels")}
        self._opened = opened.pop_all()

    @classmethod
    def open(cls, folder: Path, cache_key: LabelStoreKey, data: Mapping[str, str]) -> Self:
        """Create a store, or open an existing one to add labels.

        `data` maps the fingerprints of data sets to their names; they are added to those in the store.

        Raises:
            UserError: the store has another cache key (every difference is listed), another process writes to it, it is
                damaged or of an older format, or the folder holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not holds_labels(folder) and (not folder.is_dir() or _others(folder)):
            raise UserError(
                f"{folder} exists and does not hold pseudo-labels; name another folder, or remove it yourself"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with _explaining(folder), contextlib.ExitStack() as opened:
            try:
                opened.enter_context(lock(folder))
            except LockedError as error:
                raise UserError(
                    f"{error.owner} writes pseudo-labels to {folder}: wait for it, stop it, or name another folder"
                ) from None
            database = opened.enter_context(contextlib.closing(_connect(folder, create=True)))
            row = database.execute("SELECT teacher, settings, data FROM store").fetchone()
            with database:
                if row is None:
                    database.execute(
                        "INSERT INTO store VALUES (?, ?, '{}', 'null')", (cache_key.teacher, _json(cache_key.settings))
                    )
                else:
                    check_cache_key(folder, cache_key)
                known = {} if row is None else json.loads(row[2])
                database.execute("UPDATE store SET data = ?", (_json({**known, **data}),))
            flush(folder)
            list(_rows(folder, database))  # finds damaged rows
            return cls(folder, database, opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def append(self, labels: Sequence[Label]) -> None:
        """Write labels in one transaction; they are on the disk when it returns. Keys that are stored are skipped."""
        rows = [_values(label) for label in labels if label.key not in self.keys]
        places = ", ".join("?" * (len(COLUMNS) + 1))
        with _explaining(self.folder), self._database as database:
            database.executemany(f"INSERT OR IGNORE INTO labels ({', '.join(COLUMNS)}, crc) VALUES ({places})", rows)
        self.keys.update(label.key for label in labels)

    def replace(self, labels: Sequence[Label]) -> None:
        """Write labels in the place of those with the same keys, in one transaction."""
        places = ", ".join(f"{name} = ?" for name in (*COLUMNS, "crc"))
        with _explaining(self.folder), self._database as database:
            database.executemany(
                f"UPDATE labels SET {places} WHERE key = ?", [(*_values(label), label.key) for label in labels]
            )

    def set_boxes(self, boxes: Mapping[str, Any]) -> None:
        """Store how the teacher writes boxes, as JSON values."""
        with _explaining(self.folder), self._database as database:
            database.execute("UPDATE store SET boxes = ?", (_json(boxes),))


def _others(folder: Path) -> list[Path]:
    """Return the content of a folder without the temporary files of a store, which a killed process leaves."""
    return [path for path in folder.iterdir() if not path.name.startswith(f".{FILE}")]


def holds_labels(folder: Path) -> bool:
    """Return whether a folder holds pseudo-labels, in this format or in an older one."""
    return (folder / FILE).is_file() or (folder / "labels-00000.jsonl").is_file()


def read_store(folder: Path) -> tuple[LabelStoreKey, dict[str, str]]:
    """Return the cache key of a store, and the names of its data sets by fingerprint.

    Raises UserError if there is no store, or if it is damaged or of an older format.
    """
    with contextlib.closing(_connect(folder)) as database, _explaining(folder):
        teacher, settings, data = database.execute("SELECT teacher, settings, data FROM store").fetchone()
        return LabelStoreKey(teacher, json.loads(settings)), json.loads(data)


def read_boxes(folder: Path) -> dict[str, Any]:
    """Return how the teacher of a store writes boxes, as stored by `LabelStore.set_boxes`; empty if unknown."""
    with contextlib.closing(_connect(folder)) as database, _explaining(folder):
        return json.loads(database.execute("SELECT boxes FROM store").fetchone()[0]) or {}


def check_cache_key(folder: Path, wanted: LabelStoreKey) -> None:
    """Raise UserError that lists the differences if a store is of another teacher or other settings."""
    stored = read_store(folder)[0]
    changes = differences(
        {"teacher": stored.teacher, **stored.settings}, {"teacher": wanted.teacher, **wanted.settings}
    )
    if changes:
        lines = "\n".join(f"  {line}" for line in changes)
        raise UserError(
            f"the pseudo-labels in {folder} are of another teacher or other settings:\n{lines}\n"
            "Use the same settings, or another folder."
        )


def read_labels(folder: Path) -> list[Label]:
    """Return the labels of a store in the order in which they were written.

    Raises UserError if there is no store, or if it is damaged or of an older format.
    """
    with contextlib.closing(_connect(folder)) as database:
        return list(_rows(folder, database))


def damaged_rows(folder: Path) -> list[str]:
    """Return a description of every damage in a store: of the file's structure, and of rows with a wrong CRC-32."""
    with contextlib.closing(_connect(folder)) as database, _explaining(folder):
        problems = [text for (text,) in database.execute("PRAGMA integrity_check") if text != "ok"]
        rows = database.execute(f"SELECT id, {', '.join(COLUMNS)}, crc FROM labels ORDER BY id")
        return problems + [f"row {id}" for id, *values in rows if _label(values) is None]


def _connect(folder: Path, create: bool = False) -> sqlite3.Connection:
    """Open the file of a store. Raises UserError if it is missing, damaged or of another format."""
    file = Path(folder) / FILE
    if not file.is_file() and holds_labels(folder):
        raise UserError(
            f"{folder} holds pseudo-labels of an older format (JSON lines), which this version does not read: run "
            "`preceptor teach` again with another --output folder"
        )
    if not create and not file.is_file():
        raise UserError(f"there are no pseudo-labels in {folder}: write them first with `preceptor teach`")
    # Readers open for writing, too: they roll back what a killed writer left, and fall back to reading by themselves.
    with _explaining(folder):
        if not file.is_file():  # the file appears with its tables, so that a reader never sees it without
            temporary = file.with_name(f".{FILE}.tmp")
            try:
                for old in file.parent.glob(f"{temporary.name}*"):  # with its journal
                    old.unlink()
                temporary.touch()  # SQLite would create it without the permission to write for the group
                with contextlib.closing(sqlite3.connect(temporary)) as database:
                    database.executescript(SCHEMA)
                os.replace(temporary, file)
            except BaseException:
                for old in file.parent.glob(f"{temporary.name}*"):
                    old.unlink()
                raise
        database = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=60)
    try:
        with _explaining(folder):
            database.execute("PRAGMA synchronous = EXTRA")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise UserError(
                    f"{file} has format {version}, this version reads {FORMAT}: run `preceptor teach` again with "
                    "another --output folder"
                )
            (problem,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if problem != "ok":
                raise sqlite3.DatabaseError(problem)
    except BaseException:
        database.close()
        raise
    return database


_UNWRITABLE = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space and run the same command again",
    sqlite3.SQLITE_READONLY: "it cannot be written; change its permissions, or choose another folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the path and its permissions",
    sqlite3.SQLITE_IOERR: "the disk reports an error, or `ulimit -f` is lower than its size; choose another folder",
    sqlite3.SQLITE_BUSY: "another process has locked it; wait for it, or stop it",
    sqlite3.SQLITE_PERM: "it cannot be opened; check the path and its permissions",
}


@contextlib.contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """Translate the errors of SQLite and of damaged values to UserError."""
    try:
        yield
    except UserError:
        raise
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        file = Path(folder) / FILE
        # The lower byte is the primary code, such as SQLITE_IOERR of SQLITE_IOERR_WRITE.
        if problem := _UNWRITABLE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF):
            raise UserError(f"{file}: {problem}") from None
        # quick_check writes a heading in stars and a line for each problem.
        lines = [line for line in str(error).splitlines() if not line.startswith("***")]
        reason = lines[0][:200] if lines else type(error).__name__
        raise UserError(
            f"{file} is damaged ({reason}): restore it from a copy, or run `preceptor teach` again with "
            "another --output folder"
        ) from None


def _rows(folder: Path, database: sqlite3.Connection) -> Iterator[Label]:
    with _explaining(folder):
        for id, *values in database.execute(f"SELECT id, {', '.join(COLUMNS)}, crc FROM labels ORDER BY id"):
            label = _label(values)
            if label is None:
                file = Path(folder) / FILE
                raise UserError(
                    f"{file}: row {id} is damaged: restore the file, or remove the row with sqlite3 {file} "
                    f"'DELETE FROM labels WHERE id = {id}' and run `preceptor teach`, which asks its question again"
                )
            yield label


def _values(label: Label) -> list[Any]:
    """Return a label's values in the order of the columns, with their CRC-32."""
    values = asdict(label)
    values |= {name: _json(values[name]) for name in LISTS}
    values |= {name: None if values[name] is None else float(values[name]) for name in ("confidence", "margin")}
    row = [values[name] for name in COLUMNS]
    row[COLUMNS.index("ended")] = int(label.ended)
    return [*row, zlib.crc32(_json(row).encode())]


def _label(values: Sequence[Any]) -> Label | None:
    """Return the label of a row, None if the row is damaged."""
    *row, crc = values
    if zlib.crc32(_json(row).encode()) != crc:
        return None
    named = dict(zip(COLUMNS, row, strict=True))
    lists = {name: tuple(json.loads(named[name])) for name in LISTS}
    return Label(**{**named, **lists, "ended": bool(named["ended"])})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

"""Open parquet tables and read their cells, with classes of the library `datasets` as their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from preceptor.errors import UserError

COLUMNS = ("image", "question", "answer")
_BATCH = 64
COPY_AGAIN = "copy it again from its source"


@contextmanager
def open_table(file: Path) -> Iterator[Any]:
    """Open a parquet file. Raises UserError if it, or what is read from it, is broken."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with pip install 'preceptor[parquet]'") from None
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            yield table
    except (UserError, MemoryError):  # pyarrow's own error for a lack of memory is both kinds
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names or statistics that are no text
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file} cannot be read as parquet ({reason}); {COPY_AGAIN}") from error


def read_cells(file: Path, columns: Sequence[str], others: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the cells of each row. Cells of `others` that have no value in Python are None."""
    row = 0
    with open_table(file) as table:
        schema = table.schema_arrow
        absent = [name for name in COLUMNS if name not in schema.names]
        if absent:
            raise UserError(f"{file} has no column {absent[0]!r}; the required columns are {', '.join(COLUMNS)}")
        repeated = [name for name in columns if schema.names.count(name) > 1]
        if repeated:
            raise UserError(f"{file}: column {repeated[0]!r} occurs twice; keep one")
        for name in columns:
            _check_type(schema.field(name).type, f"{file}: column {name}")
        classes = _classes(schema.metadata or {})
        try:
            for batch in table.iter_batches(batch_size=_BATCH, columns=[*columns, *others]):
                for index in range(batch.num_rows):
                    cells = {name: batch.column(name)[index].as_py() for name in columns}
                    for name in classes.keys() & cells.keys():
                        cells[name] = _class_name(cells[name], classes[name], f"{file}: row {row}: {name}")
                    for name in others:
                        with suppress(ValueError):  # a text that is not UTF-8, or a time in nanoseconds
                            cells[name] = batch.column(name)[index].as_py()
                    yield cells
                    row += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: row {row}: a text is not UTF-8; {COPY_AGAIN}, or correct the row") from error


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes of every column of the type ClassLabel, or of lists of them.

    The library `datasets` stores the numbers of classes in the column, and their names in the metadata of the table.
    """
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {column: _class_names(feature) for column, feature in features.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # not written by `datasets`
        return {}
    return {column: names for column, names in named.items() if names}


def _class_names(feature: Any) -> list[str]:
    if isinstance(feature, list):  # how `datasets` writes some lists
        return _class_names(feature[0]) if feature else []
    if not isinstance(feature, dict):
        return []
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else _class_names(feature.get("feature"))
    return names if isinstance(names, list) else []


def _class_name(value: Any, names: Sequence[str], place: str) -> Any:
    """Return the name of a class by its number, for each number of a list. -1 means that there is none."""
    if isinstance(value, list):
        return [_class_name(one, names, place) for one in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if not -1 <= value < len(names):
        raise UserError(
            f"{place} is class {value}, but the table has names for {len(names)} classes; store the names as texts"
        )
    return names[value] if value >= 0 else None


def _check_type(kind: Any, place: str) -> None:
    """Raise UserError for types whose text is not defined. `data.texts` checks the other ones cell by cell."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_temporal(kind) or types.is_float32(kind) or types.is_float16(kind):
        raise UserError(f"{place} has the type {kind}, which has no exact text; store it as texts")

"""Parse JSON that a user wrote. Every mistake is one sentence that can be printed."""

from __future__ import annotations

import json
from typing import Any

from preceptor.errors import UserError


def parse_json(text: str, place: str, fix: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        UserError: the text is invalid, nested too deeply, has a key twice in one object, or half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} contains half of a surrogate pair (\\u{ord(error.object[error.start]):04x}); {fix}"
        ) from None
    except RecursionError:
        raise UserError(f"{place} cannot be read as JSON (it is nested too deeply); {fix}") from None
    except ValueError as error:
        raise UserError(f"{place} cannot be read as JSON ({error}); {fix}") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!a} occurs twice")
    return values

"""The exception for mistakes of the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one sentence with the offending value, its place and the fix. The command line prints it without a
    traceback and exits with code 2. Any other exception is a bug and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint ``"; did you mean 'x'?"`` for the closest known name, or a list of all names if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}"

"""The exception for mistakes of the user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_STRAY_BREAK = re.compile(r"\n(?!  |Use |Fix:)")


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one sentence with the offending value, its place and the fix. The command line prints it without a
    traceback and exits with code 2. Any other exception is a bug and keeps its traceback.

    Characters that a terminal would obey or not show are replaced with their escapes, because messages quote names of
    files and cells of tables. So are line breaks, except before the lines of a list, which begin with two blanks, and
    before "Use" and "Fix:", which may end it. `given` is the message without these changes.
    """

    def __init__(self, message: str) -> None:
        self.given = message
        super().__init__(printable(_STRAY_BREAK.sub(r"\\n", message), keep="\n"))


def printable(text: str, keep: str = "") -> str:
    """Return a text with escapes for control characters, marks of text direction and half surrogate pairs.

    A name of a file may hold such characters and would change the message or the terminal that shows it. Characters in
    `keep` stay.
    """
    return "".join(
        sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode() for sign in text
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint ``"; did you mean 'x'?"`` for the closest known name, or a list of all names if none is close.

    The hint is empty if no name is known.
    """
    names = sorted(one for one in known if one.strip())
    if not names:
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(printable(one) for one in names)}"  # a column of a table may have any name

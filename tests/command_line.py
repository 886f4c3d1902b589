"""The command line, called in this process."""

from __future__ import annotations

import contextlib
import io
import sys

from preceptor.cli import app as cli


def call(*arguments: object) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error) of the command line."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["preceptor", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()

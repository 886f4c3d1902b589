"""Exit codes, and what is printed if a verb fails."""

from __future__ import annotations

import os
import sys

from preceptor.cli.terminal import wrap
from preceptor.errors import UserError
from preceptor.os_errors import describe_os_error

DONE, CHECK_FAILED, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
"""The exit codes of the command line."""


def exit_with(error: BaseException) -> int:
    """Print one sentence for a mistake or an interruption and return the exit code; re-raise everything else."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    loop = sys.modules.get("preceptor.training.loop")  # Only a training raises Interrupted, and importing it is slow.
    if loop is not None and isinstance(error, loop.Interrupted):
        print(error, file=sys.stderr)
        return INTERRUPTED
    sentence = str(error) if isinstance(error, UserError) else describe_os_error(error)
    if sentence is None:
        raise error
    print(wrap(f"error: {sentence}", sys.stderr), file=sys.stderr)
    return USER_ERROR


def print_any_character() -> None:
    """Let characters that the terminal cannot show, and bytes of file names that are not UTF-8, print as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Write what is left of the output. If that fails, discard the rest, so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise

"""The only outcomes that an input may have: success, or one sentence to the user. Anything else is a failure."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.os_errors import describe_os_error
from tests.command_line import call

PATIENT = "Qwertzuiop^Zebulon"
"""A patient's name that is planted in headers. It must not appear in any message, log, warning or output."""
MOST_CHARACTERS = 1000
"""Longest message, without the paths in it and without listed files."""
MOST_SECONDS = 20
"""Longest processor time of one input."""
MOST_BYTES = 2 * 2**30
"""Largest growth of the memory of the process by one input."""


class Wrong(AssertionError):
    """An outcome that is neither a right value nor a sentence. `kind` is the same for inputs with the same fault."""

    def __init__(self, kind: str, detail: object = None) -> None:
        super().__init__(kind if detail is None else f"{kind}: {detail}")
        self.kind = kind


class Hang(BaseException):
    """An input took too long. Not an Exception, so that no reader turns it into a message."""


@dataclass(frozen=True)
class Outcome:
    """`value` is what a call returned; `sentence` is the message of its UserError, or None if it succeeded."""

    value: Any
    sentence: str | None

    @property
    def accepted(self) -> bool:
        return self.sentence is None


def require(condition: object, kind: str, detail: object = None) -> None:
    """Raise Wrong unless the condition holds."""
    if not condition:
        raise Wrong(kind, detail)


def attempt(function: Callable[[], Any], *, place: str | Path = "") -> Outcome:
    """Call a function and return its outcome.

    Args:
        function: Function without arguments.
        place: Text that a message must contain, usually the name of the file.

    Raises:
        Wrong: the message is not one sentence, or the patient's name is in a message, a log, a warning or the output.
        BaseException: any other error of the function.
    """
    with recorded() as heard:
        try:
            outcome = Outcome(function(), None)
        except (UserError, OSError) as error:
            sentence = str(error) if isinstance(error, UserError) else describe_os_error(error)
            if sentence is None:
                raise
            outcome = Outcome(None, sentence)
        except BaseException as error:
            # A panic of an extension in Rust (pylibjpeg) is not an Exception.
            if type(error).__name__ == "PanicException":
                raise Wrong("a panic of a decoder was not caught", error) from error
            raise
    require(PATIENT.split("^")[0].lower() not in heard().lower(), "the patient's name is logged or printed", heard())
    if outcome.sentence is not None:
        check_sentence(outcome.sentence, place)
    return outcome


def command(*arguments: object, place: str | Path = "") -> Outcome:
    """Run the command line in this process; return (exit code, standard output) or its sentence.

    Raises:
        Wrong: the exit code is not 0, 1 or 2, or the standard error of a mistake does not end in a sentence.
        Exception: the command line ends in a traceback.
    """
    with recorded() as heard:
        code, out, err = call(*arguments)
    for text in (out, err, heard()):
        require(PATIENT.split("^")[0].lower() not in text.lower(), "the patient's name is logged or printed", text)
    require(code in (0, 1, 2), "exit code", code)
    if code != 2:
        return Outcome((code, out), None)
    # "TypeError: " inside a sentence is the word of a library.
    begins = [found.end() for found in re.finditer(r"^(?:[\w -]+: )?error: ", err, re.MULTILINE)]
    require(bool(begins), "exit code 2 without a sentence", err)
    sentence = err[begins[-1] :].rstrip("\n")
    check_sentence(sentence, place)
    return Outcome(None, sentence)


def check_sentence(message: str, place: str | Path = "") -> None:
    """Raise Wrong unless a message is one printable sentence that names the place. Listed files may follow."""
    require(message.strip() == message and message, "the message is empty or padded", repr(message))
    lines = message.split("\n")
    listed = [line.startswith(("  ", "Use ", "Fix:")) for line in lines[1:]]
    require(all(listed), "the message has several lines", repr(message))
    require(all(line.isprintable() for line in lines), "the message has control characters", repr(message))
    require(PATIENT.split("^")[0].lower() not in message.lower(), "the patient's name is in a message", message)
    for mark in ("Traceback", "object at 0x", "<class '", "pydantic.dev", "errors.pydantic"):
        require(mark not in message, "the message has internals of Python", message)
    short = lines[0].replace(tempfile.gettempdir(), "")
    require(len(short) <= MOST_CHARACTERS, "the message is too long", message)
    require(str(place) in message, "the message does not name the place", f"{place!s} in {message!r}")


@contextlib.contextmanager
def recorded() -> Iterator[Callable[[], str]]:
    """Yield a function that returns everything printed (by C libraries too), logged and warned of in the block."""
    texts = io.StringIO()
    handler = logging.StreamHandler(texts)
    root = logging.getLogger()
    heard: list[str] = []
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        root.addHandler(handler)
        copies = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(texts), contextlib.redirect_stderr(texts):
                yield lambda: "\n".join(heard)
        finally:
            for descriptor, copy in enumerate(copies, start=1):
                os.dup2(copy, descriptor)
                os.close(copy)
            root.removeHandler(handler)
            file.seek(0)
            heard += [texts.getvalue(), file.read().decode(errors="replace"), *(str(w.message) for w in caught)]


@contextlib.contextmanager
def limits(seconds: int = MOST_SECONDS, growth: int = MOST_BYTES) -> Iterator[None]:
    """Raise Wrong if the block needs too much processor time or memory. Main thread only.

    The time of the processor is measured, because a busy machine is no defect.
    """

    def stop(*_: object) -> None:
        raise Hang

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except Hang:
        raise Wrong("hang", f"more than {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    require(grown <= growth, "memory", f"{grown / 2**20:.0f} MiB")


def describe_failure(error: BaseException) -> str:
    """Return a text that failures of the same fault share: the kind of Wrong, or where an error was raised."""
    if isinstance(error, Wrong):
        return error.kind
    frames: Sequence[Any] = []
    trace = error.__traceback__
    while trace is not None:
        frames = [*frames, trace.tb_frame.f_code]
        trace = trace.tb_next
    ours = [code for code in frames if f"{os.sep}preceptor{os.sep}" in code.co_filename]
    code = (ours or frames)[-1]
    return f"{type(error).__name__} in {Path(code.co_filename).name}, {code.co_name}"

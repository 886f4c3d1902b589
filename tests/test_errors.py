"""Messages for mistakes of the user."""

from __future__ import annotations

from preceptor.errors import UserError, nearest


def test_a_message_obeys_no_terminal():
    quoted = "\x1b[2J\x07 \u202eabc \u2028 \ud800 \ufeff é 肺"
    assert str(UserError(quoted)) == r"\x1b[2J\x07 \u202eabc \u2028 \ud800 \ufeff é 肺"
    assert str(UserError("two files:\n  a\n  b")) == "two files:\n  a\n  b"
    assert str(UserError("other settings:\n  a\nUse the same.")) == "other settings:\n  a\nUse the same."
    assert str(UserError("a\nb.nii is no file\n")) == r"a\nb.nii is no file\n"


def test_a_hint_without_known_names_is_empty():
    assert nearest("x", []) == ""
    assert nearest("x", ["alpha", "beta"]) == "; known: alpha, beta"

"""Every input is read right or refused with one sentence. `bench/fuzz.py` tries more inputs, from random seeds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from preceptor.errors import UserError
from tests.fuzz.outcome import PATIENT, Wrong, attempt, check_sentence, limits
from tests.fuzz.targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_read_right_or_refused_with_a_sentence(name, tmp_path):
    target = TARGETS[name]
    accepted = []

    # The same inputs at every run, so that a change of the product is the only reason for another result.
    @settings(max_examples=target.examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def check(value):
        accepted.append(target.run(value, tmp_path / "input"))

    check()
    assert any(accepted), "no input was accepted, so nothing was compared"
    assert not all(accepted), "no input was refused"


def fail(error: BaseException):
    def reader():
        raise error

    return reader


def several_lines(message: str) -> UserError:
    """Return an error with a line break that `UserError` itself would escape."""
    error = UserError("")
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (fail(UserError("")), "empty"),
        (fail(several_lines("x.nii: one\nTraceback")), "several lines"),
        (fail(UserError("x.nii: " + 2000 * "a")), "too long"),
        (fail(UserError("y.nii is wrong")), "does not name the place"),
        (fail(UserError(f"x.nii of {PATIENT} is wrong")), "patient's name"),
        (lambda: print(PATIENT), "patient's name"),
    ],
)
def test_wrong_outcomes_are_found(reader, kind):
    with pytest.raises(Wrong, match=kind):
        attempt(reader, place="x.nii")


def test_control_characters_are_found():
    with pytest.raises(Wrong, match="control characters"):
        check_sentence("x.nii: \x00 is wrong", "x.nii")
    assert attempt(fail(UserError("x.nii: \x00 is wrong"))).sentence == r"x.nii: \x00 is wrong"


def run_forever():
    while True:
        pass


def test_other_errors_and_hangs_are_found():
    with pytest.raises(KeyError):
        attempt(fail(KeyError("x")))
    with pytest.raises(Wrong, match="hang"), limits(seconds=1):
        run_forever()


def test_a_sentence_and_a_value_are_right_outcomes():
    assert attempt(fail(UserError("x.nii: is wrong")), place="x.nii").sentence == "x.nii: is wrong"
    assert attempt(lambda: 3).value == 3

"""SIGKILL before any change of a file, and in the middle of a write: run again, a verb leaves what it always leaves."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.fault.verbs import VERBS, Inputs, Signal, contents, forked_call, hidden, killed_by_size

KILLS = 3


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])  # see test_kill
def test_a_killed_verb_that_runs_again_leaves_what_an_undisturbed_one_leaves(inputs: Inputs, output: Path, verb: str):
    command, place, counter = inputs.arguments(verb, output), output.parent, Signal(output.parent)
    code, err = forked_call(command, counter)
    assert code == 0, err
    whole = contents(place)
    assert hidden(place) == []
    assert counter.count > 0
    points = sorted({1 + (counter.count - 1) * step // (KILLS - 1) for step in range(KILLS)})
    for fault in (*(Signal(place, point) for point in points), killed_by_size(1000)):
        shutil.rmtree(place)
        inputs.place(output)
        code, err = forked_call(command, fault)
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ) or not isinstance(fault, Signal), err
        code, err = forked_call(command)
        # The last change comes after the model is in its place, where new-vlm overwrites none.
        assert code == 0 or (verb == "new-vlm" and "already contains a model" in err), err
        assert contents(place) == whole
        assert hidden(place) == []

"""The tiny inputs of all verbs, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.verbs import Inputs, make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def output(inputs: Inputs, tmp_path: Path) -> Path:
    """A path that does not exist, next to copies of what verbs write into."""
    inputs.place(tmp_path / "place" / "out")
    return tmp_path / "place" / "out"

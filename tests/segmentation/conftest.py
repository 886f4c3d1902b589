from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.api import run_recipe
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.tasks import load_recipe
from tests.fault.tiny import LCKD, write_recipe


def recipe(folder: Path, *overrides: str) -> SegmentationRecipe:
    loaded = load_recipe(str(write_recipe(folder, LCKD)), [f"output={folder / 'run'}", *overrides])
    assert isinstance(loaded, SegmentationRecipe)
    return loaded


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished tiny run in `run`, its cases in `run/data`."""
    folder = tmp_path_factory.mktemp("lckd")
    run_recipe(recipe(folder))
    return folder

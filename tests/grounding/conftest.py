"""Tiny random models of the three Qwen-VL families, one folder each for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.grounding.new_vlm import Family, new_vlm

CORPUS = [
    "Where is the liver?",
    "The liver is at <|box_start|>(120,345),(567,890)<|box_end|>",
    "What modality is shown? A CT of the abdomen.",
    "Is the heart enlarged? No.",
] * 4


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    made: dict[str, Path] = {}

    def make(family: Family) -> Path:
        if family not in made:
            made[family] = new_vlm(tmp_path_factory.mktemp("vlm") / family, CORPUS, family, max_pixels=112 * 112)
        return made[family]

    return make

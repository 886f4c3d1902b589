"""`doctor`, `audit` and training state the same answer ceiling, because one class computes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.auditing.run import audit
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.check import check_data
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.context import RunContext

ANSWERS = {
    "train": ["Left lung", "left lung.", "liver", "Yes.", "no", "no", "two"],
    "test": ["left lung", "LIVER", "2", "spleen", "No", "yes", "the liver"],
}


@pytest.mark.parametrize("normaliser", ["mevf", "lower"])
@pytest.mark.parametrize("count", [1, 2])
def test_three_commands_state_one_ceiling(normaliser: str, count: int) -> None:
    samples = [
        Sample(f"{split}-{i}", Path(f"{split}-{i}.png"), f"What is {i}?", (answer,), "open", f"{split}-{i}", split)
        for split, answers in ANSWERS.items()
        for i, answer in enumerate(answers)
    ]
    data = Dataset("table", "given", Path(), samples)
    recipe = VqaRecipe.model_validate(
        {"name": "toy", "data": {"normaliser": normaliser, "minimum_answer_count": count}}
    )
    trained = RunContext(recipe, data).vocabulary.ceiling(data.split("test"))
    audited = audit(data, normaliser=normaliser, minimum_count=count)
    (told,) = (finding.reason for finding in check_data(data, normaliser, count) if "at most" in finding.reason)
    assert 0 < trained < 1
    assert audited.ceiling == trained
    assert told.endswith(f"at most {trained:.1%}")

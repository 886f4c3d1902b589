"""The notes of results: sentences that are shown next to the scores."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OF_TRAINING = re.compile(
    r"\(data\.(train_share|teacher_share|unlabelled|exclude_images_of)\)|answer classes of the training split"
)
"""A note names, in parentheses, the setting that it follows from. These settings choose what a model is trained on. The
answer classes of a recipe's training split are not those of the model, whose own ceiling is among its scores."""


def without_training(notes: Iterable[str]) -> list[str]:
    """Return the notes that do not tell what a model was trained on. Of a model that another recipe has trained, or
    that has no recipe, the others would be wrong."""
    return [note for note in notes if not _OF_TRAINING.search(note)]

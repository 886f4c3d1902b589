"""Which of several answers to give: the one most like the others (minimum Bayes risk), boxes by their overlap.

ClinKD's semantic-aware selective generation (section 3.4 of its paper) takes the best answer by semantic similarity.
The right answer is not known, so similarity to the other candidates stands in for it (Kumar and Byrne 2004, Eikema and
Aziz 2020). Ground truth never takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from preceptor.data.grounding.boxes import Box, find_boxes, iou

Similarity = Callable[[Sequence[str]], np.ndarray]
"""Returns the (N, N) similarity of texts, 1 on the diagonal."""


def choose(candidates: Sequence[str], similarity: Similarity, box_weight: float = 0.5) -> int:
    """Return the index of the candidate with the highest mean similarity to the others; of equals the first.

    Where any candidate holds boxes, similarity is (1 - `box_weight`) times that of the texts plus `box_weight` times
    `box_agreement`. One candidate is plain decoding.

    Raises ValueError without candidates, or for a similarity of another shape.
    """
    count = len(candidates)
    if count == 0:
        raise ValueError("there is nothing to choose from")
    if count == 1:
        return 0
    alike = np.asarray(similarity(candidates), dtype=np.float64)
    if alike.shape != (count, count):
        raise ValueError(f"similarity of shape {alike.shape} for {count} candidates")
    boxes = [[found.box for found in find_boxes(text) if found.box is not None] for text in candidates]
    if any(boxes):
        agreed = np.array([[box_agreement(a, b) for b in boxes] for a in boxes])
        alike = (1 - box_weight) * alike + box_weight * agreed
    others = (alike.sum(axis=1) - alike.diagonal()) / (count - 1)
    return int(np.argmax(others))


def box_agreement(a: Sequence[Box], b: Sequence[Box]) -> float:
    """Return the mean IoU of two answers' boxes, paired as well as can be; a box without a partner counts 0.

    Two answers without boxes agree wholly.
    """
    if not a and not b:
        return 1.0
    if not a or not b:
        return 0.0
    from scipy.optimize import linear_sum_assignment

    overlaps = np.array([[iou(x, y) for y in b] for x in a])
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum()) / max(len(a), len(b))


def word_overlap(texts: Sequence[str]) -> np.ndarray:
    """Return the F1 of the words of each pair of texts: a similarity that needs no model."""
    bags = [_bag(text) for text in texts]
    found = np.eye(len(texts))
    for i, a in enumerate(bags):
        for j in range(i):
            b = bags[j]
            shared = sum(min(count, b.get(word, 0)) for word, count in a.items())
            total = sum(a.values()) + sum(b.values())
            found[i, j] = found[j, i] = 2 * shared / total if total else 1.0
    return found


def _bag(text: str) -> dict[str, int]:
    bag: dict[str, int] = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?()<>|")
        if word:
            bag[word] = bag.get(word, 0) + 1
    return bag

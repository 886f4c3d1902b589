"""Select one of several answers: the one most similar to the others (minimum Bayes risk), with the overlap of boxes.

The semantic-aware selective generation of ClinKD (section 3.4) selects the best answer by semantic similarity. The true
answer is unknown, so that the similarity to the other candidates is used (Kumar and Byrne 2004, Eikema and Aziz 2020).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from preceptor.data.grounding.box_formats import find_boxes, without_boxes
from preceptor.data.grounding.boxes import Box, iou
from preceptor.text_metrics import tokens

Similarity = Callable[[Sequence[str]], np.ndarray]
"""Function that returns the similarities (N, N) of texts, with 1 on the diagonal."""


def choose(candidates: Sequence[str], similarity: Similarity, box_weight: float = 0.5) -> int:
    """Return the index of the candidate with the highest mean similarity to the others, the first one if equal.

    If a candidate contains boxes, the similarity is (1 - `box_weight`) times that of the texts without their boxes plus
    `box_weight` times `box_agreement`.

    Raises:
        ValueError: there are no candidates, or the similarities have another shape.
    """
    count = len(candidates)
    if count == 0:
        raise ValueError("there are no candidates")
    if count == 1:
        return 0
    similarities = np.asarray(similarity([without_boxes(text) for text in candidates]), dtype=np.float64)
    if similarities.shape != (count, count):
        raise ValueError(f"similarity of shape {similarities.shape} for {count} candidates")
    boxes = [[found.box for found in find_boxes(text) if found.box is not None] for text in candidates]
    if any(boxes):
        agreement = np.array([[box_agreement(a, b) for b in boxes] for a in boxes])
        similarities = (1 - box_weight) * similarities + box_weight * agreement
    others = (similarities.sum(axis=1) - similarities.diagonal()) / (count - 1)
    return int(np.argmax(others))


def box_agreement(a: Sequence[Box], b: Sequence[Box]) -> float:
    """Return the mean IoU of the boxes of two answers for the best pairing. Unpaired boxes count 0.

    The result is 1 if neither answer has boxes.
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
    """Return the F1 of the words of each pair of texts, a similarity that does not need a model."""
    bags = [Counter(tokens(text)) for text in texts]
    similarities = np.eye(len(texts))
    for i, a in enumerate(bags):
        for j in range(i):
            shared, total = (a & bags[j]).total(), a.total() + bags[j].total()
            similarities[i, j] = similarities[j, i] = 2 * shared / total if total else 1.0
    return similarities


def agreement(candidates: Sequence[str], index: int) -> float:
    """Return the mean similarity of one of several answers to the others: of its words, or of its boxes if lower.

    The result is 1 if there is no other answer.
    """
    words = word_overlap([without_boxes(text) for text in candidates])[index]
    boxes = [[found.box for found in find_boxes(text) if found.box is not None] for text in candidates]
    similarities = [min(words[i], box_agreement(boxes[index], boxes[i])) for i in range(len(candidates)) if i != index]
    return float(np.mean(similarities)) if similarities else 1.0

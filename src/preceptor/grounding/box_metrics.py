"""Scores of boxes and object names, by the published evaluation (`birdeval`) and by a stricter one.

`birdeval` computes what the published scripts of BiRD and ClinKD compute for Med-GRIT-270k, including their quirks, so
that results are comparable. `strict` matches boxes one to one and compares complete names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.data.grounding.box_formats import find_boxes, find_references
from preceptor.data.grounding.boxes import Box, iou, repair_box
from preceptor.normalizers import NORMALISERS

THRESHOLD = 0.5
_MARKED_BOX = re.compile(r"<box>(.*?)</box>")
_BARE_BOX = re.compile(r"\(\d+,\d+\),\(\d+,\d+\)")
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def clean_response(text: str) -> str:
    """Return a response as `birdeval` reads it (test_metric/regularization.py of the published code).

    It is cut after the full stop of ``.<|im_end|>``. ``<|im_end|>`` is removed in front of a line break only, and
    ``<|endoftext|>`` anywhere. If at least two line breaks remain, only the text between the first two is used.
    """
    before, end, _ = text.partition(".<|im_end|>")
    text = (before + "." if end else text).replace("<|im_end|>\n", "")
    pieces = text.split("\n")
    return (pieces[1] if len(pieces) > 2 else text).replace("<|endoftext|>", "").strip()


@dataclass(frozen=True)
class Boxes:
    """Counts of one sample: reference boxes, matched reference boxes and predicted boxes."""

    references: int
    matched: int
    predicted: int


def bird_boxes(reference: str, response: str) -> Boxes:
    """Count boxes like `birdeval`: a reference box is found if any box of the response has an IoU > 0.5 with it.

    Marked boxes, ``<box>...</box>``, may contain any four numbers, with spaces and decimals. Only if the response has
    no mark at all, its texts ``(x1,y1),(x2,y2)`` of whole numbers without spaces are boxes. Boxes that cannot be read
    match nothing and are not counted. A predicted box may match several references.
    """
    answer = clean_response(response)
    references = _read_numbers(_MARKED_BOX.findall(reference))
    predictions = _read_numbers(_MARKED_BOX.findall(answer) or _BARE_BOX.findall(answer))
    matched = sum(any(iou(box, other) > THRESHOLD for other in predictions) for box in references)
    return Boxes(len(references), matched, len(predictions))


def strict_boxes(reference: str, response: str) -> Boxes:
    """Count one-to-one matches of reference and predicted boxes with an IoU of at least 0.5, as many as possible.

    Boxes may be marked in either style. Corners are sorted, and boxes are clipped to the image.
    """
    references, predictions = _valid_boxes(reference), _valid_boxes(response)
    return Boxes(len(references), _count_matches(references, predictions), len(predictions))


def _count_matches(references: Sequence[Box], predictions: Sequence[Box]) -> int:
    if not references or not predictions:
        return 0
    from scipy.optimize import linear_sum_assignment

    fits = np.array([[iou(a, b) >= THRESHOLD for b in predictions] for a in references])
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return int(fits[rows, columns].sum())


def bird_named(reference: str, response: str) -> bool:
    """Return whether every space-separated word of the reference occurs anywhere in the lower-case response."""
    answer = clean_response(response).lower()
    return all(word in answer for word in reference.lower().split(" "))


def strict_named(reference: str, response: str) -> bool:
    """Return whether both are the same name in lower case, without punctuation and marks.

    If the response contains several references, the first one counts. It ends at its end token.
    """
    normalise = NORMALISERS["lower"]
    for token in _END_TOKENS:
        response = response.partition(token)[0]
    names = find_references(response)
    name = names[0] if names else response
    return _normalise_name(normalise(name)) == _normalise_name(normalise(reference))


def grounding_scores(counts: Sequence[Boxes]) -> dict[str, float | int | None]:
    """Return recall, precision and F1 over all boxes, and the number of samples with a reference box.

    As in `birdeval`, samples without a reference box are left out. Recall is None if there are no others.
    """
    counted = [count for count in counts if count.references]
    references, matched, predicted = (
        sum(getattr(count, name) for count in counted) for name in ("references", "matched", "predicted")
    )
    recall = matched / references if references else None
    precision = min(matched, predicted) / predicted if predicted else None
    f1 = None if recall is None or precision is None else 2 * precision * recall / max(1e-12, precision + recall)
    return {"recall": recall, "precision": precision, "f1": f1, "n": len(counted)}


def mean_over(scores: Mapping[str, float | None]) -> float | None:
    """Return the mean over the modalities that have a score.

    The published scripts divide by all eight modalities of Med-GRIT-270k, so that one without samples counts as 0. The
    test set of Med-GRIT-270k has samples of all eight, so its means are equal.
    """
    known = [value for value in scores.values() if value is not None]
    return float(np.mean(known)) if known else None


def _read_numbers(texts: Sequence[str]) -> list[Box]:
    """Return the boxes of texts that are four finite numbers separated by commas, apart from parentheses."""
    boxes = []
    for text in texts:
        try:
            x0, y0, x1, y1 = map(float, text.replace("(", "").replace(")", "").split(","))
        except ValueError:
            continue
        if all(map(math.isfinite, (x0, y0, x1, y1))):
            boxes.append((x0, y0, x1, y1))
    return boxes


def _valid_boxes(text: str) -> list[Box]:
    boxes = (found.box for found in find_boxes(text))
    return [good for good in (repair_box(box) for box in boxes if box is not None) if good is not None]


def _normalise_name(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())

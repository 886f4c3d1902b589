"""Scores of boxes and object names, by the published evaluation (`birdeval`) and by a stricter one.

`birdeval` computes what the published scripts of BiRD and ClinKD compute for Med-GRIT-270k, including their quirks, so
that results are comparable. `strict` matches boxes one to one and compares complete names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.data.grounding.box_formats import find_boxes, find_references
from preceptor.data.grounding.boxes import Box, iou, repair_box
from preceptor.normalizers import NORMALISERS

THRESHOLD = 0.5
_REFERENCE_BOX = re.compile(r"<box>(.*?)</box>")
_PAIR = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")
_END = ("<|im_end|>", "<|endoftext|>")


def clean_response(text: str) -> str:
    """Return a response as `birdeval` reads it.

    It is cut at ``.<|im_end|>``, end tokens are removed, and if there are line breaks, only the second line is used.
    """
    text = text.split(".<|im_end|>")[0]
    for token in _END:
        text = text.replace(token, "")
    lines = text.split("\n")
    return (lines[1] if len(lines) > 1 else text).strip()


@dataclass(frozen=True)
class Boxes:
    """Counts of one sample: reference boxes, matched reference boxes and predicted boxes."""

    references: int
    matched: int
    predicted: int


def bird_boxes(reference: str, response: str) -> Boxes:
    """Count boxes like `birdeval`: a reference box is found if any box of the response has an IoU > 0.5 with it.

    Reference boxes are marked by ``<box>``. Boxes of the response are marked too, or are texts ``(x1,y1),(x2,y2)``
    anywhere. Only integers are read, and a predicted box may match several references.
    """
    references = _bird(reference)
    answer = clean_response(response)
    predictions = _bird(answer) or [_whole(match) for match in _PAIR.finditer(answer)]
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

    If the response contains several references, the first one counts.
    """
    normalise = NORMALISERS["lower"]
    names = find_references(response)
    return _normalise_name(normalise(names[0] if names else clean_response(response))) == _normalise_name(
        normalise(reference)
    )


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
    """Return the mean over the modalities that have a score, as in the published tables."""
    known = [value for value in scores.values() if value is not None]
    return float(np.mean(known)) if known else None


def _bird(text: str) -> list[Box]:
    inner = (_PAIR.search(found) for found in _REFERENCE_BOX.findall(text))
    return [_whole(match) for match in inner if match]


def _whole(match: re.Match[str]) -> Box:
    x0, y0, x1, y1 = (float(number) for number in match.groups())
    return (x0, y0, x1, y1)


def _valid_boxes(text: str) -> list[Box]:
    boxes = (found.box for found in find_boxes(text))
    return [good for good in (repair_box(box) for box in boxes if box is not None) if good is not None]


def _normalise_name(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())

"""Scores of grounding: boxes found, objects named, under the published evaluation (`birdeval`) and a stricter one.

`birdeval` is what BiRD's and ClinKD's published scripts compute for Med-GRIT-270k, quirks included, so that their
numbers can be compared with. `strict` matches one box to one box and compares whole names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.data.grounding.boxes import Box, find_boxes, find_references, iou, repair_box
from preceptor.normalizers import NORMALISERS

THRESHOLD = 0.5
_REFERENCE_BOX = re.compile(r"<box>(.*?)</box>")
_PAIR = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")
_END = ("<|im_end|>", "<|endoftext|>")


def clean_response(text: str) -> str:
    """Return a response as `birdeval` reads it: cut at ``.<|im_end|>``, without end tokens, and, where there are line
    breaks, what stands between the first two of them."""
    text = text.split(".<|im_end|>")[0]
    for token in _END:
        text = text.replace(token, "")
    lines = text.split("\n")
    return (lines[1] if len(lines) > 1 else text).strip()


@dataclass(frozen=True)
class Boxes:
    """Of one sample: reference boxes `wanted`, those of them that were `found`, and the number that was `said`."""

    wanted: int
    found: int
    said: int


def bird_boxes(reference: str, response: str) -> Boxes:
    """Count as `birdeval`: each reference box is found if any box of the response has IoU > 0.5 with it.

    Reference boxes stand in ``<box>``; those of the response too, or else anywhere as ``(x1,y1),(x2,y2)``. Only whole
    numbers are read, and a box may be used for several references.
    """
    wanted = _bird(reference)
    answer = clean_response(response)
    said = _bird(answer) or [_whole(match) for match in _PAIR.finditer(answer)]
    found = sum(any(iou(box, other) > THRESHOLD for other in said) for box in wanted)
    return Boxes(len(wanted), found, len(said))


def strict_boxes(reference: str, response: str) -> Boxes:
    """Count pairs of one reference and one predicted box with IoU of at least 0.5, as many as can be paired at once.

    Boxes in the marks of either style; corners in the wrong order are put right, what lies outside the image is cut.
    """
    wanted, said = _good(reference), _good(response)
    return Boxes(len(wanted), _matched(wanted, said), len(said))


def _matched(wanted: Sequence[Box], said: Sequence[Box]) -> int:
    if not wanted or not said:
        return 0
    from scipy.optimize import linear_sum_assignment

    fits = np.array([[iou(a, b) >= THRESHOLD for b in said] for a in wanted])
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return int(fits[rows, columns].sum())


def bird_named(reference: str, response: str) -> bool:
    """Return whether every space-separated word of the reference occurs in the lower-cased response, wherever."""
    answer = clean_response(response).lower()
    return all(word in answer for word in reference.lower().split(" "))


def strict_named(reference: str, response: str) -> bool:
    """Return whether both are the same name: in lower case, without punctuation and marks; of several references in
    the response the first counts."""
    normalise = NORMALISERS["lower"]
    names = find_references(response)
    return _plain(normalise(names[0] if names else clean_response(response))) == _plain(normalise(reference))


def grounding_scores(counts: Sequence[Boxes]) -> dict[str, float | int | None]:
    """Return recall, precision and F1 over all boxes, and the number of samples with a reference box.

    Samples without a reference box are left out, as `birdeval` does; recall is None where none is left.
    """
    kept = [count for count in counts if count.wanted]
    wanted, found, said = (sum(getattr(count, name) for count in kept) for name in ("wanted", "found", "said"))
    recall = found / wanted if wanted else None
    precision = min(found, said) / said if said else None
    both = None if recall is None or precision is None else 2 * precision * recall / max(1e-12, precision + recall)
    return {"recall": recall, "precision": precision, "f1": both, "n": len(kept)}


def mean_over(scores: Mapping[str, float | None]) -> float | None:
    """Return the mean over the modalities that have a score: how the published tables sum up."""
    known = [value for value in scores.values() if value is not None]
    return float(np.mean(known)) if known else None


def _bird(text: str) -> list[Box]:
    inner = (_PAIR.search(found) for found in _REFERENCE_BOX.findall(text))
    return [_whole(match) for match in inner if match]


def _whole(match: re.Match[str]) -> Box:
    x0, y0, x1, y1 = (float(number) for number in match.groups())
    return (x0, y0, x1, y1)


def _good(text: str) -> list[Box]:
    boxes = (found.box for found in find_boxes(text))
    return [good for good in (repair_box(box) for box in boxes if box is not None) if good is not None]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())

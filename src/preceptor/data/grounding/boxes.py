"""Geometry of boxes: convert them from pixels, check and repair them, compare them.

A box is (x0, y0, x1, y1) in thousandths of the width and height of the image, from the upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]
SIDE = 1000


def from_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Convert corners (x0, y0, x1, y1) from pixels to thousandths."""
    x0, y0, x1, y1 = box
    return (SIDE * x0 / width, SIDE * y0 / height, SIDE * x1 / width, SIDE * y1 / height)


def validate_box(box: Sequence[float]) -> list[str]:
    """Return the faults of a box: `swapped corners`, `outside`, `empty`. The list is empty for a valid box."""
    x0, y0, x1, y1 = box
    faults = ["swapped corners"] * (x0 > x1 or y0 > y1)
    faults += ["outside"] * (min(box) < 0 or max(box) > SIDE)
    return faults + ["empty"] * (x0 == x1 or y0 == y1)


def repair_box(box: Sequence[float]) -> Box | None:
    """Sort the corners of a box and clip it to the image. Return None if nothing remains."""
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    inside = (max(0.0, x0), max(0.0, y0), min(float(SIDE), x1), min(float(SIDE), y1))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes, or 0 if both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(0.0, width) * max(0.0, height)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

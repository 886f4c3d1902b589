"""Find out in which format texts write their boxes: from syntax and values, or by comparison with known boxes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from preceptor.data.grounding.box_formats import (
    BOX_FORMATS,
    CANONICAL,
    Size,
    Unit,
    WrittenBox,
    is_native,
    parse,
    smart_resize,
    written_boxes,
)
from preceptor.data.grounding.box_syntax import Syntax, as_corners
from preceptor.data.grounding.boxes import SIDE, Box, iou
from preceptor.errors import UserError

Sizes = Callable[[], Sequence[Size] | None]
"""Function that returns the sizes of the images of a text, or None if they are unknown. It is called only if they
matter."""
MARGIN = 0.05
"""Difference of mean IoU between the best two formats from which the best one is clear."""
SWAPPED = 0.1
"""If more boxes than this fraction have their corners in the wrong order, the numbers are no corners."""
SLACK = 0.01
"""Fraction of a side by which the boxes of a possible format may leave their images: sums of rounded numbers, pixels
that count from 1, and single boxes that are drawn a little too far."""
MOST = 0.9
"""Share of the boxes inside their images from which another format is a doubt: a few boxes are faulty in most files."""
LOOKED_AT = 500
"""About the largest number of boxes that are looked at only to express a doubt."""
SHRUNK = 0.7
"""If hardly any box extends beyond this fraction of large images, the images may have been shrunk before."""
LARGE = 1_000_000
"""Number of pixels from which an image is often shrunk before a model sees it."""

_UNIQUE: dict[Syntax, str] = {"box_2d": "gemma", "loc1024": "paligemma", "loc1000": "florence"}
"""Syntaxes that one family alone writes."""


@dataclass
class FormatDecision:
    """The format of a data set.

    Attributes:
        format: name of the format, or None if there are no boxes.
        boxes: number of boxes.
        candidates: formats that agree with all boxes, if there are several.
        reason: why there is no decision.
        doubt: why the decision may be wrong although the format agrees with all boxes.
    """

    format: str | None
    boxes: int = 0
    candidates: tuple[str, ...] = ()
    reason: str = ""
    doubt: str = ""


_Numbers = tuple[Sequence[float], str, Sizes]


@dataclass
class _Group:
    """The boxes of one syntax, with the sizes of their images and the places of their texts."""

    boxes: list[tuple[WrittenBox, str, Sizes]] = field(default_factory=list)


def decide_format(texts: Iterable[tuple[str, str, Sizes]]) -> FormatDecision:
    """Decide in which format a whole data set writes its boxes.

    A syntax of one family alone decides. Marked or bare corners ``(x,y),(x,y)`` are thousandths, unless all values are
    at most 1, or more boxes are above 1000 than leave their images in pixels. For other syntaxes the values decide: a
    format is possible if no box leaves its image by more than `SLACK`. Lists of four numbers are corners, x first,
    unless many of them are in the wrong order and all of them are boxes as [x, y, width, height] or as [centre x,
    centre y, width, height]. Nothing is decided if several formats remain, or if some boxes are in fractions of 1 and
    others are not. A decision is doubtful if another unit is possible but for a few boxes.

    Args:
        texts: (text, place, sizes of its images) of all texts.
    """
    groups: dict[str, _Group] = {}
    count = 0
    for text, place, sizes in texts:
        for box in written_boxes(text):
            count += 1
            kind = "corners" if box.marked or box.syntax == "corners" else box.syntax
            if kind != "unknown":
                groups.setdefault(kind, _Group()).boxes.append((box, place, sizes))
    if not groups:
        return FormatDecision(CANONICAL if count else None, count)
    decisions = {kind: _decide_group(kind, group) for kind, group in groups.items()}
    for decision in decisions.values():
        if decision.format is None:
            return FormatDecision(None, count, decision.candidates, decision.reason)
    formats = {decision.format for decision in decisions.values()}
    named = decisions.get("named")
    if named is not None and len(formats) == 2:
        # Named numbers are read in every format with their unit.
        others = formats - {named.format}
        same = {name for name in others if BOX_FORMATS[str(name)].unit == BOX_FORMATS[str(named.format)].unit}
        formats = same or formats
    if len(formats) > 1:
        listed = ", ".join(f"{d.format} at {groups[kind].boxes[0][1]}" for kind, d in sorted(decisions.items()))
        reason = f"the boxes are in several formats ({listed})"
        return FormatDecision(None, count, tuple(sorted(map(str, formats))), reason)
    format = str(formats.pop())
    doubts = (_doubt(kind, group, format) for kind, group in groups.items())
    return FormatDecision(format, count, doubt=next((doubt for doubt in doubts if doubt), ""))


FEW, MANY = 4, 10
"""Numbers of different boxes from which a coincidence is improbable, and from which images are opened to find out."""


def _doubt(kind: str, group: _Group, format: str) -> str:
    """Return why boxes may be in another unit than that of the format that was found, or an empty text."""
    unit = BOX_FORMATS[format].unit
    layout = BOX_FORMATS[format].layout if kind in ("list", "bbox_2d") else "xyxy"
    numbers = [
        (as_corners(box.numbers, layout), place, sizes) for box, place, sizes in group.boxes if box.numbers is not None
    ]
    if len({box for box, *_ in numbers}) < FEW or kind in _UNIQUE:
        return ""
    if unit == "resized pixels":
        return doubt_resized(group.boxes)
    low = sum(max(box) <= 100 for box, *_ in numbers)
    if unit == "thousandths" and low >= MOST * len(numbers):
        return f"{_of(low, numbers)} are in the upper left tenth of the images, as if their numbers were per cent"
    if unit == "thousandths":
        return _doubt_of_unit(numbers, "pixels", "below", lambda size: min(size) < SIDE)
    if unit == "pixels":
        # Up to a tenth above 1000, both units give nearly the same boxes.
        return _doubt_of_unit(numbers, "thousandths", "above", lambda size: max(size) > 1.1 * SIDE)
    return ""


def _doubt_of_unit(numbers: Sequence[_Numbers], other: Unit, where: str, tells: Callable[[Size], bool]) -> str:
    """Return that nearly all boxes are inside their images in another unit, too, or an empty text.

    Only boxes count whose images all have a size that `tells` the units apart.
    """
    if len({values for values, *_ in numbers}) < MANY:
        return ""
    telling = [
        (values, place, sizes)
        for values, place, sizes in numbers[:: 1 + len(numbers) // LOOKED_AT]
        if (known := sizes()) and all(map(tells, known))
    ]
    inside = sum(excess <= SLACK for excess in _excesses(telling, other))
    if len({values for values, *_ in telling}) < MANY or inside < MOST * len(telling):
        return ""
    which = "" if len(telling) == len(numbers) else f" in images with a side {where} {SIDE:,} pixels"
    return f"{_of(inside, telling)}{which} are inside the images in {other}, too"


def _of(count: int, boxes: Sized) -> str:
    return f"all {count} boxes" if count == len(boxes) else f"{count} of {len(boxes)} boxes"


def doubt_thousandths(boxes: Iterable[tuple[WrittenBox, str, Sizes]]) -> str:
    """Return why boxes of a format that counts in thousandths may be in another unit, or an empty text.

    Args:
        boxes: (marked or bare corners, place, sizes of its images) of a whole data set.
    """
    return _doubt("corners", _Group(list(boxes)), CANONICAL)


def doubt_resized(boxes: Sequence[tuple[WrittenBox, str, Sizes]], max_pixels: int | None = None) -> str:
    """Return why boxes in pixels of resized images may be those of smaller images, or an empty text.

    Args:
        boxes: (box, place, sizes of its images) of a whole data set.
        max_pixels: limit of the number of pixels with which the boxes are read; None for the published one.
    """
    reach: dict[tuple[float, ...], float] = {}
    for box, _, sizes in boxes[:: 1 + len(boxes) // LOOKED_AT]:
        known = sizes() or ()
        if box.numbers is None or len(known) != 1 or math.prod(known[0]) <= LARGE:
            continue
        width, height = BOX_FORMATS["qwen2.5-vl"].size_seen(known[0], max_pixels=max_pixels)
        reach[box.numbers] = max(box.numbers[2] / width, box.numbers[3] / height)
    inside = sum(fraction <= SHRUNK for fraction in reach.values())
    if len(reach) < FEW or inside < MOST * len(reach):
        return ""
    return (
        f"{_of(inside, reach)} of images with more than {LARGE:,} pixels end before {SHRUNK:.0%} of the sides, as if "
        "the images had been resized to fewer pixels"
    )


_LIMITS: Mapping[str, Size] = {"unit": (1, 1), "percent": (100, 100), "thousandths": (SIDE, SIDE)}
"""Width and height of every image in the units that do not depend on its size."""


def _excesses(numbers: Sequence[_Numbers], unit: Unit) -> Iterator[float]:
    """Yield by which fraction of a side each box leaves the image that it leaves least; 0 if it is inside.

    Images of unknown size contain every box. Boxes without an image are left out, unless there is no image at all: they
    leave it infinitely far.
    """
    no_images = True
    for (x0, y0, x1, y1), _, sizes in numbers:
        known = [_LIMITS[unit]] if unit in _LIMITS else sizes()
        if unit == "resized pixels" and known:
            known = [smart_resize(size) for size in known]
        if known is None or known:
            no_images = False
            excesses = (
                max(max(x0, x1) / w - 1, max(y0, y1) / h - 1, -min(x0, x1) / w, -min(y0, y1) / h, 0.0)
                for w, h in known or ()
            )
            yield min(excesses, default=0.0)
    if no_images:
        yield math.inf


def _fits(numbers: Sequence[_Numbers], unit: Unit, tolerance: float = SLACK) -> bool:
    """Return whether every box is inside its image in a unit, up to a fraction `tolerance` of its sides."""
    return all(excess <= tolerance for excess in _excesses(numbers, unit))


def _fitting_pixels(numbers: Sequence[_Numbers], units: Sequence[Unit]) -> list[Unit]:
    """Return the units in pixels that fit. Their images differ little, so those that fit exactly exclude the others."""
    exact = [unit for unit in units if _fits(numbers, unit, 0)]
    return exact or [unit for unit in units if _fits(numbers, unit)]


def _size_formats(numbers: Sequence[_Numbers], units: Sequence[Unit]) -> list[str]:
    """Return the formats with positions and sizes in which every box has an area and is inside its image."""
    if any(min(values[2:]) <= 0 for values, *_ in numbers):
        return []
    fitting = []
    for layout in ("xywh", "cxcywh"):
        boxes = [(as_corners(values, layout), place, sizes) for values, place, sizes in numbers]
        fitting += [f"{layout}-{unit}" for unit in units if _fits(boxes, unit)]
    return fitting


def _decide_group(kind: str, group: _Group) -> FormatDecision:
    numbers = [(box.numbers, place, sizes) for box, place, sizes in group.boxes if box.numbers is not None]
    if kind in _UNIQUE:
        if kind == "box_2d" and numbers and all(max(values) <= 1 for values, *_ in numbers):
            return FormatDecision(None, 0, (), "no format with box_2d has values in 0 to 1")
        return FormatDecision(_UNIQUE[kind], len(group.boxes))  # type: ignore[index]
    if not numbers:  # all are cut off: the policy for faulty boxes decides
        return FormatDecision(CANONICAL, len(group.boxes))
    place = numbers[0][1]
    highest = max(max(values) for values, *_ in numbers)
    fractions = any(value % 1 for values, *_ in numbers for value in values)
    layout = "polygon" if kind == "polygon" else "xyxy"
    if highest <= 1 and not fractions:
        candidates = [f"{layout}-unit", f"{layout}-thousandths"]
        return FormatDecision(None, 0, tuple(candidates), f"all numbers are 0 or 1, such as at {place}")
    shares = [at for values, at, _ in numbers if max(values) <= 1 and any(value % 1 for value in values)]
    if shares and highest > 1 + SLACK:
        reason = f"the numbers of {len(shares)} of {len(numbers)} boxes are from 0 to 1, such as at {shares[0]}, and "
        return FormatDecision(None, 0, (), f"{reason}others are up to {highest:g}; write all boxes in one unit")
    if kind == "corners":
        return _decide_corners(numbers, highest)
    return _decide_lists(kind, numbers, highest, place)


def _decide_corners(numbers: Sequence[_Numbers], highest: float) -> FormatDecision:
    """Decide about ``(x,y),(x,y)``; faulty boxes are left to the policy, which refuses or repairs them."""
    if highest <= 1 + SLACK:
        return FormatDecision("xyxy-unit", len(numbers))
    above = sum(max(values) > SIDE for values, *_ in numbers)
    outside = sum(1 for _ in islice((e for e in _excesses(numbers, "pixels") if e > SLACK), above))  # stops at `above`
    if outside < above and outside <= (1 - MOST) * len(numbers):
        return _ask(["xyxy-pixels", CANONICAL], highest)
    return FormatDecision(CANONICAL, len(numbers))


def _decide_lists(kind: str, numbers: Sequence[_Numbers], highest: float, place: str) -> FormatDecision:
    """Decide about lists of numbers by the formats in which no box leaves its image."""
    layout = "polygon" if kind == "polygon" else "xyxy"
    in_fractions = highest <= 1 + SLACK
    units: list[Unit] = ["unit"] if in_fractions else ["thousandths"] * (highest <= SIDE * (1 + SLACK))
    if kind != "bbox_2d" and not in_fractions and highest <= 100 * (1 + SLACK):
        units.append("percent")
    pixels: list[Unit] = []
    if not in_fractions:
        pixels = _fitting_pixels(numbers, ["pixels", "resized pixels"] if kind == "bbox_2d" else ["pixels"])
    candidates = [f"{layout}-{unit}" for unit in (*units, *pixels) if unit != "resized pixels"]
    if kind == "bbox_2d":
        candidates = [name.replace("xyxy-thousandths", "qwen3-vl") for name in candidates]
    if "resized pixels" in pixels:
        resized = any(smart_resize(size) != size for *_, sizes in numbers for size in sizes() or ())
        if resized or "pixels" not in pixels:
            candidates.append("qwen2.5-vl")
    swapped = sum(a > c or b > d for (a, b, c, d), *_ in numbers)
    in_order = swapped <= SWAPPED * len(numbers)
    different = len({values for values, *_ in numbers})
    with_sizes = []
    if kind == "list" or (kind == "bbox_2d" and not in_order):  # the key bbox_2d stands for corners
        with_sizes = _size_formats(numbers, ["unit"] if in_fractions else ["thousandths", "percent", "pixels"])
    if not in_order:
        reason = f"{swapped} of {len(numbers)} boxes have x1 < x0 or y1 < y0, such as at {place}"
        if len(with_sizes) == 1 and different >= FEW:
            return FormatDecision(with_sizes[0], len(numbers))
        listed = f", and all of them fit {' and '.join(with_sizes)}" if with_sizes else ""
        return FormatDecision(None, 0, tuple(with_sizes), reason + listed)
    if len(candidates) == 1 and not (with_sizes and different >= FEW):
        return FormatDecision(candidates[0], len(numbers))
    if not candidates and not with_sizes:
        transposed = [((b, a, d, c), place, sizes) for (a, b, c, d), place, sizes in numbers]
        if kind == "list" and _fits(transposed, "pixels"):
            return _ask(["yxyx-pixels"], highest)
        return FormatDecision(None, 0, (), f"a value of {highest:g} is outside the image in every format")
    return _ask(candidates + with_sizes, highest)


def _ask(candidates: Sequence[str], highest: float) -> FormatDecision:
    return FormatDecision(None, 0, tuple(candidates), f"values up to {highest:g} fit {' and '.join(candidates)}")


@dataclass(frozen=True)
class FormatMeasurement:
    """How well each format agrees with known boxes.

    Attributes:
        mean_iou: mean IoU over all answers by format; an answer whose boxes a format cannot read counts 0.
        read: number of boxes that a format reads.
        answers: number of answers with known boxes.
        best: the format with the highest mean IoU; of formats that read the same boxes, the one in whose syntax most
            boxes are written.
        margin: difference of its mean IoU to the best format that reads other boxes.
    """

    mean_iou: Mapping[str, float]
    read: Mapping[str, int]
    answers: int
    best: str
    margin: float

    @property
    def clear(self) -> bool:
        """Whether the best format is better than all others by at least `MARGIN`."""
        return self.margin >= MARGIN


def measure_format(
    answers: Sequence[str],
    truths: Sequence[Sequence[Box]],
    sizes: Sequence[Size | None] | None = None,
    *,
    formats: Iterable[str] = tuple(BOX_FORMATS),
    max_pixels: int | None = None,
) -> FormatMeasurement:
    """Read answers in every format and compare the boxes with the known ones.

    Args:
        answers: texts (N).
        truths: known boxes of each answer, in thousandths. Answers without known boxes are left out.
        sizes: width and height of the (upright) image of each answer, None if unknown: then formats in pixels are not
            tried.
        formats: names of the formats to try.
        max_pixels: limit to which the writer resizes images, for the formats in pixels of the resized image.

    Raises:
        ValueError: there are no answers with known boxes.
    """
    sizes = [None] * len(answers) if sizes is None else sizes
    rows = [row for row in zip(answers, truths, sizes, strict=True) if row[1]]
    if not rows:
        raise ValueError("no answer has a known box")
    known_sizes = all(size is not None for *_, size in rows)
    names = [name for name in formats if known_sizes or "pixels" not in BOX_FORMATS[name].unit]
    scores: dict[str, float] = {}
    read: Counter[str] = Counter()
    readings: dict[str, list[tuple[Box, ...]]] = {}
    for name in names:
        speaker = BOX_FORMATS[name]
        boxes = [
            tuple(
                b.box
                for b in parse(text, name, speaker.size_seen(size, max_pixels=max_pixels) if size else None)
                if b.box
            )
            for text, _, size in rows
        ]
        readings[name] = boxes
        read[name] = sum(map(len, boxes))
        scores[name] = float(np.mean([mean_overlap(b, truth) for b, (_, truth, _) in zip(boxes, rows, strict=True)]))
    native = {name: sum(is_native(text, name) for text, *_ in rows) for name in names}
    best = max(names, key=lambda name: (scores[name], native[name]))
    others = [scores[name] for name in names if readings[name] != readings[best]]
    return FormatMeasurement(scores, dict(read), len(rows), best, scores[best] - max(others, default=0.0))


@dataclass(frozen=True)
class ScaleMeasurement:
    """The factor by which boxes are too large, and their mean IoU with the known ones after division by it."""

    factor: float
    mean_iou: float
    unit: str


def measure_scale(
    answers: Sequence[str], truths: Sequence[Sequence[Box]], sizes: Sequence[Size | None]
) -> ScaleMeasurement | None:
    """Return the scale of boxes in pixels of images whose size is not known, such as those that a server has resized.

    One factor for all answers is fitted, as the median ratio of the coordinates: to thousandths of each side (images
    that were made equally large), to pixels, to pixels of images of equal area (images that were shrunk to a limit of
    their number of pixels), and to the longer side. Only answers with one box as corners and one known box are used.
    Returns the best fit, the first of several equal ones, or None if there are too few such answers.
    """
    rows: list[tuple[tuple[float, ...], Box, Size]] = []
    for text, truth, size in zip(answers, truths, sizes, strict=True):
        boxes = [box.numbers for box in written_boxes(text)]
        if len(boxes) == len(truth) == 1 and boxes[0] is not None and size is not None:
            rows.append((boxes[0], truth[0], size))
    if len(rows) < FEW:
        return None
    units: dict[str, Callable[[Size], tuple[float, float]]] = {
        "thousandths": lambda size: (SIDE, SIDE),
        "pixels": lambda size: size,
        "pixels of images of one megapixel": lambda size: (
            SIDE * math.sqrt(size[0] / size[1]),
            SIDE * math.sqrt(size[1] / size[0]),
        ),
        "thousandths of the longer side": lambda size: (
            SIDE * size[0] / max(size),
            SIDE * size[1] / max(size),
        ),
    }
    found = []
    for unit, sides in units.items():
        written = np.array([numbers for numbers, *_ in rows])
        sides_of = np.array([(*sides(size), *sides(size)) for *_, size in rows])
        true = np.array([box for _, box, _ in rows]) / SIDE * sides_of
        far = true > sides_of / 20  # ratios of small coordinates are noise
        if not far.any() or not (factor := float(np.median(written[far] / true[far]))) > 0:
            continue
        scaled = written / factor / sides_of * SIDE
        overlaps = [iou(tuple(box), truth) for box, (_, truth, _) in zip(scaled, rows, strict=True)]
        found.append(ScaleMeasurement(factor, float(np.mean(overlaps)), unit))
    return max(found, key=lambda fit: round(fit.mean_iou, 4), default=None)


def mean_overlap(boxes: Sequence[Box], truth: Sequence[Box]) -> float:
    """Return the mean IoU of two lists of boxes for the best pairing. Boxes without a partner count 0."""
    if not boxes or not truth:
        return float(not boxes and not truth)
    from scipy.optimize import linear_sum_assignment

    overlaps = np.array([[iou(a, b) for b in truth] for a in boxes])
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum()) / max(len(boxes), len(truth))


def require_decision(decision: FormatDecision, place: str, key: str) -> str:
    """Return the format of a decision. Raises UserError that asks for the setting `key` if there is none."""
    if decision.format is not None:
        return decision.format
    candidates = decision.candidates or tuple(BOX_FORMATS)
    raise UserError(
        f"{place}: the format of the boxes is not clear: {decision.reason}; name it with {key}, one of "
        f"{', '.join(candidates)}, or none if the texts contain no boxes"
    )

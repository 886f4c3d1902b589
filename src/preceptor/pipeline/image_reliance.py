"""Whether a model uses the image: its answers to the test questions with blank, exchanged and mirrored images."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from preceptor.errors import UserError
from preceptor.scores import group_of
from preceptor.statistics import Difference, adjust_holm, compare_scores, score_interval

IMAGES = ("real", "blank", "shuffled", "mirrored")
"""What a question is asked about: its own image, one of a single colour, the image of another group, or its own image
with left and right exchanged."""
Row = Mapping[str, Any]
_SIDES = {"left": "right", "right": "left"}
ImageT = TypeVar("ImageT", bound=Hashable)


def exchange_images(images: Sequence[tuple[str, ImageT]], seed: int = 0) -> dict[ImageT, ImageT]:
    """Return, for each image, the image of another group (image or patient) that takes its place.

    Each image takes the place of exactly one other, so that all questions about an image get the same one. The images
    are put in a random order by group, and each is replaced by the one that lies as far ahead as the largest group is
    long. This distance never ends within the same group.

    Args:
        images: (group, image) of each question.
        seed: of the random order.

    Raises:
        UserError: one group has more than half of the images.
    """
    groups: dict[str, list[ImageT]] = {}
    for group, image in dict.fromkeys(images):
        groups.setdefault(group, []).append(image)
    names = sorted(groups)
    np.random.default_rng(seed).shuffle(names)
    order = [image for name in names for image in groups[name]]
    step = max(map(len, groups.values()), default=0)
    if len(order) < 2 * step or len(set(order)) != len(order):
        raise UserError(
            f"the images cannot be shuffled: one group has {step} of the {len(order)} test images, but each must be "
            "exchanged for one of another group; leave `shuffled` out of --images"
        )
    return dict(zip(order, order[step:] + order[:step], strict=True))


def image_reliance(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Return what the other images change, by kind of image.

    Args:
        rows: the scored questions by kind of image, with ``real`` first, all in the same order. A row has `score` and
            `prediction`, and `group` or `id`.

    Returns:
        For each kind: `score`, the mean of the protocol's metric, and `n`. For each kind but ``real`` also `difference`
        (score minus that of the real images) with `low`, `high`, `p_holm` (over the kinds) and `verdict`, `kept` (the
        score as a share of that of the real images), and `changed`, the share of other answers, with its interval. For
        ``mirrored`` also `sides`: of the `n` real answers that name one side, left or right, the shares that
        `switched` to the other side, with its interval, and that `stayed`.
    """
    real = rows["real"]
    groups = [group_of(row) for row in real]
    scores = {kind: [row["score"] for row in one] for kind, one in rows.items()}
    found: dict[str, dict[str, Any]] = {kind: {"score": _mean(scores[kind]), "n": len(real)} for kind in rows}
    others = [kind for kind in rows if kind != "real"]
    differences = adjust_holm(
        [compare_scores([scores[kind]], [scores["real"]], paired=True, groups=groups) for kind in others]
    )
    for kind, difference in zip(others, differences, strict=True):
        changed = [float(a["prediction"] != b["prediction"]) for a, b in zip(rows[kind], real, strict=True)]
        found[kind] |= _difference(difference)
        found[kind]["kept"] = found[kind]["score"] / found["real"]["score"] if found["real"]["score"] else None
        found[kind]["changed"] = _share(changed, groups)
        if kind == "mirrored":
            found[kind]["sides"] = _sides(real, rows[kind], groups)
    return found


def _sides(real: Sequence[Row], mirrored: Sequence[Row], groups: Sequence[str]) -> dict[str, Any]:
    switched, stayed, of = [], 0, []
    for one, other, group in zip(real, mirrored, groups, strict=True):
        if (side := _side(one["prediction"])) is not None:
            now = _side(other["prediction"])
            switched.append(float(now == _SIDES[side]))
            stayed += now == side
            of.append(group)
    share = _share(switched, of)
    return {"n": len(of), "switched": share, "stayed": stayed / len(of) if of else None}


def _side(answer: str) -> str | None:
    """Return the side that an answer names, or None if it names none or both."""
    named = {word for word in re.findall(r"\w+", answer.lower()) if word in _SIDES}
    return named.pop() if len(named) == 1 else None


def _share(values: Sequence[float], groups: Sequence[str]) -> dict[str, float | None]:
    spread = score_interval([values], groups=groups) if values else None
    return {
        "share": _mean(values),
        "low": None if spread is None else spread.low,
        "high": None if spread is None else spread.high,
    }


def _difference(one: Difference) -> dict[str, Any]:
    keys = ("difference", "low", "high", "p_holm", "verdict", "groups")
    return {key: getattr(one, key) for key in keys}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

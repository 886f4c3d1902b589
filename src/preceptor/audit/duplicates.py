"""Which images are the same: by bytes, by pixels, by look; and which show the same scan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preceptor.audit.images import Look
from preceptor.data.phash import ALIKE_BITS, cosine_transform, hashes, near

Kind = Literal["bytes", "pixels", "copy", "alike"]
SAME: tuple[Kind, ...] = ("bytes", "pixels", "copy")
COPY_CORRELATION = 0.975
"""Correlation of fine detail from which two alike images are copies of one."""
COARSE = 8  # frequencies (across + down) below this are left out of the correlation: all head CTs share those


@dataclass(frozen=True)
class Pair:
    """Two images, by their place in a list, `left` < `right`.

    `kind`: `bytes` (equal files), `pixels` (equal once decoded), `copy` (resized or encoded again) or `alike` (the
    hashes are close, but the detail differs: adjacent slices of a scan, or an altered copy). `bits` is the number of
    bits in which the hashes differ, `correlation` that of the fine detail.
    """

    left: int
    right: int
    kind: Kind
    bits: int
    correlation: float


def find_pairs(looks: Sequence[Look]) -> list[Pair]:
    """Return all pairs of images that are the same or alike, the surest first; broken images are in none."""
    if not looks:
        return []
    exact = _equal(looks)
    thumbnails_N = np.stack([look.thumbnail for look in looks])
    whole = np.array([not look.broken for look in looks])
    left, right, bits = near(hashes(thumbnails_N), hashes(thumbnails_N), ALIKE_BITS, upper=True)
    keep = whole[left] & whole[right]
    left, right, bits = left[keep], right[keep], bits[keep]
    similar = correlations(thumbnails_N, left, right)
    pairs = []
    for i, j, distance, correlation in zip(left.tolist(), right.tolist(), bits.tolist(), similar.tolist(), strict=True):
        kind: Kind = "copy" if correlation >= COPY_CORRELATION else "alike"
        pairs.append(Pair(i, j, exact.pop((i, j), kind), distance, correlation))
    # What is left are blank images, which have no hash.
    pairs += [Pair(i, j, kind, 0, 1.0) for (i, j), kind in exact.items()]
    order = {kind: number for number, kind in enumerate((*SAME, "alike"))}
    return sorted(pairs, key=lambda pair: (order[pair.kind], pair.bits, -pair.correlation, pair.left, pair.right))


def correlations(thumbnails_N: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the correlation (P,) of the fine detail of pairs of (N, 64, 64) grey values.

    It is the cosine between the two cosine transforms without their lowest frequencies; the transform being
    orthonormal, this is the correlation of the images through a high-pass filter. 0 where there is no detail.
    """
    found = np.zeros(len(left))
    wanted = np.add.outer(np.arange(thumbnails_N.shape[1]), np.arange(thumbnails_N.shape[2])) >= COARSE
    for start in range(0, len(left), 512):
        a, b = (cosine_transform(thumbnails_N[rows[start : start + 512]])[:, wanted] for rows in (left, right))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        found[start : start + 512] = (a * b).sum(axis=1) / np.maximum(lengths, 1e-9)
    return found


def _equal(looks: Sequence[Look]) -> dict[tuple[int, int], Kind]:
    """Return the pairs that are equal in bytes or pixels."""
    found: dict[tuple[int, int], Kind] = {}
    kinds: tuple[tuple[Kind, str], ...] = (("pixels", "pixels"), ("bytes", "file"))
    for kind, name in kinds:
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for number, look in enumerate(looks):
            if not look.broken:
                groups[getattr(look, name)].append(number)
        for members in groups.values():
            found.update({(i, j): kind for n, i in enumerate(members) for j in members[n + 1 :]})
    return found

"""Find images that are the same (by bytes, by pixels, as copies) or that show the same scan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preceptor.auditing.images import ImageSummary
from preceptor.data.phash import ALIKE_BITS, cosine_transform, hashes, near

Kind = Literal["bytes", "pixels", "copy", "alike"]
SAME: tuple[Kind, ...] = ("bytes", "pixels", "copy")
COPY_CORRELATION = 0.975
"""Smallest correlation of fine detail at which two similar images count as copies."""
COARSE = 8  # lower frequencies (horizontal + vertical) are left out of the correlation, because all head CTs share them


@dataclass(frozen=True)
class Pair:
    """Two images by their index in a list, with `left` < `right`.

    `kind` is `bytes` (equal files), `pixels` (equal decoded pixels), `copy` (resized or encoded again) or `alike`
    (similar hashes with different detail: adjacent slices of a scan, or an altered copy). `bits` is the number of
    differing bits of the hashes, and `correlation` is the correlation of the fine detail.
    """

    left: int
    right: int
    kind: Kind
    bits: int
    correlation: float


def find_pairs(summaries: Sequence[ImageSummary]) -> list[Pair]:
    """Return all pairs of images that are the same or alike, the most certain first. Broken images are skipped."""
    if not summaries:
        return []
    exact = _equal(summaries)
    thumbnails_N = np.stack([summary.thumbnail for summary in summaries])
    readable = np.array([not summary.broken for summary in summaries])
    left, right, bits = near(hashes(thumbnails_N), hashes(thumbnails_N), ALIKE_BITS, upper=True)
    selected = readable[left] & readable[right]
    left, right, bits = left[selected], right[selected], bits[selected]
    pair_correlations = correlations(thumbnails_N, left, right)
    pairs = []
    for i, j, distance, correlation in zip(
        left.tolist(), right.tolist(), bits.tolist(), pair_correlations.tolist(), strict=True
    ):
        kind: Kind = "copy" if correlation >= COPY_CORRELATION else "alike"
        pairs.append(Pair(i, j, exact.pop((i, j), kind), distance, correlation))
    # The remaining pairs are blank images, which have no hash.
    pairs += [Pair(i, j, kind, 0, 1.0) for (i, j), kind in exact.items()]
    order = {kind: number for number, kind in enumerate((*SAME, "alike"))}
    return sorted(pairs, key=lambda pair: (order[pair.kind], pair.bits, -pair.correlation, pair.left, pair.right))


def correlations(thumbnails_N: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the correlation (P,) of the fine detail of pairs of grey values (N, 64, 64).

    It is the cosine similarity of the cosine transforms without their lowest frequencies. Because the transform is
    orthonormal, this equals the correlation of the high-pass filtered images. It is 0 if there is no detail.
    """
    result = np.zeros(len(left))
    fine = np.add.outer(np.arange(thumbnails_N.shape[1]), np.arange(thumbnails_N.shape[2])) >= COARSE
    for start in range(0, len(left), 512):
        a, b = (cosine_transform(thumbnails_N[rows[start : start + 512]])[:, fine] for rows in (left, right))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        result[start : start + 512] = (a * b).sum(axis=1) / np.maximum(lengths, 1e-9)
    return result


def _equal(summaries: Sequence[ImageSummary]) -> dict[tuple[int, int], Kind]:
    """Return the pairs of images with equal bytes or pixels."""
    pairs: dict[tuple[int, int], Kind] = {}
    kinds: tuple[tuple[Kind, str], ...] = (("pixels", "pixels"), ("bytes", "file"))
    for kind, name in kinds:
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for number, summary in enumerate(summaries):
            if not summary.broken:
                groups[getattr(summary, name)].append(number)
        for members in groups.values():
            pairs.update({(i, j): kind for n, i in enumerate(members) for j in members[n + 1 :]})
    return pairs

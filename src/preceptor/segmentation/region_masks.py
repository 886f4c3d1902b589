"""Region masks from probabilities. An export contains a copy of this file, which therefore needs numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def threshold_regions(probabilities: np.ndarray, regions: Mapping[str, Sequence[int]], threshold: float) -> np.ndarray:
    """Return the masks (R, ...) bool of region probabilities (R, ...).

    A voxel is in a region if its probability is at least `threshold`. No label is in two regions that exclude each
    other (that share no label), so at most one of these is kept: the regions of a voxel are taken in the order of their
    probabilities, and one that excludes a region before it is dropped. The first region wins a tie. Regions that share
    a label, such as nested ones, do not change each other.
    """
    masks = probabilities >= threshold
    excluded = np.array([[not {*a} & {*b} for b in regions.values()] for a in regions.values()])
    doubtful = masks.sum(0) > 1
    if not excluded.any() or not doubtful.any():
        return masks
    passed = masks[:, doubtful]  # (R, V)
    kept = np.zeros_like(passed)
    voxels = np.arange(passed.shape[1])
    for region in np.argsort(-probabilities[:, doubtful], axis=0, kind="stable"):  # (V,)
        kept[region, voxels] = passed[region, voxels] & ~(excluded[:, region] & kept).any(0)
    masks[:, doubtful] = kept
    return masks

"""Scores of segmentation: Dice, Hausdorff distance, post-processing, tables over subsets of modalities."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

EMPTY_HD95 = 373.1287
"""Distance in mm where one of both masks is empty: the diagonal of a BraTS volume, as its organisers count it."""
EPSILON = 1e-8
DESCRIBES = {
    "A": (
        "protocol A: Dice (2 I + 1e-8) / (sum + 1e-8), so that empty against empty is 1; mean over cases, then over "
        "the combinations of modalities; HD95 in mm"
    ),
    "A-post": (
        "protocol A after post-processing: small components dropped, an enhancing tumour below its smallest size "
        "counted as none"
    ),
}


def dice(predicted: np.ndarray, target: np.ndarray) -> float:
    """Return (2 |P and T| + 1e-8) / (|P| + |T| + 1e-8) of two bool masks (protocol A: RFNet, mmFormer and later)."""
    overlap = np.count_nonzero(predicted & target)
    return float((2 * overlap + EPSILON) / (np.count_nonzero(predicted) + np.count_nonzero(target) + EPSILON))


def hd95(predicted: np.ndarray, target: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the 95th percentile Hausdorff distance in mm of two bool masks (D, H, W): the larger of both directions.

    `spacing` is the size of a voxel in mm along D, H, W. Distances are between surface voxels. Both empty: 0; one of
    them empty: `EMPTY_HD95`.
    """
    if not predicted.any() or not target.any():
        return 0.0 if predicted.any() == target.any() else EMPTY_HD95
    import torch
    from monai.metrics import compute_hausdorff_distance

    p, t = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's about a call of its own
        found = compute_hausdorff_distance(
            p, t, include_background=True, percentile=95, directed=False, spacing=[float(mm) for mm in spacing]
        )
    return float(found)


def remove_small_components(
    masks: np.ndarray, regions: Sequence[str], *, share: float = 0.1, voxels: int = 2000, et_minimum: int = 500
) -> np.ndarray:
    """Return masks (R, D, H, W) bool without what is too small to be believed.

    Of each region, components (26 neighbours) under ``min(voxels, share * the largest)`` voxels are dropped (published
    code); an ``et`` of fewer than `et_minimum` voxels altogether is none, and its voxels are ``tc`` (published code,
    and the second ET column of protocol A).
    """
    from scipy.ndimage import label

    found = masks.copy()
    for r in range(len(regions)):
        marked, count = label(masks[r], structure=np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(marked.ravel())
            sizes[0] = 0
            found[r] = (sizes >= min(voxels, share * sizes.max()))[marked] & masks[r]
    if "et" in regions:
        et = found[list(regions).index("et")]
        if 0 < np.count_nonzero(et) < et_minimum:
            if "tc" in regions:
                found[list(regions).index("tc")] |= et
            et[...] = False
    return found


def table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of rows {id, subset, region, dice, hd95}: means over cases, then over subsets.

    `dice`: over subsets and regions; `regions` and `hd95`: by region; `subsets`: by subset and region; `n`: cases.
    """
    sums: dict[str, dict[str, list[list[float]]]] = {}
    cases = set()
    for row in rows:
        cases.add(row["id"])
        sums.setdefault(row["subset"], {}).setdefault(row["region"], []).append([row["dice"], row["hd95"]])
    means = {s: {region: np.mean(values, axis=0) for region, values in by.items()} for s, by in sums.items()}
    regions = list(next(iter(means.values()))) if means else []
    over = {region: np.mean([by[region] for by in means.values()], axis=0) for region in regions}
    return {
        "metric": "dice",
        "dice": float(np.mean([values[0] for values in over.values()])),
        "n": len(cases),
        "regions": {region: float(values[0]) for region, values in over.items()},
        "hd95": {region: float(values[1]) for region, values in over.items()},
        "subsets": {
            s: {
                "dice": {region: float(values[0]) for region, values in by.items()},
                "hd95": {region: float(values[1]) for region, values in by.items()},
            }
            for s, by in means.items()
        },
    }

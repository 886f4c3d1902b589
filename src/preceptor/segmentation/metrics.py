"""Scores of label maps: Dice, Hausdorff distance, post-processing, tables over combinations of modalities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from preceptor.scores import UnitScore, group_of
from preceptor.segmentation.intensity import bounding_box

UNIT = "case"
ROW_FIELDS = {"id": str, "subset": str, "region": str, "dice": float, "hd95": float}
ROW_KEY = ("id", "subset", "region")
RATIO_TO_TEACHER = False
EMPTY_HD95 = 373.1287
"""Distance in mm if exactly one of the two masks is empty: the diagonal of a BraTS volume, as its organisers use it."""
EPSILON = 1e-8
DESCRIBES = {
    "A": (
        "protocol A: Dice (2 I + 1e-8) / (sum + 1e-8), so that empty against empty is 1; mean over cases, then over "
        "the combinations of modalities; HD95 in mm"
    ),
    "A-post": (
        "protocol A after post-processing: small components of the whole tumour are dropped, and an enhancing tumour "
        "below a minimum size becomes core"
    ),
}


def dice(predicted: np.ndarray, target: np.ndarray, outside: int = 0) -> float:
    """Return (2 |P and T| + 1e-8) / (|P| + |T| + 1e-8) of two bool masks (protocol A: RFNet, mmFormer and later).

    `outside` is the number of voxels of the target that lie outside the arrays, where nothing is predicted.
    """
    overlap = np.count_nonzero(predicted & target)
    total = np.count_nonzero(predicted) + np.count_nonzero(target) + outside
    return float((2 * overlap + EPSILON) / (total + EPSILON))


def hd95(predicted: np.ndarray, target: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the 95th percentile Hausdorff distance in mm of two bool masks (D, H, W), the larger of both directions.

    `spacing` is the size of a voxel in mm along D, H, W. Distances are between surface voxels, which have a neighbour
    (6) outside the mask or lie at the border of the volume. The distance is 0 if both masks are empty and `EMPTY_HD95`
    if one of them is.
    """
    if not predicted.any() or not target.any():
        return 0.0 if predicted.any() == target.any() else EMPTY_HD95
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    box = bounding_box(predicted | target)
    surfaces = [
        np.argwhere(mask[box] & ~binary_erosion(mask[box])) * np.asarray(spacing, float) for mask in (predicted, target)
    ]
    # Surface voxels are few, so that a search among them is faster than a distance transform of the box.
    trees = [KDTree(surface, compact_nodes=False, balanced_tree=False) for surface in surfaces]
    return max(
        float(np.percentile(tree.query(other)[0], 95)) for tree, other in zip(trees, surfaces[::-1], strict=True)
    )


def post_process(
    label: np.ndarray,
    regions: Mapping[str, Sequence[int]],
    *,
    share: float = 0.1,
    voxels: int = 2000,
    lowest_slices: int = 0,
    et_minimum: int = 500,
) -> np.ndarray:
    """Return a label map (D, H, W) without lesions that are too small to be plausible, as in the published LCKD code.

    1. Components of all foreground (in BraTS the whole tumour) with 18 neighbours. A component with fewer than
       ``min(voxels, share * largest)`` voxels, or that lies within the `lowest_slices` slices at the feet, becomes
       background. The published code removes components whose highest slice is at most 25: `lowest_slices` = 26 for
       BraTS volumes of 155 slices.
    2. An ``et`` of fewer than `et_minimum` voxels in total gets the label of the region around it (in BraTS the tumour
       core, label 1).

    Regions that are nested before are nested afterwards.

    Between these steps the published code divides the oedema by k-means on T1ce where little tumour enhances, and calls
    the darker part the core. That step is left out: it reads T1ce even if T1ce is among the missing modalities, so its
    results are no longer those of the combination that they are reported for.
    """
    from scipy.ndimage import find_objects, generate_binary_structure
    from scipy.ndimage import label as label_components

    label = label.copy()
    components, count = label_components(label > 0, structure=generate_binary_structure(3, 2))
    if count:
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        tops = np.array([0, *(box[0].stop for box in find_objects(components))])
        removed = (sizes < min(voxels, share * sizes.max())) | (tops <= lowest_slices)
        removed[0] = False
        label[removed[components]] = 0
    if "et" in regions:
        et = np.isin(label, regions["et"])
        if 0 < np.count_nonzero(et) < et_minimum:
            label[et] = _label_around(regions)
    return label


def _label_around(regions: Mapping[str, Sequence[int]]) -> int:
    """Return the label of the narrowest region around ``et`` that is not ``et``; 0 if there is none."""
    et = set(regions["et"])
    around = [sorted(set(values) - et) for values in regions.values() if et < set(values)]
    return min(around, key=len)[0] if around else 0


def score_masks(
    id: str,
    subset: str,
    masks: np.ndarray,
    targets: np.ndarray,
    regions: Sequence[str],
    spacing: Sequence[float],
    *,
    group: str = "",
) -> list[dict[str, Any]]:
    """Return the rows {id, group, subset, region, dice, hd95} of one predicted label map, one row per region.

    All scores of a run and of `preceptor score` are made here, from the regions of label maps as they are saved.

    Args:
        id: of the case.
        subset: the modalities that were given, as in ``flair+t1``.
        masks: predicted regions (R, D, H, W) bool.
        targets: the regions (R, D, H, W) bool of the reference on the same grid.
        regions: names of the R regions.
        spacing: voxel size in mm along D, H, W.
        group: number of the patient, whose cases are not independent; default: the case is on its own.
    """
    return [
        {
            "id": id,
            "group": group or id,
            "subset": subset,
            "region": region,
            "dice": dice(masks[r], targets[r]),
            "hd95": hd95(masks[r], targets[r], spacing),
        }
        for r, region in enumerate(regions)
    ]


def unreadable_rows(id: str, subset: str, regions: Sequence[str], *, group: str = "") -> list[dict[str, Any]]:
    """Return the rows of a case that cannot be read, as `score_masks` does: Dice 0 and `EMPTY_HD95` in every region."""
    worst = {"dice": 0.0, "hd95": EMPTY_HD95}
    return [{"id": id, "group": group or id, "subset": subset, "region": region, **worst} for region in regions]


def unit_scores(rows: Sequence[Mapping[str, Any]], protocol: str) -> list[UnitScore]:
    """Return the Dice of every case, region and combination of modalities, cases in the order of their ids."""
    return [
        UnitScore(
            row["id"],
            group_of(row),
            "dice",
            float(row["dice"]),
            {"regions": row["region"], "modalities": _number(row["subset"].count("+") + 1)},
        )
        for row in sorted(rows, key=lambda row: row["id"])
    ]


def _number(modalities: int) -> str:
    return "1 modality" if modalities == 1 else f"{modalities} modalities"


def headline_scores(rows: Sequence[Mapping[str, Any]], protocol: str) -> dict[str, float | None]:
    """Return the number of cases and the mean Dice, by key of the protocol's entry in results.json."""
    summary = table(rows)
    return {"n": summary["n"], "dice": summary["dice"]}


def table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of rows {id, subset, region, dice, hd95}: means over cases, then over subsets.

    `dice`: over subsets and regions; `regions` and `hd95`: by region; `subsets`: by subset and region; `n`: cases.
    """
    values: dict[str, dict[str, list[list[float]]]] = {}
    cases = set()
    for row in rows:
        cases.add(row["id"])
        values.setdefault(row["subset"], {}).setdefault(row["region"], []).append([row["dice"], row["hd95"]])
    means = {s: {region: np.mean(pairs, axis=0) for region, pairs in by.items()} for s, by in values.items()}
    regions = list(next(iter(means.values()))) if means else []
    overall = {region: np.mean([by[region] for by in means.values()], axis=0) for region in regions}
    return {
        "metric": "dice",
        "dice": float(np.mean([mean[0] for mean in overall.values()])),
        "n": len(cases),
        "regions": {region: float(mean[0]) for region, mean in overall.items()},
        "hd95": {region: float(mean[1]) for region, mean in overall.items()},
        "subsets": {
            s: {
                "dice": {region: float(mean[0]) for region, mean in by.items()},
                "hd95": {region: float(mean[1]) for region, mean in by.items()},
            }
            for s, by in means.items()
        },
    }

"""Scores of segmentations: Dice, the 95th percentile Hausdorff distance, post-processing, tables over subsets.

Protocols are named ``{data}/{split}/A`` for predictions as they are and ``{data}/{split}/A-post`` for predictions after
`postprocess`. A is the protocol of most papers on missing modalities (RFNet, mmFormer and later): Dice per case and
region with empty against empty counting 1, the mean over cases of each subset of modalities, then the mean over the
subsets. A-post drops an enhancing tumour of under 500 voxels, as they do for their second ET column, and, beyond them,
small components (published LCKD code). Numbers of the hidden 66 cases of BraTS2018's server (LCKD, ShaSpec: B) are not
comparable.

Arrays are 3-D and boolean: one region of one case. Distances are in mm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WORST_HD95 = float(np.sqrt(240**2 + 240**2 + 155**2))
"""373.13 mm, the diagonal of a BraTS volume: what BraTS gives where either side, but not both, is empty."""

Masks = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Score:
    """One case and region, predicted from one subset of modalities: ``{"dice": 0.9, "hd95": 3.2}``."""

    case: str
    subset: str
    region: str
    values: Mapping[str, float]


def protocol_id(data: str, split: str, *, post: bool) -> str:
    return f"{data}/{split}/A{'-post' if post else ''}"


def dice(predicted: np.ndarray, target: np.ndarray) -> float:
    """Return ``(2 |P and T| + 1e-8) / (|P| + |T| + 1e-8)`` (protocol A): 1 where both are empty."""
    p, t = _pair(predicted, target)
    return float((2 * np.count_nonzero(p & t) + 1e-8) / (np.count_nonzero(p) + np.count_nonzero(t) + 1e-8))


def hd95(
    predicted: np.ndarray, target: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0), worst: float = WORST_HD95
) -> float:
    """Return the larger of the two directed 95th percentiles of the distances between the surfaces, in mm.

    The definition of MONAI's `compute_hausdorff_distance`: surface voxels are those with a neighbour by a face outside
    the region or the volume, distances are between voxel centres, percentiles are interpolated. `spacing`: mm per axis.
    Both empty: 0; one empty: `worst`.
    """
    from scipy import ndimage

    p, t = _pair(predicted, target)
    if not p.any() or not t.any():
        return 0.0 if p.any() == t.any() else worst
    # Distances of surface voxels need no more of the volume than the box that holds both surfaces.
    (box,) = ndimage.find_objects((p | t).astype(np.uint8))
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (p[box], t[box])]
    directed = [
        np.percentile(ndimage.distance_transform_edt(~there, sampling=spacing)[here], 95)
        for here, there in (surfaces, surfaces[::-1])
    ]
    return float(max(directed))


def score(predicted: np.ndarray, target: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    return {"dice": dice(predicted, target), "hd95": hd95(predicted, target, spacing)}


def score_case(
    case: str, subset: str, predicted: Masks, targets: Masks, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> list[Score]:
    """Return the scores of every region of `targets`."""
    return [Score(case, subset, region, score(predicted[region], targets[region], spacing)) for region in targets]


def remove_small_components(mask: np.ndarray, least: int = 2000, share: float = 0.1) -> np.ndarray:
    """Return the mask without its components of fewer voxels than min(`least`, `share` of the largest one's).

    The defaults are the published LCKD code's. Voxels that touch by a corner are connected (our choice).
    """
    from scipy import ndimage

    numbered, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count < 2:
        return np.asarray(mask, dtype=bool).copy()
    sizes = np.bincount(numbered.ravel())
    sizes[0] = 0
    keep = sizes >= min(least, share * sizes.max())
    keep[0] = False
    return keep[numbered]


def nest(masks: Masks, order: Sequence[str] = ("et", "tc", "wt")) -> dict[str, np.ndarray]:
    """Return the regions, each made to hold those before it in `order`: what a label map of BraTS can express.

    The published code writes wt, then tc over it, then et, which has the same effect. Regions that are not in `order`
    are left alone.
    """
    nested = {name: np.asarray(mask, dtype=bool).copy() for name, mask in masks.items()}
    there = [name for name in order if name in nested]
    for inner, outer in pairwise(there):
        nested[outer] |= nested[inner]
    return nested


def et_minimum(masks: Masks, least: int = 500, region: str = "et", into: str = "tc") -> dict[str, np.ndarray]:
    """Return the regions with an enhancing tumour of under `least` voxels taken for non-enhancing core.

    `region` is emptied, its voxels are part of `into`. With 500 the rule of protocol A and of the published LCKD code.
    """
    kept = {name: np.asarray(mask, dtype=bool).copy() for name, mask in masks.items()}
    if region in kept and np.count_nonzero(kept[region]) < least:
        if into in kept:
            kept[into] |= kept[region]
        kept[region][...] = False
    return kept


def postprocess(masks: Masks) -> dict[str, np.ndarray]:
    """Return the regions as the published LCKD code leaves them: small components dropped from each, nested, and an
    enhancing tumour of under 500 voxels taken for core."""
    return et_minimum(nest({name: remove_small_components(mask) for name, mask in masks.items()}))


def table(rows: Iterable[Score]) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{metric: {subset: {region: mean over cases}}}``, with a last subset ``mean``: the mean over the subsets.

    A case that lacks a modality has no row for the subsets with it; a subset's mean is over the cases that have it.
    Subsets and regions keep the order in which they come.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        for metric, value in row.values.items():
            values[metric][row.subset][row.region].append(value)
    means: dict[str, dict[str, dict[str, float]]] = {}
    for metric, by_subset in values.items():
        means[metric] = {
            subset: {region: float(np.mean(found)) for region, found in by_region.items()}
            for subset, by_region in by_subset.items()
        }
        overall: dict[str, list[float]] = defaultdict(list)
        for by_region in means[metric].values():
            for region, value in by_region.items():
                overall[region].append(value)
        means[metric]["mean"] = {region: float(np.mean(found)) for region, found in overall.items()}
    return means


def _pair(predicted: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert predicted.shape == target.shape, f"{predicted.shape} against {target.shape}"
    return np.asarray(predicted, dtype=bool), np.asarray(target, dtype=bool)

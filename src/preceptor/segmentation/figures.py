"""The pictures of a segmentation report, made at evaluation: the worst cases with reference and predicted outlines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preceptor.data.types import Case, SegmentationDataset
from preceptor.errors import UserError
from preceptor.report.pictures import FigureWriter
from preceptor.segmentation import planes
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.subset_scores import mean
from preceptor.segmentation.subsets import Subset, parse_subset

log = logging.getLogger("preceptor")

LONGEST_SIDE = 256  # pixels of a plane
MOST_SUBSETS = 4
PREFERRED_IMAGES = ("flair", "t1ce", "t2")
"""Images that show a brain tumour best, of those that the network was given."""


def write_figures(
    folder: Path,
    data: SegmentationDataset,
    recipe: SegmentationRecipe,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Store pictures of the `recipe.report.cases` worst cases in ``folder/figures``.

    Three planes through the reference are drawn for up to four combinations of modalities, from the label maps in
    ``folder/predictions/masks``. Cases whose files cannot be read or have different grids are left out.

    Args:
        folder: folder of the stage.
        data: the data set.
        recipe: settings of the report and limits for volumes.
        rows: scores {id, subset, region, dice} by protocol id, the main protocol first.
    """
    modalities = tuple(data.modalities)
    scores: dict[str, dict[Subset, dict[str, float]]] = {}
    for row in next(iter(rows.values()), []):
        if subset := parse_subset(row["subset"], modalities):
            scores.setdefault(row["id"], {}).setdefault(subset, {})[row["region"]] = row["dice"]
    overall = {
        id: mean(value for by_region in found.values() for value in by_region.values()) for id, found in scores.items()
    }
    masks = _predicted_masks(folder, modalities)
    cases = {case.id: case for case in data.samples if case.mask is not None and case.id in masks}
    writer = FigureWriter(folder)
    drawn: list[dict[str, Any]] = []
    for id in sorted(cases, key=lambda id: (overall.get(id) or 0.0, id)):
        if len(drawn) == recipe.report.cases:
            break
        name = f"case-{len(drawn) + 1}"
        try:
            subsets = _draw(writer, name, cases[id], masks[id], scores.get(id, {}), data, recipe.data.max_voxels)
        except UserError:
            log.warning("a case is not drawn in the report because its files cannot be read")
            continue
        if subsets:
            drawn.append({"id": id, "dice": overall.get(id), "combinations": subsets})
    writer.finish({"cases": drawn})


def choose_subsets(dice: Mapping[Subset, float | None], most: int = MOST_SUBSETS) -> list[Subset]:
    """Return up to `most` combinations of decreasing size: the largest, the worst, and the worst of sizes between."""
    known = {subset: 1.0 if value is None else value for subset, value in dice.items()}
    ranked = sorted(known, key=lambda subset: (-len(subset), known[subset], subset))
    if len(ranked) <= most:
        return ranked
    chosen = [ranked[0]]
    worst = min(ranked, key=lambda subset: known[subset])
    if worst not in chosen:
        chosen.append(worst)
    while len(chosen) < most:
        sizes = {len(subset) for subset in chosen}
        rest = [subset for subset in ranked if subset not in chosen]
        chosen.append(next((subset for subset in rest if len(subset) not in sizes), rest[0]))
    return sorted(chosen, key=lambda subset: (-len(subset), known[subset], subset))


def _predicted_masks(folder: Path, modalities: Sequence[str]) -> dict[str, dict[Subset, Path]]:
    """Return the predicted label maps in a stage's folder, by case and combination."""
    found: dict[str, dict[Subset, Path]] = {}
    for path in sorted((folder / "predictions" / "masks").glob("*__*.nii.gz")):
        id, _, name = path.name.removesuffix(".nii.gz").rpartition("__")
        if subset := parse_subset(name, modalities):
            found.setdefault(id, {})[subset] = path
    return found


def _draw(
    writer: FigureWriter,
    name: str,
    case: Case,
    masks: Mapping[Subset, Path],
    scores: Mapping[Subset, dict[str, float]],
    data: SegmentationDataset,
    max_voxels: int,
) -> list[dict[str, Any]]:
    """Draw the chosen combinations of a case and return their entries in the index."""
    assert case.mask is not None
    label = planes.read_volume(case.mask.path, case.mask.channel, max_voxels=max_voxels)
    reference = planes.region_masks(label.voxels, data.regions)
    predictions: dict[Subset, dict[str, np.ndarray]] = {}
    for subset in choose_subsets({subset: mean(scores.get(subset, {}).values()) for subset in masks}):
        volume = planes.read_volume(masks[subset], max_voxels=max_voxels)
        if volume.fits(label):
            predictions[subset] = planes.region_masks(volume.voxels, data.regions)
    backgrounds = {subset: _background(case, subset, data.modalities) for subset in predictions}
    images: dict[str, np.ndarray] = {}
    for modality in sorted(set(backgrounds.values())):
        file = case.images[modality]
        volume = planes.read_volume(file.path, file.channel, max_voxels=max_voxels)
        if not volume.fits(label):
            raise UserError(f"{file.path} and {case.mask.path} have different grids")
        images[modality] = planes.apply_window(volume.voxels)
    if not images:
        return []
    truth = np.any(list(reference.values()), axis=0)
    predicted = np.any([mask for regions in predictions.values() for mask in regions.values()], axis=0)
    box = planes.content_box(np.max(list(images.values()), axis=0), truth | predicted)
    at = planes.central_voxel(truth if truth.any() else predicted)
    pictures = {
        (modality, plane): writer.add(
            f"{name}-{1 + sorted(images).index(modality)}-{plane}",
            Image.fromarray(np.ascontiguousarray(planes.slice_plane(image, plane, at, box))),
            LONGEST_SIDE,
        )
        for modality, image in images.items()
        for plane in planes.PLANES
    }
    entries = []
    for subset, regions in predictions.items():
        drawn = []
        for plane in planes.PLANES:
            size = planes.pixel_size(plane, label.spacing)
            rows, columns = planes.slice_plane(label.voxels, plane, at, box).shape
            outlines = [
                {"kind": kind, "region": region, "path": path}
                for kind, shapes in (("reference", _disjoint(reference)), ("predicted", regions))
                for region in sorted(shapes, key=lambda region: -int(shapes[region].sum()))
                if (path := planes.outline(planes.slice_plane(shapes[region], plane, at, box), size))
            ]
            picture = {"plane": plane, "picture": pictures[backgrounds[subset], plane], "outlines": outlines}
            drawn.append({**picture, "width": round(columns * size[0], 1), "height": round(rows * size[1], 1)})
        entry = {"subset": "+".join(subset), "image": backgrounds[subset], "dice": scores.get(subset, {})}
        entries.append({**entry, "planes": drawn})
    return entries


def _disjoint(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every region without the smaller ones, so that tints do not mix."""
    found: dict[str, np.ndarray] = {}
    for region in sorted(masks, key=lambda region: int(masks[region].sum())):
        smaller = np.any(list(found.values()), axis=0) if found else np.zeros_like(masks[region])
        found[region] = masks[region] & ~smaller
    return found


def _background(case: Case, subset: Subset, modalities: Sequence[str]) -> str:
    """Return which image of the combination is shown."""
    given = [m for m in modalities if m in subset and m in case.images] or list(case.images)
    return next((m for m in PREFERRED_IMAGES if m in given), given[0])
